"""Sequence parallelism, full attention: ranks exchange tokens for heads, and attend to whole rows (DeepSpeed Ulysses).

Each rank holds one stretch of each row, of all heads. An all-to-all gives it the whole rows of some heads, attention is
that of one process, and another all-to-all brings every stretch home. Two ranks, rows of 8 tokens, 4 heads::

    before, after   rank 0: tokens 0-3, heads 0-3    rank 1: tokens 4-7, heads 0-3
    attention       rank 0: tokens 0-7, heads 0-1    rank 1: tokens 0-7, heads 2-3

The exchange and its gradient are DeepSpeed's `DistributedAttention`; what is computed is `attend` of `backends.py`,
with the document bounds of whole rows, so that packed documents, soft caps, learned sinks and O(T) memory are as on
one process. docs/log.md says why not torch's context parallelism or the ways of accelerate.

DeepSpeed is given as many heads for one rank as for another: with an uneven number it asks its own engine which rank
this is, and without one takes every rank for the first. So heads are dealt to ranks here (`deal_heads`), and places
that stay empty travel as zeros, which no attention computes. Where there are fewer key/value heads than ranks they are
copied, and their gradient is the sum of those of the copies.

UNVERIFIED ON HARDWARE: gloo on the CPU was tried, NCCL was not.

B batch, T tokens of the stretch or, between the two exchanges, of the whole rows, H query heads, K key/value heads,
X either, D head dim.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longlora.attention.backends import Backend, Plans, attend
from longlora.attention.pattern import FULL, Pattern
from longlora.errors import ModelError

if TYPE_CHECKING:
    from longlora.attention.sequence import SequenceCut


@dataclass(frozen=True)
class HeadDeal:
    """Which heads each rank computes: neighbours, in the order of the ranks, so many query heads to a key/value head.

    Messages have equal parts, so each rank has places for as many heads as the one with most.
    """

    copies: int
    """Of each key/value head; each serves its part of the query heads that share it."""
    query_heads: tuple[int, ...]
    """By rank."""
    kv_heads: tuple[int, ...]
    """By rank; copies count."""

    @property
    def places(self) -> tuple[int, int]:
        """For query heads and for key/value heads on each rank, of which some may be empty: what travels."""
        return max(self.query_heads), max(self.kv_heads)


def deal_heads(query_heads: int, kv_heads: int, world: int) -> HeadDeal:
    """Give the busiest of `world` ranks as few query heads as can be, then copy key/value heads as little as can be.

    >>> deal_heads(9, 3, 2)
    HeadDeal(copies=3, query_heads=(5, 4), kv_heads=(5, 4))
    >>> deal_heads(8, 1, 4)
    HeadDeal(copies=4, query_heads=(2, 2, 2, 2), kv_heads=(1, 1, 1, 1))

    Raises:
        ModelError: there are more ranks than query heads.
    """
    if query_heads < world:
        raise ModelError(
            f"full attention on {world} sequence ranks takes a query head for each, and the model has {query_heads}: "
            f"set parallel.sequence to at most {query_heads}, or train without full attention"
        )
    share = query_heads // kv_heads
    possible = (copies for copies in range(1, share + 1) if share % copies == 0 and kv_heads * copies >= world)
    deals = [_deal(kv_heads, copies, share // copies, world) for copies in possible]
    return min(deals, key=lambda deal: (deal.places[0], deal.copies))


def _deal(kv_heads: int, copies: int, share: int, world: int) -> HeadDeal:
    each, more = divmod(kv_heads * copies, world)
    dealt = [each + (rank < more) for rank in range(world)]
    return HeadDeal(copies, tuple(heads * share for heads in dealt), tuple(dealt))


def require_ulysses(query_heads: int, kv_heads: int, world: int) -> None:
    """Refuse what `ulysses_attention` can't do, before a run begins; nothing is asked for on one rank.

    Raises:
        ModelError: there are more ranks than query heads, or no DeepSpeed.
    """
    if world > 1:
        deal_heads(query_heads, kv_heads, world)
        _import_deepspeed(f"full attention on {world} sequence ranks")


def ulysses_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    cut: SequenceCut,
    *,
    pattern: Pattern = FULL,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sink_logits_H: Tensor | None = None,
    full_attention: str | None = None,
    plans: Plans | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of the stretch that this rank holds; all ranks of the group call it together, backward too.

    Args:
        q_BHTD, k_BKTD, v_BKTD: of this rank's stretch, with RoPE of the positions in the documents; any float dtype.
        cut: of the whole rows.
        pattern: full attention in each document; others work too, at the traffic of full attention.

    The other arguments, the dtypes and the backends are those of `attend`. With dropout each rank draws for its heads.

    Returns:
        Output [B, tokens of the stretch, H, D of the values]; 0 at padding. The gradient of `sink_logits_H` is this
        rank's share: that of its heads, and 0 for others.

    Raises:
        ModelError: the tensors or the group do not fit the cut, there are more ranks than query heads or no DeepSpeed,
            or the backend can't do this.
    """
    _require_fit(cut, q_BHTD)
    deal = deal_heads(q_BHTD.shape[1], k_BKTD.shape[1], cut.world)
    if torch.is_autocast_enabled(q_BHTD.device.type):  # before anything is sent
        dtype = torch.get_autocast_dtype(q_BHTD.device.type)
        q_BHTD, k_BKTD, v_BKTD = q_BHTD.to(dtype), k_BKTD.to(dtype), v_BKTD.to(dtype)
    if deal.copies > 1:
        k_BKTD, v_BKTD = (x.repeat_interleave(deal.copies, dim=1) for x in (k_BKTD, v_BKTD))
    queries, kv = deal.query_heads[cut.rank], deal.kv_heads[cut.rank]
    if sink_logits_H is not None:
        sink_logits_H = sink_logits_H.narrow(0, sum(deal.query_heads[: cut.rank]), queries)

    def of_whole_rows(*qkv_BTXD: Tensor) -> Tensor:
        q, k, v = (x.narrow(2, 0, own).transpose(1, 2) for x, own in zip(qkv_BTXD, (queries, kv, kv), strict=True))
        out_BTHD = attend(
            q, k, v, cut.bounds_B, pattern, backend=backend, scaling=scaling, dropout=dropout, softcap=softcap,
            sink_logits_H=sink_logits_H, plans=plans, full_attention=full_attention,
        )  # fmt: skip
        if not cut.longest:  # of padding alone the output must have gradients too, which are 0: ranks run backward
            sinks = () if sink_logits_H is None else (sink_logits_H,)
            out_BTHD = out_BTHD + sum(x[..., :0].sum() for x in (q, k, v, *sinks))
        return _pad_heads(out_BTHD, deal.places[0])

    dealt = [
        _deal_out(x.transpose(1, 2), sizes)
        for x, sizes in ((q_BHTD, deal.query_heads), (k_BKTD, deal.kv_heads), (v_BKTD, deal.kv_heads))
    ]
    distributed = _import_deepspeed("full attention across ranks").DistributedAttention
    _start_communication()
    # Heads, dimension 2, are scattered, tokens, dimension 1, are gathered; 0 is that of the batch.
    return _collect(distributed(of_whole_rows, cut.group, 2, 1)(*dealt, 0), deal.query_heads)


def _require_fit(cut: SequenceCut, q_BHTD: Tensor) -> None:
    B, _, stretch, _ = q_BHTD.shape
    given = (B, stretch * cut.world, dist.get_rank(cut.group), dist.get_world_size(cut.group))
    planned = (len(cut.bounds_B), cut.tokens, cut.rank, cut.world)
    if given != planned:
        raise ModelError(
            f"rows, their tokens, rank and size of the group are {given}, those of the cut are {planned}: "
            "cut each batch, for its group"
        )


def _deal_out(x_BTXD: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Heads in the places of the ranks, empty ones filled with 0."""
    if len(set(sizes)) == 1:
        return x_BTXD
    return torch.cat([_pad_heads(part, max(sizes)) for part in x_BTXD.split(list(sizes), dim=2)], dim=2)


def _collect(x_BTXD: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Heads from the places of the ranks: the reverse of `_deal_out`."""
    if len(set(sizes)) == 1:
        return x_BTXD
    parts = x_BTXD.split(max(sizes), dim=2)
    return torch.cat([part.narrow(2, 0, own) for part, own in zip(parts, sizes, strict=True)], dim=2)


def _pad_heads(x_BTXD: Tensor, places: int) -> Tensor:
    empty = places - x_BTXD.shape[2]
    return F.pad(x_BTXD, (0, 0, 0, empty)) if empty else x_BTXD


@cache
def _import_deepspeed(purpose: str) -> ModuleType:
    """Its module of Ulysses, without what it says of itself while it loads."""
    try:
        with _quiet():
            return importlib.import_module("deepspeed.sequence.layer")
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{purpose} takes DeepSpeed, and there is no {error.name} here: pip install 'longlora[deepspeed]'"
        ) from error
    except Exception as error:  # it probes for compilers and devices while it loads
        raise ModelError(f"{purpose} takes DeepSpeed, which can't be loaded here ({error}): reinstall it") from error


@cache
def _start_communication() -> None:
    """DeepSpeed's wrapper of torch.distributed, unless its engine has made it.

    On a CPU it would first compile, for two minutes, a sum in shared memory that nothing here calls.
    """
    comm = importlib.import_module("deepspeed.comm")
    if comm.is_initialized():
        return
    maker: Any = importlib.import_module("deepspeed.comm.torch")
    compile_sum, maker.build_shm_op = maker.build_shm_op, lambda: None
    try:
        with _quiet():
            comm.init_distributed(dist_backend=dist.get_backend())
    finally:
        maker.build_shm_op = compile_sum


@contextmanager
def _quiet() -> Iterator[None]:
    """Of DeepSpeed's log only errors; importing it sets the level, so a filter must do."""

    def errors(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    log = logging.getLogger("DeepSpeed")
    log.addFilter(errors)
    try:
        yield
    finally:
        log.removeFilter(errors)
