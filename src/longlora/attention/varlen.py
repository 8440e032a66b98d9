"""Shifted sparse attention on CUDA by variable-length flash kernels: every segment is one sequence of one call.

B batch, T tokens, R = B*T rows of the flattened batch, H query heads, K key/value heads, D head dim; h and k heads of
a slice, Q rows of queries (those that are not padding), Y rows of keys, copies of sink tokens included.

The kernel takes separate lengths for queries and keys and aligns its causal mask to the bottom right, so the sink
tokens of a document stand in front of the keys of its segments alone, without dummy queries. Without sinks and padding
no input is copied; with sinks each call gathers its own key/value heads once, Y rows. Keys and values are never
repeated for grouped queries.

The kernel is torch's own, or that of the flash-attn build (the package, or one from the kernels hub) which the model's
full attention uses: load the model with ``attn_implementation="flash_attention_2"`` to have it, and with ``"sdpa"`` to
have torch's. Which one it is, is logged. What tensors and cards it takes, `choose_backend` in `backends.py` knows.

UNVERIFIED ON HARDWARE: no kernel has run on a GPU yet, neither torch's nor a flash-attn build's. The CPU tests check
the index against the definition of the pattern, and all around the kernel with an emulation of its contract, under
torch's and under flash-attn's signature; tests/attention/test_backends_gpu.py awaits a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longlora.attention.layout import Layout
from longlora.attention.pattern import HeadSlice, head_slices
from longlora.attention.varlen_index import NO_WINDOW, VarlenIndex, varlen_index
from longlora.errors import ModelError

# The flash kernels take head dims that are multiples of 8.
_HEAD_DIM_STEP = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class VarlenPlan:
    """What `varlen_attention` has to know about a batch and a pattern; made once and used by every layer."""

    layout: Layout
    calls: tuple[tuple[HeadSlice, VarlenIndex], ...]
    """One call of the kernel each, in the order of the query heads; slices on one grid share the index."""
    flash: Callable[..., Any] | None
    """`flash_attn_varlen_func` of a flash-attn build; None for torch's own kernel."""


def varlen_plan(layout: Layout, full_attention: str | None = None) -> VarlenPlan:
    """Plan the attention of one batch for all layers with this layout.

    Args:
        full_attention: transformers' name of the model's full attention. One that names a flash-attn build
            ("flash_attention_2", "kernels-community/flash-attn2") has its kernel used, else it is torch's own.

    Raises:
        ModelError: the flash-attn build cannot be loaded.
    """
    slices = head_slices(layout.query_heads, layout.kv_heads, layout.shift)
    grids = {
        shifted: varlen_index(layout, shifted=shifted).to(layout.device)
        for shifted in {piece.shifted for piece in slices}
    }
    calls = tuple((piece, grids[piece.shifted]) for piece in slices)
    return VarlenPlan(layout, calls, _flash_kernel(full_attention))


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
        ModelError: the tensors do not fit the plan.
    """
    B, H, T, D = q_BHTD.shape
    plan.layout.require(q_BHTD, k_BKTD)
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


def _kernel(
    q_QhD: Tensor, k_YkD: Tensor, v_YkD: Tensor, index: VarlenIndex, scaling: float, flash: Callable[..., Any] | None
) -> Tensor:
    """One call for all segments of one slice of heads -> [Q, h, D]. The tests put an emulation here."""
    result: Any
    if flash is None:
        from torch.nn.attention.varlen import varlen_attn

        result = varlen_attn(
            q_QhD, k_YkD, v_YkD, index.cu_seqlens_q, index.cu_seqlens_k, index.max_q, index.max_k,
            scale=scaling, window_size=index.window, enable_gqa=True,
        )  # fmt: skip
    else:
        window = {} if index.window == NO_WINDOW else {"window_size": index.window}
        result = flash(
            q_QhD, k_YkD, v_YkD, cu_seqlens_q=index.cu_seqlens_q, cu_seqlens_k=index.cu_seqlens_k,
            max_seqlen_q=index.max_q, max_seqlen_k=index.max_k, softmax_scale=scaling, causal=True, **window,
        )  # fmt: skip
    return result[0] if isinstance(result, tuple) else result  # some builds return the logsumexp as well


def _flash_kernel(full_attention: str | None) -> Callable[..., Any] | None:
    """`flash_attn_varlen_func` of the flash-attn build that transformers knows by this name; None for torch's own."""
    if full_attention is None or "flash" not in full_attention:  # transformers tells them by the same word
        _log_kernel("torch.nn.attention.varlen")
        return None
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    try:
        kernel = lazy_import_flash_attention(full_attention)[0][1]
    except Exception as error:  # a missing package, a hub that does not answer, a binary for another torch
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"attention kernel {full_attention!r} cannot be loaded ({reason}): install it, or load the model with "
            "attn_implementation='sdpa' for torch's own kernel"
        ) from error
    if kernel is None:
        raise ModelError(
            f"attention kernel {full_attention!r} has no varlen function: load the model with "
            "attn_implementation='sdpa' for torch's own kernel"
        )
    _log_kernel(f"flash_attn_varlen_func of {full_attention}")
    return kernel


@cache
def _log_kernel(kernel: str) -> None:
    _log.info("S2-Attn varlen kernel: %s", kernel)


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
