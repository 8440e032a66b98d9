"""Whole training steps, ours beside what one would write without us: for ``longlora bench`` and ``benchmarks/``.

In: a model's config and a context length. Out: seconds and peak memory of a step, each measured in its own process.
Read `step.py` first.
"""
