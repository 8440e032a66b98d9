"""Training: packed sequences and a recipe in, an adapter folder out.

Read `trainer.py` first; `checkpoint.py` says when a checkpoint counts, `metrics.py` what a person sees meanwhile.
"""
