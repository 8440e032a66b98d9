"""Shifted sparse attention as its definition says it, one query at a time: the ground truth of the tests.

B batch, T tokens, H query heads, K key/value heads, D head dim. Never used in training.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from longlora.attention.pattern import S2Pattern, may_attend, shifted_heads


def reference_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    bounds_B: Sequence[Sequence[int]],
    pattern: S2Pattern,
    scaling: float | None = None,
) -> Tensor:
    """Output [B, T, H, D] in the dtype of the query (use float64); differentiable; O(T^2) Python loops.

    Args:
        bounds_B: for each row the document bounds, from 0 on; positions after the last bound are padding and give 0.
        scaling: factor of the scores; 1/sqrt(D) if None.
    """
    B, H, T, D = q_BHTD.shape
    K = k_BKTD.shape[1]
    scaling = D**-0.5 if scaling is None else scaling
    out_BTHD = q_BHTD.new_zeros(B, T, H, v_BKTD.shape[-1])
    for b in range(B):
        for start, stop in itertools.pairwise(bounds_B[b]):
            for h in range(H):
                kv_head = h // (H // K)
                shifted = h >= H - shifted_heads(H)
                for i in range(stop - start):
                    seen = [start + j for j in range(i + 1) if may_attend(i, j, stop - start, pattern, shifted=shifted)]
                    scores = k_BKTD[b, kv_head, seen] @ q_BHTD[b, h, start + i] * scaling
                    out_BTHD[b, start + i, h] = torch.softmax(scores, -1) @ v_BKTD[b, kv_head, seen]
    return out_BTHD
