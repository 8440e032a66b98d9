"""Shifted sparse attention on any device: ordinary causal attention over strided views of the groups.

B batch, T tokens, H query heads, K key/value heads, D head dim, N groups, S tokens per group.

Each group becomes one entry of the batch of `scaled_dot_product_attention`; keys and values are never repeated for
grouped queries, and no mask is built, so that memory is O(T). Sink tokens need no mask either: they are put in front
of the queries, keys and values of each group, attention stays causal, and their own output rows are dropped. They are
earlier than everything in the group, so causality is untouched. Without sinks groups are views, with them one copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longlora.attention.pattern import HeadSlice, Run, S2Pattern, check_bounds, head_slices, runs


def grouped_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    bounds_B: Sequence[Sequence[int]],
    pattern: S2Pattern,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Shifted sparse attention of queries, keys and values to which RoPE was already applied.

    Args:
        q_BHTD: queries, any float dtype. H must be a multiple of K.
        k_BKTD, v_BKTD: keys and values of the same dtype.
        bounds_B: for each row the document bounds, strictly increasing from 0; positions after the last are padding.
        scaling: factor of the scores; 1/sqrt(D) if None.
        dropout: probability of dropping an attention weight.

    Returns:
        Output [B, T, H, D]; 0 at padding.

    Raises:
        ModelError: the bounds are not increasing or leave the sequence.
    """
    B, H, T, _ = q_BHTD.shape
    K = k_BKTD.shape[1]
    slices = head_slices(H, K)
    rows = []
    for b in range(B):
        check_bounds(bounds_B[b], T)
        sizes = [stop - start for start, stop in itertools.pairwise(bounds_B[b])]
        padding = T - sum(sizes)
        # `split` and not slicing: its backward is one concatenation, that of slices a full-size zero tensor each.
        parts = zip(
            q_BHTD[b : b + 1].split([*sizes, padding], dim=2),
            k_BKTD[b : b + 1].split([*sizes, padding], dim=2),
            v_BKTD[b : b + 1].split([*sizes, padding], dim=2),
            strict=True,
        )
        documents = [
            _document(q, k, v, slices, pattern, scaling, dropout) for q, k, v in itertools.islice(parts, len(sizes))
        ]
        if padding:
            documents.append(v_BKTD.new_zeros(1, padding, H, v_BKTD.shape[-1]))
        rows.append(_join(documents, dim=1))
    return _join(rows, dim=0)


def _document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slices: list[HeadSlice],
    pattern: S2Pattern,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """One document: q [1, H, T, D], k and v [1, K, T, D] -> [1, T, H, D]."""
    if q.shape[2] <= pattern.group_size:  # full attention in every head: no need to tell shifted heads apart
        return _causal(q, k, v, scaling, dropout).transpose(1, 2)
    q_slices = q.split([piece.query_heads for piece in slices], dim=1)
    k_heads, v_heads = _KVHeads(k, slices), _KVHeads(v, slices)
    outputs = []
    for piece, q_piece in zip(slices, q_slices, strict=True):
        cut = runs(q.shape[2], pattern, shifted=piece.shifted)
        outputs.append(_runs(q_piece, k_heads[piece], v_heads[piece], cut, scaling, dropout))
    return _join(outputs, dim=2)


class _KVHeads:
    """Key or value heads by slice; neighbouring slices that share a head get the same view of it."""

    def __init__(self, x_1KTD: Tensor, slices: list[HeadSlice]) -> None:
        widths = {piece.kv_start: piece.kv_heads for piece in slices}
        starts = sorted(widths)
        self._views = dict(zip(starts, x_1KTD.split([widths[start] for start in starts], dim=1), strict=True))

    def __getitem__(self, piece: HeadSlice) -> Tensor:
        return self._views[piece.kv_start]


def _runs(q: Tensor, k: Tensor, v: Tensor, cut: list[Run], scaling: float | None, dropout: float) -> Tensor:
    """All segments of one slice of heads -> [1, T, H, D]."""
    sizes = [run.stop - run.start for run in cut]
    sinks = max(run.sinks for run in cut)
    q_sink, k_sink, v_sink = (x[:, :, :sinks] for x in (q, k, v))
    outputs = []
    for run, q_run, k_run, v_run in zip(cut, q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True):
        out_NHSD = _causal(
            _groups(q_run, run, q_sink), _groups(k_run, run, k_sink), _groups(v_run, run, v_sink), scaling, dropout
        )
        out_NSHD = out_NHSD[:, :, run.sinks :].transpose(1, 2)
        outputs.append(out_NSHD.reshape(1, run.count * run.size, *out_NSHD.shape[2:]))
    return _join(outputs, dim=1)


def _groups(x_1HTD: Tensor, run: Run, sink_1HSD: Tensor) -> Tensor:
    """[1, H, N*S, D] -> a view [N, H, S, D], or a copy with the sink tokens in front of each group."""
    x_NHSD = x_1HTD[0].unflatten(1, (run.count, run.size)).transpose(0, 1)
    if not run.sinks:
        return x_NHSD
    return torch.cat([sink_1HSD[:, :, : run.sinks].expand(run.count, -1, -1, -1), x_NHSD], dim=2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )


def _join(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
