"""Shifted sparse attention on any device: ordinary causal attention over strided views of the groups.

B batch, T tokens, H query heads, K key/value heads, D head dim, N groups, S tokens per group.

Each group becomes one entry of the batch of `scaled_dot_product_attention`; keys and values are never repeated for
grouped queries, and no T x T mask is built, so that memory is O(T). Where no kernel of torch reads them in place for
all query heads that share them, there is one call for each of these heads (`_scaled_dot_product`). Sink tokens need no
mask either: they are put in front of the queries, keys and values of each group, attention stays causal, and their own
output rows are dropped. They are earlier than everything in the group, so causality is untouched. Without sinks groups
are views, with them one copy.

Tensors are cut by `split` and slices are only cut from short ones: the backward of a split is one concatenation, that
of each slice a zero tensor as large as what it was cut from.

On the CPU the same is done by `cpu_flash.py`, which calls the kernel itself and copies less.

torch.compile traces all of it into one graph (tests/attention/test_grouped.py), for one packing: document bounds are
Python integers. So in a compiled model attention runs between the graphs.

UNVERIFIED ON HARDWARE: which kernels torch picks on CUDA is read from its sources.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from longlora.attention.cpu_flash import cpu_flash_attention
from longlora.attention.masks import WindowMasks
from longlora.attention.parts import join, split
from longlora.attention.pattern import HeadSlice, Pattern, Run, check_bounds, head_slices, pattern_shift, runs
from longlora.attention.softcap import soft_capped_attention


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
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2); see `softcap.py`.
        sink_logits_H: one more score for each head, never capped, whose weight goes nowhere (gpt-oss).

    Returns:
        Output [B, T, H, D of the values]; 0 at padding.

    Raises:
        ModelError: the bounds are not increasing or leave the sequence.
    """
    D, device = q_BHTD.shape[-1], q_BHTD.device.type
    for bounds in bounds_B:
        check_bounds(bounds, q_BHTD.shape[2])
    if torch.is_autocast_enabled(device):  # as autocast does, but also where kernels and buffers are below its level
        dtype = torch.get_autocast_dtype(device)
        q_BHTD, k_BKTD, v_BKTD = q_BHTD.to(dtype), k_BKTD.to(dtype), v_BKTD.to(dtype)
    scaling = D**-0.5 if scaling is None else scaling
    if device == "cpu" and not dropout and softcap is None:
        return cpu_flash_attention(
            q_BHTD, k_BKTD, v_BKTD, bounds_B, pattern, scaling=scaling, sink_logits_H=sink_logits_H
        )
    return portable_attention(
        q_BHTD, k_BKTD, v_BKTD, bounds_B, pattern, scaling=scaling, dropout=dropout, softcap=softcap,
        sink_logits_H=sink_logits_H,
    )  # fmt: skip


def portable_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    bounds_B: Sequence[Sequence[int]],
    pattern: Pattern,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sink_logits_H: Tensor | None = None,
) -> Tensor:
    """`grouped_attention` of tensors of one dtype by public operations of torch, on any device."""
    B, H, T, _ = q_BHTD.shape
    if sink_logits_H is not None and softcap is not None:
        q_BHTD = _with_number(q_BHTD, sink_logits_H)
    elif sink_logits_H is not None:
        # The first of eight more numbers makes the score of a null key: the sink logit in queries, 1 in the null key,
        # 0 in every other key. Eight keep rows aligned.
        q_BHTD = F.pad(_with_number(q_BHTD, sink_logits_H / scaling), (0, 7))
        k_BKTD = F.pad(k_BKTD, (0, 8))
    null_key = sink_logits_H is not None and softcap is None
    kernel = _Kernel(scaling, dropout, softcap, null_key, WindowMasks())
    slices = head_slices(H, k_BKTD.shape[1], pattern_shift(pattern))
    outputs = []
    for bounds, *row in zip(bounds_B, *(split(x, [1] * B, dim=0) for x in (q_BHTD, k_BKTD, v_BKTD)), strict=True):
        sizes = [stop - start for start, stop in itertools.pairwise(bounds)]
        padding = T - bounds[-1]
        documents = zip(*(split(x, [*sizes, padding] if padding else sizes, dim=2) for x in row), strict=True)
        outputs += [_document(q, k, v, slices, pattern, kernel) for q, k, v in itertools.islice(documents, len(sizes))]
        if padding:
            outputs.append(v_BKTD.new_zeros(1, padding, H, v_BKTD.shape[-1]))
    return join(outputs, dim=1).view(B, T, H, -1)


def _with_number(q_BHTD: Tensor, number_H: Tensor) -> Tensor:
    """Queries with one more number, that of their head."""
    return torch.cat([q_BHTD, number_H.to(q_BHTD.dtype)[:, None, None].expand(*q_BHTD.shape[:-1], 1)], dim=-1)


@dataclass(frozen=True)
class _Kernel:
    """Attention inside segments: q [N, H, S, D], k and v [N, K, S', D] -> [N, H, S, D of the values]."""

    scaling: float
    dropout: float
    softcap: float | None
    null_key: bool
    """A key without a value stands before all others, for the learned sink."""
    masks: WindowMasks

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Causal if `mask` (0 or -inf, [S, S']) is None."""
        if self.softcap is not None:
            return soft_capped_attention(
                q, k, v, mask, scaling=self.scaling, softcap=self.softcap, dropout=self.dropout
            )
        return _scaled_dot_product(q, k, v, mask, self.scaling, self.dropout)


def _scaled_dot_product(
    q_NHSD: Tensor, k_NKSD: Tensor, v_NKSD: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """In one call, or in one for each of the R query heads that share a key/value head: heads h with the same h % R."""
    R = q_NHSD.shape[1] // k_NKSD.shape[1]
    attention = partial(
        F.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None, scale=scaling, dropout_p=dropout
    )
    if R == 1 or _takes_grouped_queries(q_NHSD, k_NKSD, v_NKSD, mask, dropout):
        return attention(q_NHSD, k_NKSD, v_NKSD, enable_gqa=R > 1)
    q_NKRSD = q_NHSD.unflatten(1, (-1, R))
    return torch.stack([attention(q_NKSD, k_NKSD, v_NKSD) for q_NKSD in q_NKRSD.unbind(2)], dim=2).flatten(1, 2)


def _takes_grouped_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether torch has a kernel for these that reads keys and values once for all query heads that share them.

    On CUDA flash does, which takes no mask (windows), no float32, no T4 or V100. The memory-efficient kernel takes all
    these, but as many key heads as query heads: with `enable_gqa` torch would fall to the plain formula, which repeats
    keys and values and keeps all scores.
    """
    if q.device.type != "cuda":
        return True
    if torch.compiler.is_compiling():  # which can't trace torch's answer; head by head is right everywhere
        return False
    return can_use_flash_attention(SDPAParams(q, k, v, mask, dropout, mask is None, True))


def _document(q: Tensor, k: Tensor, v: Tensor, slices: list[HeadSlice], pattern: Pattern, kernel: _Kernel) -> Tensor:
    """One document: q [1, H, T, D], k and v [1, K, T, D] -> [1, T, H, D]."""
    if len({run for piece in slices for run in runs(q.shape[2], pattern, shifted=piece.shifted)}) == 1:
        slices = head_slices(q.shape[1], k.shape[1], "none")  # one segment in every head: no need to tell them apart
    q_slices = split(q, [piece.query_heads for piece in slices], dim=1)
    k_heads, v_heads = _KVHeads(k, slices), _KVHeads(v, slices)
    outputs = []
    for piece, q_piece in zip(slices, q_slices, strict=True):
        cut = runs(q.shape[2], pattern, shifted=piece.shifted)
        outputs.append(_runs(q_piece, k_heads[piece], v_heads[piece], cut, kernel))
    return join(outputs, dim=2)


class _KVHeads:
    """Key or value heads by slice; neighbouring slices that share a head get the same view of it."""

    def __init__(self, x_1KTD: Tensor, slices: list[HeadSlice]) -> None:
        widths = {piece.kv_start: piece.kv_heads for piece in slices}
        starts = sorted(widths)
        self._views = dict(zip(starts, split(x_1KTD, [widths[start] for start in starts], dim=1), strict=True))

    def __getitem__(self, piece: HeadSlice) -> Tensor:
        return self._views[piece.kv_start]


def _runs(q: Tensor, k: Tensor, v: Tensor, cut: list[Run], kernel: _Kernel) -> Tensor:
    """All segments of one slice of heads -> [1, T, H, D]."""
    sizes = [run.stop - run.start for run in cut]
    qkv_runs = [split(x, sizes, dim=2) for x in (q, k, v)]
    outputs: list[Tensor] = []
    for place, run in enumerate(cut):
        if run.history:
            outputs += _window_run(qkv_runs[0][place], k, v, run, kernel)
            continue
        fronts = [_sinks(x_runs, run.sinks) for x_runs in qkv_runs]
        if kernel.null_key:
            fronts = [torch.cat([null, front], dim=2) for null, front in zip(_null_rows(q, k, v), fronts, strict=True)]
        groups = [_groups(x_runs[place], run, front) for x_runs, front in zip(qkv_runs, fronts, strict=True)]
        out_NSHD = kernel(*groups)[:, :, fronts[0].shape[2] :].transpose(1, 2)
        outputs.append(out_NSHD.reshape(1, run.count * run.size, *out_NSHD.shape[2:]))
    return join(outputs, dim=1)


def _sinks(x_runs: tuple[Tensor, ...], sinks: int) -> Tensor:
    """The first tokens of a document, [1, H, S, D]; only the first two runs, both short, can hold some of them."""
    if not sinks:
        return x_runs[0].detach()[:, :, :0]
    begin = x_runs[0] if x_runs[0].shape[2] >= sinks else torch.cat(x_runs[:2], dim=2)
    return begin[:, :, :sinks]


def _groups(x_1HTD: Tensor, run: Run, front_1HSD: Tensor) -> Tensor:
    """[1, H, N*S, D] -> a view [N, H, S, D], or a copy with `front` before each group."""
    x_NHSD = x_1HTD.squeeze(0).unflatten(1, (run.count, run.size)).transpose(0, 1)
    if not front_1HSD.shape[2]:
        return x_NHSD
    return torch.cat([front_1HSD.expand(run.count, -1, -1, -1), x_NHSD], dim=2)


def _window_run(q_run: Tensor, k: Tensor, v: Tensor, run: Run, kernel: _Kernel) -> Iterator[Tensor]:
    """Blocks of queries of a window layer, with the keys that their windows reach back to -> [1, T, H, D] in parts.

    Blocks overlap in most of their keys, so segments of about a window are cut first, whose keys, window and segment,
    are two windows. Then the first blocks of all segments are one call, the second blocks another, and so on: the
    gradients of a call's keys and values are at most about twice as large as all keys and values.
    """
    blocks = min(run.count, -(-run.history // run.size))
    whole, rest = divmod(run.count, blocks)
    parts = [Run(run.start, blocks * run.size, whole, history=run.history)]
    if rest:
        parts.append(Run(parts[0].stop, rest * run.size, 1, history=run.history))
    for part, q_part in zip(parts, split(q_run, [part.stop - part.start for part in parts], dim=2), strict=True):
        yield _window_segments(q_part, k, v, part, run.size, kernel)


def _window_segments(q_part: Tensor, k: Tensor, v: Tensor, part: Run, size: int, kernel: _Kernel) -> Tensor:
    """Segments of several blocks of `size` queries -> [1, T, H, D]."""
    mask = kernel.masks.get(size, part.history, q_part)
    q_NHSD = q_part.squeeze(0).unflatten(1, (part.count, part.size)).transpose(0, 1)
    reach = slice(part.start - part.history, part.stop)
    width = part.size + part.history
    k_NKSD, v_NKSD = (x[:, :, reach].squeeze(0).unfold(1, width, part.size).permute(1, 0, 3, 2) for x in (k, v))
    if kernel.null_key:
        _, k_null, v_null = (x.expand(part.count, -1, -1, -1) for x in _null_rows(q_part, k, v))
        mask = F.pad(mask, (1, 0))
    outputs = []
    starts = range(0, part.size, size)
    for start, q_rows in zip(starts, split(q_NHSD, [size] * len(starts), dim=2), strict=True):
        k_rows, v_rows = (x[:, :, start : start + size + part.history] for x in (k_NKSD, v_NKSD))
        if kernel.null_key:
            k_rows, v_rows = torch.cat([k_null, k_rows], dim=2), torch.cat([v_null, v_rows], dim=2)
        outputs.append(kernel(q_rows, k_rows, v_rows, mask).transpose(1, 2))
    return join(outputs, dim=1).flatten(0, 1)[None]


def _null_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One row of queries, of keys and of values that stand for the learned sink."""
    k_null = torch.zeros_like(k[:, :, :1])
    k_null[..., -8] = 1.0
    return torch.zeros_like(q[:, :, :1]), k_null, torch.zeros_like(v[:, :, :1])
