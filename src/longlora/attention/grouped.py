"""Shifted sparse attention on any device: ordinary causal attention over strided views of the groups.

B batch, T tokens, H query heads, K key/value heads, D head dim, N groups, S tokens per group.

Each group becomes one entry of the batch of `scaled_dot_product_attention`; keys and values are never repeated for
grouped queries, and no T x T mask is built, so that memory is O(T). Sink tokens need no mask either: they are put in
front of the queries, keys and values of each group, attention stays causal, and their own output rows are dropped. They
are earlier than everything in the group, so causality is untouched. Without sinks groups are views, with them one copy.

On the CPU the same is done by `cpu_flash.py`, which calls the kernel itself and copies less.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longlora.attention.cpu_flash import cpu_flash_attention
from longlora.attention.masks import causal_mask, window_mask
from longlora.attention.pattern import HeadSlice, Pattern, Run, check_bounds, head_slices, pattern_shift, runs
from longlora.errors import ModelError


def grouped_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    bounds_B: Sequence[Sequence[int]],
    pattern: Pattern,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sink_logits_H: Tensor | None = None,
) -> Tensor:
    """Attention by `pattern` of queries, keys and values to which RoPE was already applied.

    Args:
        q_BHTD: queries, any float dtype. H must be a multiple of K.
        k_BKTD, v_BKTD: keys and values of the same dtype; the head dim of the values may differ.
        bounds_B: for each row the document bounds, strictly increasing from 0; positions after the last are padding.
        scaling: factor of the scores; 1/sqrt(D) if None.
        dropout: probability of dropping an attention weight.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2); holds the scores of one group at a time.
        sink_logits_H: one more score for each head, whose weight goes nowhere (gpt-oss).

    Returns:
        Output [B, T, H, D of the values]; 0 at padding.

    Raises:
        ModelError: the bounds are not increasing or leave the sequence, or soft cap and sink logits come together.
    """
    B, H, T, D = q_BHTD.shape
    for bounds in bounds_B:
        check_bounds(bounds, T)
    if q_BHTD.device.type == "cpu" and not dropout and softcap is None:
        return cpu_flash_attention(
            q_BHTD, k_BKTD, v_BKTD, bounds_B, pattern, scaling=scaling, sink_logits_H=sink_logits_H
        )
    scaling = D**-0.5 if scaling is None else scaling
    if sink_logits_H is not None:
        if softcap is not None:
            raise ModelError(
                "soft-capped scores with learned sinks: not computed here; train with attention.pattern=full"
            )
        q_BHTD, k_BKTD = _with_sink_score(q_BHTD, k_BKTD, sink_logits_H / scaling)
    kernel = _Kernel(scaling, dropout, softcap, null_key=sink_logits_H is not None)
    slices = head_slices(H, k_BKTD.shape[1], pattern_shift(pattern))
    rows = []
    for b in range(B):
        sizes = [stop - start for start, stop in itertools.pairwise(bounds_B[b])]
        padding = T - sum(sizes)
        # `split` and not slicing: its backward is one concatenation, that of slices a full-size zero tensor each.
        parts = zip(*(x[b : b + 1].split([*sizes, padding], dim=2) for x in (q_BHTD, k_BKTD, v_BKTD)), strict=True)
        documents = [_document(q, k, v, slices, pattern, kernel) for q, k, v in itertools.islice(parts, len(sizes))]
        if padding:
            documents.append(v_BKTD.new_zeros(1, padding, H, v_BKTD.shape[-1]))
        rows.append(_join(documents, dim=1))
    return _join(rows, dim=0)


@dataclass(frozen=True)
class _Kernel:
    """Attention inside groups: q [N, H, S, D], k and v [N, K, S', D] -> [N, H, S, D of the values]."""

    scaling: float
    dropout: float
    softcap: float | None
    null_key: bool
    """A key without a value stands before all others: see `_with_sink_score`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Causal if `mask` (0 or -inf, [S, S']) is None."""
        if self.softcap is not None:
            # One group at a time, recomputed in backward: its scores are all that is ever held.
            groups = zip(q.split(1), k.split(1), v.split(1), strict=True)
            return torch.cat([checkpoint(self._soft_capped, *group, mask, use_reentrant=False) for group in groups])
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scaling, dropout_p=self.dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip

    def _soft_capped(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert self.softcap is not None
        q_NKRSD = q.unflatten(1, (k.shape[1], -1))
        scores = q_NKRSD @ k[:, :, None].transpose(-1, -2) * self.scaling
        scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is None:
            mask = causal_mask(q.shape[2], scores)
        weights = (scores + mask).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
        return (F.dropout(weights, self.dropout) @ v[:, :, None]).flatten(1, 2)


def _with_sink_score(q_BHTD: Tensor, k_BKTD: Tensor, logits_H: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys with eight more numbers a head, of which the first makes the score of the null key.

    A query carries its head's sink logit there, the null key 1 and every other key 0. (Eight keep rows aligned.)
    """
    B, H, T, _ = q_BHTD.shape
    logits = logits_H.to(q_BHTD.dtype)[None, :, None, None].expand(B, H, T, 1)
    return torch.cat([q_BHTD, F.pad(logits, (0, 7))], dim=-1), F.pad(k_BKTD, (0, 8))


def _document(q: Tensor, k: Tensor, v: Tensor, slices: list[HeadSlice], pattern: Pattern, kernel: _Kernel) -> Tensor:
    """One document: q [1, H, T, D], k and v [1, K, T, D] -> [1, T, H, D]."""
    if len({run for piece in slices for run in runs(q.shape[2], pattern, shifted=piece.shifted)}) == 1:
        slices = head_slices(q.shape[1], k.shape[1], "none")  # one segment in every head: no need to tell them apart
    q_slices = q.split([piece.query_heads for piece in slices], dim=1)
    k_heads, v_heads = _KVHeads(k, slices), _KVHeads(v, slices)
    outputs = []
    for piece, q_piece in zip(slices, q_slices, strict=True):
        cut = runs(q.shape[2], pattern, shifted=piece.shifted)
        outputs.append(_runs(q_piece, k_heads[piece], v_heads[piece], cut, kernel))
    return _join(outputs, dim=2)


class _KVHeads:
    """Key or value heads by slice; neighbouring slices that share a head get the same view of it."""

    def __init__(self, x_1KTD: Tensor, slices: list[HeadSlice]) -> None:
        widths = {piece.kv_start: piece.kv_heads for piece in slices}
        starts = sorted(widths)
        self._views = dict(zip(starts, x_1KTD.split([widths[start] for start in starts], dim=1), strict=True))

    def __getitem__(self, piece: HeadSlice) -> Tensor:
        return self._views[piece.kv_start]


def _runs(q: Tensor, k: Tensor, v: Tensor, cut: list[Run], kernel: _Kernel) -> Tensor:
    """All segments of one slice of heads -> [1, T, H, D]."""
    sizes = [run.stop - run.start for run in cut]
    outputs = []
    for run, q_run, k_run, v_run in zip(cut, q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True):
        if run.history:
            outputs.append(_block_with_history(q_run, k, v, run, kernel))
            continue
        first = _null_rows(q, k, v) if kernel.null_key else (q[:, :, :0], k[:, :, :0], v[:, :, :0])
        in_front = [torch.cat([null, x[:, :, : run.sinks]], 2) for null, x in zip(first, (q, k, v), strict=True)]
        groups = [_groups(x, run, front) for x, front in zip((q_run, k_run, v_run), in_front, strict=True)]
        out_NSHD = kernel(*groups)[:, :, in_front[0].shape[2] :].transpose(1, 2)
        outputs.append(out_NSHD.reshape(1, run.count * run.size, *out_NSHD.shape[2:]))
    return _join(outputs, dim=1)


def _groups(x_1HTD: Tensor, run: Run, front_1HSD: Tensor) -> Tensor:
    """[1, H, N*S, D] -> a view [N, H, S, D], or a copy with `front` before each group."""
    x_NHSD = x_1HTD.squeeze(0).unflatten(1, (run.count, run.size)).transpose(0, 1)
    if not front_1HSD.shape[2]:
        return x_NHSD
    return torch.cat([front_1HSD.expand(run.count, -1, -1, -1), x_NHSD], dim=2)


def _block_with_history(q_run: Tensor, k: Tensor, v: Tensor, run: Run, kernel: _Kernel) -> Tensor:
    """One block of queries of a window layer, with the keys that its window reaches back to -> [1, S, H, D]."""
    k_run, v_run = (x[:, :, run.start - run.history : run.stop] for x in (k, v))
    mask = window_mask(run.size, run.history, q_run)
    if kernel.null_key:
        _, k_null, v_null = _null_rows(q_run, k, v)
        k_run, v_run = torch.cat([k_null, k_run], 2), torch.cat([v_null, v_run], 2)
        mask = F.pad(mask, (1, 0))
    return kernel(q_run, k_run, v_run, mask).transpose(1, 2)


def _null_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One row of queries, of keys and of values that stand for the learned sink."""
    k_null = torch.zeros_like(k[:, :, :1])
    k_null[..., -8] = 1.0
    return torch.zeros_like(q[:, :, :1]), k_null, torch.zeros_like(v[:, :, :1])


def _join(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
