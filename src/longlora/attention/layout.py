"""What the plans of the CUDA backends are made from: the batch and the attention of a layer, without its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longlora.attention.pattern import HeadShift, Pattern, S2Pattern, check_bounds, pattern_shift
from longlora.errors import ModelError


@dataclass(frozen=True)
class Layout:
    """Layers with equal layouts share a plan; whatever a plan depends on is in here.

    Raises:
        ModelError: the bounds are not increasing or leave the sequence.
    """

    bounds_B: tuple[tuple[int, ...], ...]
    """For each row the document bounds, strictly increasing from 0; positions after the last are padding."""
    tokens: int
    """Length of the rows, padding included."""
    query_heads: int
    kv_heads: int
    """Divides `query_heads`."""
    pattern: Pattern
    device: torch.device

    def __post_init__(self) -> None:
        for bounds in self.bounds_B:
            check_bounds(bounds, self.tokens)

    @classmethod
    def of(cls, q_BHTD: Tensor, k_BKTD: Tensor, bounds_B: Sequence[Sequence[int]], pattern: Pattern) -> Layout:
        """That of queries and keys, document bounds and the pattern of the layer."""
        _, H, T, _ = q_BHTD.shape
        return cls(tuple(map(tuple, bounds_B)), T, H, k_BKTD.shape[1], pattern, q_BHTD.device)

    @property
    def split(self) -> bool:
        """Whether the pattern cuts any document into groups: none is cut that is no longer than one group."""
        lengths = (stop - start for bounds in self.bounds_B for start, stop in pairwise(bounds))
        return isinstance(self.pattern, S2Pattern) and max(lengths, default=0) > self.pattern.group_size

    @property
    def shift(self) -> HeadShift:
        """Which heads have the shifted grid; where no document is cut it is the same as the other."""
        return pattern_shift(self.pattern) if self.split else "none"

    def require(self, q_BHTD: Tensor, k_BKTD: Tensor) -> None:
        """Raise `ModelError` unless queries and keys have the sizes that were planned."""
        B, H, T, _ = q_BHTD.shape
        given = (B, T, H, k_BKTD.shape[1])
        planned = (len(self.bounds_B), self.tokens, self.query_heads, self.kv_heads)
        if given != planned:
            raise ModelError(f"rows, tokens, query and key heads are {given}, planned were {planned}: plan every batch")
