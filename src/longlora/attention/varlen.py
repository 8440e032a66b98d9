"""Shifted sparse attention on CUDA by variable-length flash kernels: every segment is one sequence of one call.

B batch, T tokens, R = B*T rows of the flattened batch, H query heads, K key/value heads, D head dim; h and k heads of
a slice, N segments, Q rows of queries (those that are not padding), Y rows of keys, copies of sink tokens included.

The kernel takes separate lengths for queries and keys and aligns its causal mask to the bottom right, so the sink
tokens of a document stand in front of the keys of its segments alone, without dummy queries. Without sinks and padding
nothing is copied; keys and values are never repeated for grouped queries. What depends on document bounds is in the
plan, which all layers with the same pattern share.

UNVERIFIED ON HARDWARE: `_kernel` has not run on a GPU yet. The CPU tests check the index against the definition of the
pattern and put an emulation of the kernel's contract in its place; tests/attention/test_backends_gpu.py awaits a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longlora.attention.pattern import HeadSlice, Pattern, S2Pattern, check_bounds, head_slices, pattern_shift, runs
from longlora.errors import ModelError

# What the flash kernels take: head dims that are multiples of 8, up to 256.
_HEAD_DIM_STEP, _HEAD_DIM_LIMIT = 8, 256
_NO_WINDOW = (-1, 0)


@dataclass(frozen=True, eq=False)
class SinkCopies:
    """Where the copies of sink tokens are among the keys of a `VarlenIndex`: only their rows occur more than once."""

    own_Q: Tensor
    """For each query row the place of its own key."""
    places: Tensor
    """The places of the copies."""
    rows: Tensor
    """The rows of the flattened batch that were copied, each once."""
    row_of_place: Tensor
    """For each of `places` the position of its row in `rows`."""


@dataclass(frozen=True, eq=False)
class VarlenIndex:
    """One grid of a whole batch: the segments, and the rows of the flattened batch that the kernel gets."""

    cu_seqlens_q: Tensor
    """int32 [N + 1]: segment n has the queries from cu_seqlens_q[n] to cu_seqlens_q[n + 1]."""
    cu_seqlens_k: Tensor
    """int32 [N + 1], of the keys. In a segment of q queries and k keys, query i sees key j if j <= i + k - q."""
    max_q: int
    max_k: int
    window: tuple[int, int]
    """How many keys before and after itself a query sees; -1 is no limit."""
    query_rows: Tensor | None
    """int64 [Q], the rows that are not padding; None where that is all of them."""
    key_rows: Tensor | None
    """int64 [Y], the rows of the keys in the order of the segments; None where that is all rows as they are."""
    sinks: SinkCopies | None

    def to(self, device: torch.device | str) -> VarlenIndex:
        fields = _moved(vars(self), device)
        if self.sinks is not None:
            fields["sinks"] = SinkCopies(**_moved(vars(self.sinks), device))
        return VarlenIndex(**fields)


@dataclass(frozen=True, eq=False)
class VarlenPlan:
    """What `varlen_attention` has to know about a batch and a pattern; made once and used by every layer."""

    batch: int
    tokens: int
    query_heads: int
    kv_heads: int
    calls: tuple[tuple[HeadSlice, VarlenIndex], ...]
    """One call of the kernel each, in the order of the query heads; slices on one grid share the index."""
    flash: Callable[..., Any] | None
    """`flash_attn_varlen_func` of a flash-attn build; None for torch's own kernel."""


def varlen_plan(
    bounds_B: Sequence[Sequence[int]],
    tokens: int,
    query_heads: int,
    kv_heads: int,
    pattern: Pattern,
    device: torch.device | str,
    *,
    implementation: str | None = None,
) -> VarlenPlan:
    """Plan the attention of one batch for all layers with this pattern.

    Args:
        bounds_B: for each row the document bounds, strictly increasing from 0; positions after the last are padding.
        tokens: length of the rows, padding included.
        query_heads, kv_heads: of a layer; the first must be a multiple of the second.
        implementation: None for torch's own kernel, else a name under which transformers finds a flash-attn build:
            "flash_attention_2", "flash_attention_3", or a repository of the kernels hub.

    Raises:
        ModelError: the bounds are not increasing or leave the sequence, or `implementation` cannot be loaded.
    """
    shift = pattern_shift(pattern)
    if isinstance(pattern, S2Pattern) and _longest_document(bounds_B) <= pattern.group_size:
        shift = "none"  # both grids are the same, so all heads go into one call
    slices = head_slices(query_heads, kv_heads, shift)
    grids = {
        shifted: varlen_index(bounds_B, tokens, pattern, shifted=shifted).to(device)
        for shifted in {piece.shifted for piece in slices}
    }
    calls = tuple((piece, grids[piece.shifted]) for piece in slices)
    flash = None if implementation is None else _load_flash(implementation)
    return VarlenPlan(len(bounds_B), tokens, query_heads, kv_heads, calls, flash)


def varlen_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, plan: VarlenPlan, *, scaling: float | None = None
) -> Tensor:
    """Attention as planned, of queries, keys and values to which RoPE was already applied.

    Args:
        q_BHTD, k_BKTD, v_BKTD: bfloat16 or float16 on CUDA, or float32 under autocast, which casts them; the head dim
            of the values may differ.
        scaling: factor of the scores; 1/sqrt(D) if None.

    Returns:
        Output [B, T, H, D of the values]; 0 at padding.

    Raises:
        ModelError: the tensors do not fit the plan, or the kernel does not take them.
    """
    B, H, T, D = q_BHTD.shape
    given, planned = (B, T, H, k_BKTD.shape[1]), (plan.batch, plan.tokens, plan.query_heads, plan.kv_heads)
    if given != planned:
        raise ModelError(f"rows, tokens, query and key heads are {given}, planned were {planned}: plan every batch")
    value_width = v_BKTD.shape[-1]
    scaling = D**-0.5 if scaling is None else scaling
    pieces = [piece for piece, _ in plan.calls]
    query_rows = plan.calls[0][1].query_rows
    if query_rows is not None and not len(query_rows):
        return v_BKTD.new_zeros(B, T, H, value_width)
    q_RHD, k_RKD, v_RKD = _flat_rows(q_BHTD, k_BKTD, v_BKTD)
    # `split` and not slicing: its backward is one concatenation, that of slices a full-size zero tensor each.
    q_pieces = q_RHD.split([piece.query_heads for piece in pieces], dim=1)
    k_heads, v_heads = _kv_views(k_RKD, pieces), _kv_views(v_RKD, pieces)
    outputs = []
    for (piece, index), q_RhD in zip(plan.calls, q_pieces, strict=True):
        q_QhD = q_RhD if index.query_rows is None else q_RhD.index_select(0, index.query_rows)
        k_YkD, v_YkD = _key_rows(k_heads[piece.kv_start], index), _key_rows(v_heads[piece.kv_start], index)
        outputs.append(_kernel(q_QhD, k_YkD, v_YkD, index, scaling, plan.flash)[..., :value_width])
    out_RHD = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    if query_rows is not None:
        out_RHD = out_RHD.new_zeros(B * T, H, value_width).index_copy(0, query_rows, out_RHD)
    return out_RHD.unflatten(0, (B, T))


def varlen_index(bounds_B: Sequence[Sequence[int]], tokens: int, pattern: Pattern, *, shifted: bool) -> VarlenIndex:
    """The index of one grid, on the CPU. The cuts between documents and those between groups are the same to it.

    Raises:
        ModelError: the bounds are not increasing or leave the sequence.
    """
    document_N, start_N, size_N, sinks_N = _segments(bounds_B, tokens, pattern, shifted)
    keys_N = sinks_N + size_N
    query_rows = key_rows = _ranges(start_N, size_N)
    sinks = None
    if sinks_N.any():
        # Of each segment the sink tokens, then its own: two ranges of rows.
        key_rows = _ranges(_interleave(document_N, start_N), _interleave(sinks_N, size_N))
        first_key_N = keys_N.cumsum(0) - keys_N
        places = _ranges(first_key_N, sinks_N)
        rows, row_of_place = key_rows[places].unique(return_inverse=True)
        sinks = SinkCopies(_ranges(first_key_N + sinks_N, size_N), places, rows, row_of_place)
    all_rows = len(query_rows) == len(bounds_B) * tokens
    max_k = max(keys_N.tolist(), default=0)
    return VarlenIndex(
        cu_seqlens_q=_cumulative(size_N),
        cu_seqlens_k=_cumulative(keys_N),
        max_q=max(size_N.tolist(), default=0),
        max_k=max_k,
        window=_NO_WINDOW if isinstance(pattern, S2Pattern) or pattern.size >= max_k else (pattern.size - 1, 0),
        query_rows=None if all_rows else query_rows,
        key_rows=None if all_rows and sinks is None else key_rows,
        sinks=sinks,
    )


def _kernel(
    q_QhD: Tensor, k_YkD: Tensor, v_YkD: Tensor, index: VarlenIndex, scaling: float, flash: Callable[..., Any] | None
) -> Tensor:
    """One call for all segments of one slice of heads -> [Q, h, D]. The tests put an emulation here."""
    _check_tensors(q_QhD, k_YkD, v_YkD)
    result: Any
    if flash is None:
        from torch.nn.attention.varlen import varlen_attn

        result = varlen_attn(
            q_QhD, k_YkD, v_YkD, index.cu_seqlens_q, index.cu_seqlens_k, index.max_q, index.max_k,
            scale=scaling, window_size=index.window, enable_gqa=True,
        )  # fmt: skip
    else:
        window = {} if index.window == _NO_WINDOW else {"window_size": index.window}
        result = flash(
            q_QhD, k_YkD, v_YkD, cu_seqlens_q=index.cu_seqlens_q, cu_seqlens_k=index.cu_seqlens_k,
            max_seqlen_q=index.max_q, max_seqlen_k=index.max_k, softmax_scale=scaling, causal=True, **window,
        )  # fmt: skip
    return result[0] if isinstance(result, tuple) else result  # some builds return the logsumexp as well


def _check_tensors(*tensors: Tensor) -> None:
    device, dtypes, width = tensors[0].device.type, {x.dtype for x in tensors}, tensors[0].shape[-1]
    if device != "cuda":
        raise ModelError(f"backend varlen needs a CUDA device, the tensors are on {device}: use backend=grouped")
    if len(dtypes) > 1 or not dtypes <= {torch.bfloat16, torch.float16}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ModelError(
            f"backend varlen needs bfloat16 or float16, the tensors are {names}: "
            "load the model in bfloat16, train under autocast, or use backend=grouped"
        )
    if width > _HEAD_DIM_LIMIT:
        raise ModelError(
            f"backend varlen takes head dims up to {_HEAD_DIM_LIMIT}, the tensors have {width}: use backend=grouped"
        )


def _load_flash(implementation: str) -> Callable[..., Any]:
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    try:
        varlen = lazy_import_flash_attention(implementation)[0][1]
    except Exception as error:  # a missing package, a hub that does not answer, a binary for another torch
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"attention kernel {implementation!r} cannot be loaded ({reason}): install it, or use torch's own kernel"
        ) from error
    if varlen is None:
        raise ModelError(f"attention kernel {implementation!r} has no varlen function: use torch's own kernel")
    return varlen


def _flat_rows(*tensors_BXTD: Tensor) -> list[Tensor]:
    """[B, heads, T, D] -> [R, heads, D], in the dtype of autocast where that is on, with head dims the kernel takes."""
    device = tensors_BXTD[0].device.type
    widest = max(x.shape[-1] for x in tensors_BXTD)
    widest += -widest % _HEAD_DIM_STEP
    rows = []
    for x_BXTD in tensors_BXTD:
        if torch.is_autocast_enabled(device):
            x_BXTD = x_BXTD.to(torch.get_autocast_dtype(device))
        x_RXD = x_BXTD.transpose(1, 2).flatten(0, 1)
        # Zeros change neither scores nor the outputs that are kept.
        rows.append(x_RXD if x_RXD.shape[-1] == widest else F.pad(x_RXD, (0, widest - x_RXD.shape[-1])))
    return rows


def _kv_views(x_RKD: Tensor, pieces: list[HeadSlice]) -> dict[int, Tensor]:
    """Key or value heads by the first head of a slice; slices that share a head get the same view of it."""
    widths = {piece.kv_start: piece.kv_heads for piece in pieces}
    starts = sorted(widths)
    return dict(zip(starts, x_RKD.split([widths[start] for start in starts], dim=1), strict=True))


def _key_rows(x_RkD: Tensor, index: VarlenIndex) -> Tensor:
    if index.key_rows is None:
        return x_RkD
    if index.sinks is None:
        return x_RkD.index_select(0, index.key_rows)
    return _RowsWithSinks.apply(x_RkD, index)  # type: ignore[no-any-return, no-untyped-call]


class _RowsWithSinks(torch.autograd.Function):
    """`index_select` of the key rows, with a backward that adds up in float32.

    A sink token is copied to every segment of its document. On CUDA the backward of `index_select` would add hundreds
    of gradients to one bfloat16 number, where small ones vanish; and it adds all rows atomically, in an order that
    changes, while all but the sink tokens have one gradient only.
    """

    @staticmethod
    def forward(ctx: Any, x_RkD: Tensor, index: VarlenIndex) -> Tensor:
        ctx.index, ctx.shape = index, x_RkD.shape
        assert index.key_rows is not None
        return x_RkD.index_select(0, index.key_rows)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_YkD: Tensor) -> tuple[Tensor, None]:
        index, sinks = ctx.index, ctx.index.sinks
        total_RkD = grad_YkD.index_select(0, sinks.own_Q)
        if index.query_rows is not None:
            total_RkD = grad_YkD.new_zeros(ctx.shape).index_copy_(0, index.query_rows, total_RkD)
        copies = grad_YkD.index_select(0, sinks.places).to(torch.promote_types(grad_YkD.dtype, torch.float32))
        sums = total_RkD.index_select(0, sinks.rows).to(copies.dtype).index_add_(0, sinks.row_of_place, copies)
        return total_RkD.index_copy_(0, sinks.rows, sums.to(grad_YkD.dtype)), None


def _segments(
    bounds_B: Sequence[Sequence[int]], tokens: int, pattern: Pattern, shifted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each segment the first row of its document, its own first row, its size and its sinks; int64 [N] each."""
    cut: list[tuple[int, int, int, int, int]] = []
    for row, bounds in enumerate(bounds_B):
        check_bounds(bounds, tokens)
        for begin, end in pairwise(bounds):
            document = row * tokens + begin
            if isinstance(pattern, S2Pattern):
                found = runs(end - begin, pattern, shifted=shifted)
                cut += [(document, document + run.start, run.size, run.sinks, run.count) for run in found]
            else:
                cut.append((document, document, end - begin, 0, 1))  # the kernel has its own window
    counts = torch.tensor([count for *_, count in cut], dtype=torch.int64)
    of_runs = torch.tensor(cut, dtype=torch.int64).reshape(-1, 5)
    document_N, start_N, size_N, sinks_N, _ = of_runs.repeat_interleave(counts, dim=0).unbind(1)
    within_run_N = _ranges(torch.zeros_like(counts), counts)
    return document_N, start_N + within_run_N * size_N, size_N, sinks_N


def _ranges(starts_N: Tensor, sizes_N: Tensor) -> Tensor:
    """start, start + 1, ..., start + size - 1 of every pair, one after the other."""
    before_N = sizes_N.cumsum(0) - sizes_N
    shifts = (starts_N - before_N).repeat_interleave(sizes_N)
    return shifts + torch.arange(len(shifts))


def _interleave(first_N: Tensor, second_N: Tensor) -> Tensor:
    return torch.stack([first_N, second_N], dim=1).flatten()


def _cumulative(sizes_N: Tensor) -> Tensor:
    return F.pad(sizes_N.cumsum(0), (1, 0)).to(torch.int32)


def _longest_document(bounds_B: Sequence[Sequence[int]]) -> int:
    return max((stop - start for bounds in bounds_B for start, stop in pairwise(bounds)), default=0)


def _moved(fields: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in fields.items()}
