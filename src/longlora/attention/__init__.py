"""Shifted sparse attention (S2-Attn, LongLoRA section 3.2): the method itself.

In: query, key and value of a transformers attention layer, and document bounds. Out: the attention output.
Definition: `pattern.py`, which token may attend to which; `reference.py` is the same as loops, `rolled.py` the paper's.
Computation: `backends.py` chooses; `grouped.py` and `cpu_flash.py` on any device, `varlen.py` and `flex.py` on CUDA.
Seam to transformers: `registry.py` (`use_s2`), `passes.py` (which passes are sparse), `layers.py` (which layers),
`lazy_mask.py` (document bounds), `support.py` (what is refused), `full.py` (evaluation). `halo.py`: the sequence cut
across ranks. Check: `check.py` runs a user's model, `picture.py` draws it. Read `pattern.py`, `grouped.py` and
`registry.py` first, in this order.
"""
