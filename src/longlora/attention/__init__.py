"""Shifted sparse attention (S2-Attn, LongLoRA section 3.2): the method itself.

In: query, key and value of a transformers attention layer, and document bounds. Out: the attention output.
Read `pattern.py` first (which token may attend to which), then `grouped.py` (how), then `registry.py` (the seam).
"""
