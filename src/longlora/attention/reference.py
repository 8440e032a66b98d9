"""Shifted sparse attention as its definition says it, one query at a time: the ground truth of the tests.

B batch, T tokens, H query heads, K key/value heads, D head dim. Never used in training.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from longlora.attention.pattern import Pattern, may_attend, pattern_shift, shifted_heads


def reference_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    bounds_B: Sequence[Sequence[int]],
    pattern: Pattern,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sink_logits_H: Tensor | None = None,
) -> Tensor:
    """Output [B, T, H, D of the values] in the dtype of the query (use float64); differentiable; O(T^2) Python loops.

    Args:
        bounds_B: for each row the document bounds, from 0 on; positions after the last bound are padding and give 0.
        scaling: factor of the scores; 1/sqrt(D) if None.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2).
        sink_logits_H: one more score for each head, whose weight goes nowhere (gpt-oss).
    """
    B, H, T, D = q_BHTD.shape
    K = k_BKTD.shape[1]
    scaling = D**-0.5 if scaling is None else scaling
    border = H - shifted_heads(H, pattern_shift(pattern))
    out_BTHD = q_BHTD.new_zeros(B, T, H, v_BKTD.shape[-1])
    for b in range(B):
        for start, stop in itertools.pairwise(bounds_B[b]):
            for h in range(H):
                kv_head = h // (H // K)
                for i in range(stop - start):
                    seen = [
                        start + j for j in range(i + 1) if may_attend(i, j, stop - start, pattern, shifted=h >= border)
                    ]
                    scores = k_BKTD[b, kv_head, seen] @ q_BHTD[b, h, start + i] * scaling
                    if softcap is not None:
                        scores = softcap * torch.tanh(scores / softcap)
                    if sink_logits_H is not None:
                        scores = torch.cat([scores, sink_logits_H[h : h + 1].to(scores.dtype)])
                    weights = torch.softmax(scores, -1)[: len(seen)]
                    out_BTHD[b, start + i, h] = weights @ v_BKTD[b, kv_head, seen]
    return out_BTHD
