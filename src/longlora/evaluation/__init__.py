"""Proof: a model and held-out tokens in, rows of losses and retrievals out, then a report. Always with full attention.

Read `stream.py` first (one reading of a long text, from which all is measured), then `perplexity.py`, `passkey.py`,
`run.py` (base, RoPE only, trained) and `report.py`.
"""
