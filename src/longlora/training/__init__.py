"""Training: packed sequences and a recipe in; an adapter folder, or a whole model after full fine-tuning, out.

Read `trainer.py` first, then `loop.py`; `checkpoint.py` says when a checkpoint counts, `metrics.py` what a person sees.
"""
