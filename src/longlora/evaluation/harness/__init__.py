"""Standard benchmarks through lm-evaluation-harness (extra ``bench``).

In: a model and names of tasks. Out: rows. Read `run.py` first.
"""
