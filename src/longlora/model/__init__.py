"""The model around the method: building it with a rescaled RoPE, what of it is trained, and an ordinary model again.

In: a recipe. Out: a transformers model, later an adapter folder and an ordinary merged model.
Read `build.py` first, then `rope.py`, `trainable.py`, `adapters.py` and `merge.py`.
"""
