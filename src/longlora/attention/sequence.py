"""Sequence parallelism, the seam: which stretch of its rows a forward pass holds, and attention across all of them.

In: a `SequenceCut` around the forward pass (`rows_cut`), which its masks keep (`passes.py`). Out: attention of whole
rows, from `halo.py` where a group or a window bounds what a token sees, from `ulysses.py` where attention is full.

B batch, T tokens of the stretch, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from longlora.attention.backends import Backend, Plans
from longlora.attention.halo import halo_attention
from longlora.attention.halo_plan import halo_plan
from longlora.attention.pattern import FULL, Pattern
from longlora.attention.ulysses import ulysses_attention


@dataclass(frozen=True)
class SequenceCut:
    """Rows of tokens that are cut into stretches of equal length, of which this process holds one of each row."""

    group: dist.ProcessGroup
    """The processes that share the rows, in the order of their stretches."""
    rank: int
    """Of this process in the group."""
    world: int
    bounds_B: tuple[tuple[int, ...], ...]
    """Document bounds of each whole row, from 0 to the end of its last document; what follows is padding."""
    tokens: int
    """Length of the whole rows, padding included; a multiple of `world`."""

    @property
    def stretch(self) -> int:
        """Tokens of each row on each rank."""
        return self.tokens // self.world

    @property
    def longest(self) -> int:
        """Tokens of the longest row, without padding."""
        return max(bounds[-1] for bounds in self.bounds_B)


_CUT: ContextVar[SequenceCut | None] = ContextVar("longlora_sequence_cut", default=None)


@contextlib.contextmanager
def rows_cut(cut: SequenceCut | None) -> Iterator[None]:
    """Inside it a model is given this rank's stretch of each row; all ranks of the group call it together.

    Positions have to be those in the documents: give ``position_ids``.
    """
    token = _CUT.set(cut)
    try:
        yield
    finally:
        _CUT.reset(token)


def current_cut() -> SequenceCut | None:
    """How the rows of the forward pass that begins now are cut; None if they are whole."""
    return _CUT.get()


def attend_across(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    cut: SequenceCut,
    pattern: Pattern,
    *,
    backend: Backend,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sink_logits_H: Tensor | None,
    plans: Plans,
    full_attention: str,
) -> Tensor:
    """Attention of this rank's stretch [B, T, H, D of the values]; arguments are those of `attend`.

    Raises:
        ModelError: a stretch is shorter than a group or a window, or full attention can't be had.
    """
    if pattern == FULL:
        return ulysses_attention(
            q_BHTD, k_BKTD, v_BKTD, cut, backend=backend, scaling=scaling, dropout=dropout, softcap=softcap,
            sink_logits_H=sink_logits_H, plans=plans, full_attention=full_attention,
        )  # fmt: skip
    heads = (q_BHTD.shape[1], k_BKTD.shape[1])
    plan = plans.get(halo_plan, cut.bounds_B, cut.tokens, pattern, heads, cut.rank, cut.world)
    return halo_attention(
        q_BHTD, k_BKTD, v_BKTD, plan, cut.group, backend=backend, scaling=scaling, dropout=dropout, softcap=softcap,
        sink_logits_H=sink_logits_H, plans=plans, full_attention=full_attention,
    )  # fmt: skip
