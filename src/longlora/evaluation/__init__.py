"""Proof: a model and held-out tokens in, rows of losses and retrievals out, then a report. Always with full attention.

Read `run.py` first (the variants of a recipe), then `measurement.py` (one model, asked everything). Below them:
`loss/` and `retrieval/` (what is asked), `reading/` (how it is answered), `harness/` (standard benchmarks), `report/`.
"""
