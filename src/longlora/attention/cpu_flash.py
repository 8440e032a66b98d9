"""Shifted sparse attention on the CPU by torch's flash kernel, with hand-written gradients: nothing is copied twice.

B batch, T tokens, H query heads, K key/value heads, D head dim, N segments, S tokens per segment, X any heads.

The kernel is the one behind `scaled_dot_product_attention`. Called directly it also returns the logarithm of the sum of
exponentials, from which its own backward computes exact gradients; so each piece of the output, and of a gradient, goes
into its place once. Autograd's zero-filled slices and concatenations cost up to a quarter of the time otherwise
(benchmarks/bench_attention.py).

The kernel gives one (segment, key/value head) to a thread, so all segments of a size are one call. Sink tokens stand in
front of each segment. The first segment of a document begins with the sinks anyway; to be as long as the others it gets
the tokens after it, which come last, change nothing before them, and are dropped::

    first segment    0 1 2 3 4 5 6 7 | 8 9         outputs of 8 and 9 dropped
    next segment     0 1 | 8 9 10 11 12 13 14 15   outputs of 0 and 1 dropped
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longlora.attention.masks import WindowMasks
from longlora.attention.pattern import HeadSlice, Pattern, Run, head_slices, pattern_shift, runs

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# With fewer segments than this for one key/value head, the query heads that share it are given to threads one by one.
_FEW_SEGMENTS = 8


def cpu_flash_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    bounds_B: Sequence[Sequence[int]],
    pattern: Pattern,
    *,
    scaling: float,
    sink_logits_H: Tensor | None = None,
) -> Tensor:
    """Like `grouped_attention`, for tensors of one dtype on the CPU, without dropout and soft cap."""
    width, value_width = q_BHTD.shape[-1], v_BKTD.shape[-1]
    if width != value_width:  # the kernel wants one head dim; zeros change neither scores nor the outputs that are kept
        widest = max(width, value_width)
        q_BHTD, k_BKTD, v_BKTD = (F.pad(x, (0, widest - x.shape[-1])) for x in (q_BHTD, k_BKTD, v_BKTD))
    q_BHTD, k_BKTD, v_BKTD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHTD, k_BKTD, v_BKTD))
    slices = head_slices(q_BHTD.shape[1], k_BKTD.shape[1], pattern_shift(pattern))
    pieces = list(_pieces(bounds_B, pattern, slices))
    out_BTHD: Tensor = _PieceAttention.apply(q_BHTD, k_BKTD, v_BKTD, sink_logits_H, pieces, scaling)  # type: ignore[no-untyped-call]
    return out_BTHD[..., :value_width]


@dataclass(frozen=True)
class _Piece:
    """One call of the kernel: `count` segments of `size` tokens, `step` apart, in one slice of heads of one document.

    Positions count from the beginning of the document.
    """

    row: int
    document: int
    heads: HeadSlice
    start: int
    size: int
    step: int
    count: int
    sinks: int
    history: int

    @property
    def first(self) -> int:
        """1 if sinks stand in front of all segments but the first one, which is that of the document."""
        return int(self.sinks > 0 and self.start == 0)

    def of_queries(self, x_BHTD: Tensor) -> Tensor:
        """This slice of heads and document of queries, outputs or their gradients as a view [X, T and more, D]."""
        heads = slice(self.heads.query_start, self.heads.query_start + self.heads.query_heads)
        return x_BHTD[self.row, heads, self.document :]

    def of_keys(self, x_BKTD: Tensor) -> Tensor:
        """The same of keys, values or their gradients."""
        heads = slice(self.heads.kv_start, self.heads.kv_start + self.heads.kv_heads)
        return x_BKTD[self.row, heads, self.document :]

    def segments(self, x_XTD: Tensor, history: int = 0) -> Tensor:
        """The segments as a view to read, [N, X, S + history, D]."""
        stop = self.start + self.step * (self.count - 1) + self.size
        x_XNDS = x_XTD[:, self.start - history : stop].unfold(1, self.size + history, self.step)
        return x_XNDS.permute(1, 0, 3, 2)

    def segments_with_sinks(self, x_XTD: Tensor, history: int = 0) -> Tensor:
        """What the kernel reads, [N, X, sinks + S + history, D]: a view without sinks, a copy with them."""
        x_NXSD = self.segments(x_XTD, history)
        if not self.sinks:
            return x_NXSD
        N, X, S, D = x_NXSD.shape
        padded = x_XTD.new_empty(N, X, self.sinks + S, D)
        padded[self.first :, :, : self.sinks] = x_XTD[:, : self.sinks]
        padded[self.first :, :, self.sinks :] = x_NXSD[self.first :]
        if self.first:
            padded[0] = x_XTD[:, : self.sinks + S]
        return padded

    def segments_with_zeros(self, x_XTD: Tensor) -> Tensor:
        """The same of outputs or their gradients: sinks and dropped tokens have none."""
        x_NXSD = self.segments(x_XTD)
        if not self.sinks:
            return x_NXSD
        padded = F.pad(x_NXSD, (0, 0, self.sinks, 0))
        if self.first:
            padded[0, :, : self.size].copy_(x_NXSD[0])
            padded[0, :, self.size :] = 0.0
        return padded

    def places(self, target_XTD: Tensor, made_NXSD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of `target` to write to, each with what the kernel made for it, without sinks and dropped tokens."""
        # Not through `unfold`: functionalization, thus torch.compile, loses what lies between segments (torch 2.13).
        singles = self.first if self.step == self.size else self.count
        for n in range(singles):
            start, skipped = self.start + n * self.step, 0 if self.first and n == 0 else self.sinks
            yield target_XTD[:, start : start + self.size], made_NXSD[n, :, skipped : skipped + self.size]
        if singles < self.count:
            run_XTD = target_XTD[:, self.start + singles * self.size : self.start + self.count * self.size]
            run_NXSD = run_XTD.unflatten(1, (self.count - singles, self.size)).transpose(0, 1)
            yield run_NXSD, made_NXSD[singles:, :, self.sinks :]


def _pieces(bounds_B: Sequence[Sequence[int]], pattern: Pattern, slices: list[HeadSlice]) -> Iterator[_Piece]:
    for row, bounds in enumerate(bounds_B):
        for document, stop in itertools.pairwise(bounds):
            for heads in slices:
                for run, step in _calls(runs(stop - document, pattern, shifted=heads.shifted)):
                    yield _Piece(row, document, heads, run.start, run.size, step, run.count, run.sinks, run.history)


def _calls(cut: list[Run]) -> list[tuple[Run, int]]:
    """Runs that are one call, with the distance between the starts of their segments.

    The first segment joins the run of its size: the next one without a shift, the last one with it. Blocks with a
    history are a call each: all at once, the gradients of the keys they share would be held once for each block.
    """
    if cut and cut[-1].history:
        starts = [(run, start) for run in cut for start in range(run.start, run.stop, run.size)]
        return [(Run(start, run.size, 1, history=run.history), run.size) for run, start in starts]
    calls = [(run, run.size) for run in cut]
    for place, other in enumerate(cut[1:], 1):
        if cut[0].count == 1 and other.size == cut[0].size:
            spread = other.count == 1 or other.start == cut[0].stop
            if spread:
                joined = Run(0, other.size, other.count + 1, other.sinks)
                return [(joined, other.start), *calls[1:place], *calls[place + 1 :]]
    return calls


class _PieceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink_logits_H: Tensor | None, pieces: list[_Piece], scaling: float
    ) -> Tensor:
        B, H, T, D = q.shape
        out_BTHD = q.new_zeros(B, T, H, D) if _has_gaps(pieces, q) else q.new_empty(B, T, H, D)
        out_BHTD = out_BTHD.transpose(1, 2)
        sums = []
        masks = WindowMasks()
        for piece in pieces:
            queries, keys, values = _inputs(piece, q, k, v)
            mask = masks.get(piece.size, piece.history, q) if piece.history else None
            out_NXSD, sum_NXS = _forward(queries, keys, values, 0.0, mask is None, attn_mask=mask, scale=scaling)
            if sink_logits_H is not None:
                more_NXS = torch.logaddexp(sum_NXS, _logits(piece, sink_logits_H, sum_NXS))
                out_NXSD.mul_((sum_NXS - more_NXS).exp()[..., None])  # one rounding: computed in the dtype of the sums
                sum_NXS = more_NXS
            for place, made in piece.places(piece.of_queries(out_BHTD), out_NXSD):
                place.copy_(made)
            sums.append(sum_NXS)
        ctx.pieces, ctx.scaling = pieces, scaling
        ctx.save_for_backward(q, k, v, sink_logits_H, out_BTHD, *sums)
        return out_BTHD

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink_logits_H, out_BTHD, *sums = ctx.saved_tensors
        out, grad = out_BTHD.transpose(1, 2), grad_outputs[0].transpose(1, 2)
        q_grad = torch.zeros_like(q) if _has_gaps(ctx.pieces, q) else torch.empty_like(q)
        k_grad, v_grad = torch.zeros_like(k), torch.zeros_like(v)
        # Hundreds of pieces of a window layer add to one number: in bfloat16 small ones would vanish.
        summed_in = torch.promote_types(q.dtype, torch.float32)
        logits_grad = None if sink_logits_H is None else torch.zeros_like(sink_logits_H, dtype=summed_in)
        masks = WindowMasks()
        for piece, sum_NXS in zip(ctx.pieces, sums, strict=True):
            mask = masks.get(piece.size, piece.history, q) if piece.history else None
            grad_NXSD, out_NXSD = (piece.segments_with_zeros(piece.of_queries(x)) for x in (grad, out))
            grads = _backward(
                grad_NXSD, *_inputs(piece, q, k, v), out_NXSD, sum_NXS, 0.0, mask is None,
                attn_mask=mask, scale=ctx.scaling,
            )  # fmt: skip
            for place, made in piece.places(piece.of_queries(q_grad), grads[0]):
                place.copy_(made)
            _add_to_keys(piece, k_grad, grads[1])
            _add_to_keys(piece, v_grad, grads[2])
            if logits_grad is not None:
                delta_NXS = (grad_NXSD * out_NXSD).sum(-1, dtype=sum_NXS.dtype)
                share_NXS = (_logits(piece, sink_logits_H, sum_NXS) - sum_NXS).exp()
                first = piece.heads.query_start
                logits_grad[first : first + piece.heads.query_heads] -= (share_NXS * delta_NXS).sum((0, 2))
        if logits_grad is not None:
            logits_grad = logits_grad.to(sink_logits_H.dtype)
        return q_grad, k_grad, v_grad, logits_grad, None, None


def _inputs(piece: _Piece, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel reads. It gives its threads whole pairs of segment and key/value head, and needs enough."""
    keys, values = (piece.segments_with_sinks(piece.of_keys(x), piece.history) for x in (k, v))
    if keys.shape[1] == 1 and keys.shape[0] < _FEW_SEGMENTS:
        keys, values = (x.expand(-1, piece.heads.query_heads, -1, -1) for x in (keys, values))  # a view
    return piece.segments_with_sinks(piece.of_queries(q)), keys, values


def _logits(piece: _Piece, sink_logits_H: Tensor, like: Tensor) -> Tensor:
    first = piece.heads.query_start
    return sink_logits_H[first : first + piece.heads.query_heads, None].to(like.dtype)


def _add_to_keys(piece: _Piece, total_BKTD: Tensor, grad_NXSD: Tensor) -> None:
    """Add the gradient of what a piece read as keys or values: its own tokens, its history and the sinks."""
    total_XTD = piece.of_keys(total_BKTD)
    if grad_NXSD.shape[1] != len(total_XTD):  # see _inputs
        grad_NXSD = grad_NXSD.sum(1, keepdim=True)
    if piece.history:
        total_XTD[:, piece.start - piece.history : piece.start + piece.size].add_(grad_NXSD[0])
        return
    for place, made in piece.places(total_XTD, grad_NXSD):
        place.add_(made)
    if piece.sinks:
        total_XTD[:, : piece.sinks].add_(grad_NXSD[piece.first :, :, : piece.sinks].sum(0))


def _has_gaps(pieces: list[_Piece], x_BXTD: Tensor) -> bool:
    """Whether some positions are padding, which no piece covers."""
    covered = sum(piece.count * piece.size for piece in pieces if piece.heads.query_start == 0)
    return covered < x_BXTD.shape[0] * x_BXTD.shape[2]
