"""Shifted sparse attention on CUDA by FlexAttention: one kernel for all heads, documents and groups, without copies.

B batch, T tokens, H query heads, K key/value heads, D head dim, G grids (1, or 2 where some heads are shifted),
N = ceil(T / block size) blocks, W entries of the longest list of blocks.

FlexAttention skips blocks of scores that no query sees and asks a function about the pairs inside the others. In every
pattern of ours a query sees two ranges of keys up to itself: from the first key of its own segment on, and the sink
tokens of its document. Both ranges begin later or at the same place for later queries, so the blocks follow from the
first and the last query of each block; no T x T mask is evaluated, which `create_block_mask` would do.

UNVERIFIED ON HARDWARE: the compiled kernel has not run on a GPU yet. The CPU tests check the block mask against the
definition of the pattern, values and gradients with uncompiled FlexAttention, and values as compiled for the CPU;
tests/attention/test_backends_gpu.py awaits a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from longlora.attention.layout import Layout
from longlora.attention.pattern import S2Pattern, shifted_heads

# The kernel's tiles are at most 128 wide. A list holds up to N blocks (the queries that see a sink token), for every
# head, so larger blocks keep the lists of long sequences at 4 MiB a head.
_SMALLEST_BLOCK, _MOST_BLOCKS = 128, 1024
# Lists get one of few widths: a new width is a new shape, for which the compiler may have to make a kernel.
_WIDTH_STEP = 8
# One is needed for each kind of call: one row or more, one grid or two, with sinks, capped, with gradients; and a few
# until lengths are taken as variable. At torch's limit of 8 training would end with an error.
_MOST_KERNELS = 64


@dataclass(frozen=True, eq=False)
class FlexPlan:
    """What `flex_s2_attention` has to know about a batch and a pattern; made once and used by every layer."""

    layout: Layout
    block_mask: BlockMask


def flex_plan(layout: Layout, *, block_size: int | None = None) -> FlexPlan:
    """Plan the attention of one batch for all layers with this layout.

    Args:
        block_size: queries and keys in a block of scores; by default 128, or more where that would make long lists.
    """
    tokens, heads, device = layout.tokens, layout.query_heads, layout.device
    if block_size is None:
        block_size = _SMALLEST_BLOCK
        while tokens > block_size * _MOST_BLOCKS:
            block_size *= 2
    seen = _seen_ranges(layout)
    grids = len(seen.first_GBT)
    border = heads - shifted_heads(heads, layout.shift)
    grid_H = (torch.arange(heads) >= border if grids == 2 else torch.zeros(heads)).to(device, torch.int32)
    lists: dict[str, Any] = {}
    for name, x_GBN in _block_lists(seen, block_size).items():
        # One list serves all heads where they have one grid; else the kernel wants a list for each, contiguous.
        x_HBN = x_GBN.to(device) if grids == 1 else x_GBN.to(device)[grid_H]
        lists[name] = x_HBN.transpose(0, 1).contiguous()
    mask = BlockMask(
        seq_lengths=(tokens, tokens),
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=_mask_mod(seen.to(device), grid_H),
        **lists,
    )
    return FlexPlan(layout, mask)


def flex_s2_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    plan: FlexPlan,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sink_logits_H: Tensor | None = None,
) -> Tensor:
    """Attention as planned, of queries, keys and values to which RoPE was already applied.

    Args:
        q_BHTD, k_BKTD, v_BKTD: tensors of one dtype on CUDA; the head dim of the values may differ.
        scaling: factor of the scores; 1/sqrt(D) if None.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2).
        sink_logits_H: one more score for each head, whose weight goes nowhere (gpt-oss).

    Returns:
        Output [B, T, H, D of the values]; 0 at padding.

    Raises:
        ModelError: the tensors do not fit the plan.
    """
    plan.layout.require(q_BHTD, k_BKTD)
    device = q_BHTD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q_BHTD, k_BKTD, v_BKTD = q_BHTD.to(dtype), k_BKTD.to(dtype), v_BKTD.to(dtype)
    out_BHTD, more = _kernel(
        q_BHTD,
        k_BKTD,
        v_BKTD,
        score_mod=None if softcap is None else _soft_cap(softcap, q_BHTD),
        block_mask=plan.block_mask,
        scale=scaling,
        enable_gqa=k_BKTD.shape[1] != q_BHTD.shape[1],
        return_aux=AuxRequest(lse=sink_logits_H is not None),
    )
    if sink_logits_H is not None:
        # With one more score s in the softmax, all other weights shrink by the factor exp(lse) / (exp(lse) + exp(s)).
        share_BHT = torch.sigmoid(more.lse - sink_logits_H.to(more.lse.dtype)[None, :, None])
        out_BHTD = (out_BHTD * share_BHT[..., None]).to(out_BHTD.dtype)
    return out_BHTD.transpose(1, 2)


def _kernel(*tensors: Tensor, **arguments: Any) -> Any:
    """Compiled `flex_attention`. The tests put the uncompiled function here."""
    with torch._dynamo.config.patch(recompile_limit=_MOST_KERNELS):
        return _compiled()(*tensors, **arguments)


@cache
def _compiled() -> Callable[..., Any]:
    # Uncompiled flex_attention would hold all T x T scores; fullgraph: never fall back to it, raise.
    return torch.compile(flex_attention, fullgraph=True)


def _soft_cap(cap: float, q_BHTD: Tensor) -> Callable[..., Tensor]:
    # In a tensor, because the compiler fails on a second value of a captured float ("unbacked_bindings", torch 2.13).
    dtype = torch.promote_types(q_BHTD.dtype, torch.float32)
    cap_H = torch.full((q_BHTD.shape[1],), cap, dtype=dtype, device=q_BHTD.device)

    def capped(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap_H[h] * torch.tanh(score / cap_H[h])

    return capped


@dataclass(frozen=True, eq=False)
class _SeenRanges:
    """int32. A query sees the keys up to itself that are in its own segment or among the sink tokens of its document.

    At padding all ranges begin at T, so that nothing is seen.
    """

    first_GBT: Tensor
    """The first key of the query's own segment, on each grid; in a window the first key that it reaches."""
    document_BT: Tensor
    """The first key of the query's document."""
    sinks_stop_BT: Tensor | None
    """The key after the last sink token of the query's document; None without sink tokens."""

    def to(self, device: torch.device | str) -> _SeenRanges:
        stop = None if self.sinks_stop_BT is None else self.sinks_stop_BT.to(device)
        return _SeenRanges(self.first_GBT.to(device), self.document_BT.to(device), stop)


def _mask_mod(seen: _SeenRanges, grid_H: Tensor) -> Callable[..., Tensor]:
    """Whether a query sees a key, as FlexAttention asks it. Numbers are in tensors: a constant would be compiled in."""
    first_GBT, document_BT, sinks_stop_BT = seen.first_GBT, seen.document_BT, seen.sinks_stop_BT

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key >= first_GBT[grid_H[h], b, query]
        if sinks_stop_BT is not None:
            seen = seen | ((key >= document_BT[b, query]) & (key < sinks_stop_BT[b, query]))
        return seen & (key <= query)

    return sees


def _seen_ranges(layout: Layout) -> _SeenRanges:
    """On the CPU. One grid where all heads have the same, as they do where no document is longer than a group."""
    tokens, pattern = layout.tokens, layout.pattern
    documents, lengths = [], []
    for bounds in layout.bounds_B:
        sizes = [stop - start for start, stop in pairwise(bounds)]
        repeats = torch.tensor([*sizes, tokens - sum(sizes)])
        documents.append(torch.tensor([*bounds[:-1], tokens]).repeat_interleave(repeats))
        lengths.append(torch.tensor([*sizes, 0]).repeat_interleave(repeats))
    document_BT, length_BT = torch.stack(documents), torch.stack(lengths)
    within_BT = torch.arange(tokens) - document_BT
    if not isinstance(pattern, S2Pattern):
        first_BT = document_BT + (within_BT - pattern.size + 1).clamp_min(0)
        return _SeenRanges(first_BT.int()[None], document_BT.int(), None)
    group, split_BT = pattern.group_size, length_BT > pattern.group_size
    offsets = {"none": [0], "all": [group // 2], "half": [0, group // 2]}[layout.shift]
    first_GBT = torch.stack(
        [document_BT + split_BT * ((within_BT + offset) // group * group - offset).clamp_min(0) for offset in offsets]
    )
    sinks_stop_BT = document_BT + min(pattern.sink_tokens, tokens)
    has_sinks = pattern.sink_tokens > 0 and layout.split
    return _SeenRanges(first_GBT.int(), document_BT.int(), sinks_stop_BT.int() if has_sinks else None)


def _block_lists(seen: _SeenRanges, block_size: int) -> dict[str, Tensor]:
    """The lists of blocks [G, B, N, W] and their lengths [G, B, N], by their names in `BlockMask`.

    For each block of queries the blocks of keys of which it sees a part, and those of which all its queries see all
    (``full_``); and the other way round, which the backward pass needs.
    """
    tokens = seen.document_BT.shape[-1]
    N = -(-tokens // block_size)

    def ends(x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the first and of the last query in each block; after the end of the sequence as at padding."""
        blocks = F.pad(x, (0, N * block_size - tokens), value=tokens).unflatten(-1, (N, block_size))
        return blocks[..., 0].long(), blocks[..., -1].long()

    (first_GBN, last_first_GBN), (document_BN, last_document_BN) = ends(seen.first_GBT), ends(seen.document_BT)
    sinks_stop_BN = document_BN if seen.sinks_stop_BT is None else ends(seen.sinks_stop_BT)[0]
    own_N = torch.arange(N)
    # The first query of a block sees something of every block listed here, the others see nothing of any other block:
    # the blocks from its segment's first key up to its own block, and before them those of sink tokens.
    own_start_GBN, sinks_start_BN = first_GBN // block_size, document_BN // block_size
    sinks_end_BN = -(-sinks_stop_BN // block_size)
    any_sinks_BN = (sinks_stop_BN > document_BN) & (document_BN < tokens)
    sinks_GBN = (torch.minimum(sinks_end_BN, own_start_GBN) - sinks_start_BN).clamp_min(0) * any_sinks_BN
    count_GBN = sinks_GBN + (own_N + 1 - own_start_GBN).clamp_min(0) * (document_BN < tokens)
    slot_W = torch.arange(max(1, int(count_GBN.max())))
    in_sinks = slot_W < sinks_GBN[..., None]
    block = torch.where(in_sinks, sinks_start_BN[..., None] + slot_W, (own_start_GBN - sinks_GBN)[..., None] + slot_W)
    listed = slot_W < count_GBN[..., None]
    # All queries see all keys of an earlier block if the last query has it in its segment (which no padding has), or if
    # it holds nothing but sink tokens of their one document.
    start, stop = block * block_size, (block + 1) * block_size
    all_sinks = (start >= document_BN[..., None]) & (stop <= sinks_stop_BN[..., None])
    same_document_BN = document_BN == last_document_BN
    full = (start >= last_first_GBN[..., None]) | (all_sinks & same_document_BN[..., None])
    full &= listed & (block < own_N[:, None])
    lists = {}
    for name, chosen in (("", listed & ~full), ("full_", full)):
        rows, slots = chosen.flatten(0, 2).nonzero().unbind(1)
        keys, queries = block.flatten(0, 2)[rows, slots], rows % N
        for side, of, column in (("kv", rows, keys), ("q", rows - queries + keys, queries)):
            lists[f"{name}{side}_num_blocks"], lists[f"{name}{side}_indices"] = _lists(of, column, count_GBN.shape)
    return lists


def _lists(rows: Tensor, columns: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """How many columns each row has [*shape], and which [*shape, W], in the order given; int32."""
    N = shape[-1]
    counts = rows.bincount(minlength=math.prod(shape))
    longest = max(1, int(counts.max()))
    rows, order = rows.sort(stable=True)
    slots = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    indices = torch.zeros(len(counts), min(N, longest + -longest % _WIDTH_STEP), dtype=torch.int32)
    indices[rows, slots] = columns[order].int()
    return counts.int().reshape(*shape), indices.reshape(*shape, -1)
