"""The model around the method: building it with a rescaled RoPE, its adapter, and the merge back.

In: a recipe. Out: a transformers model, later an adapter folder and an ordinary merged model.
Read `build.py` first, then `rope.py`, `adapters.py` and `merge.py`.
"""
