"""Which positions may attend to which: groups, shift, sink tokens and document bounds. Integers only.

One document of 8 tokens, groups of 4, no sinks. Unshifted heads cut it at 4, shifted heads at 2 and 6::

    unshifted  0 1 2 3 | 4 5 6 7
    shifted    0 1 | 2 3 4 5 | 6 7

Inside a segment attention is causal. Information crosses the cuts of one half of the heads through the other half
(paper, figure 2). Nothing wraps around the ends, so no token ever sees a later one; the paper's Algorithm 1 rolls
the sequence instead and lets the first half group see the last (see `rolled.py`).

Beyond the paper: the first `sink_tokens` of the document are visible to every segment, the grid restarts at each
document, and a document no longer than one group is one segment for all heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from longlora.errors import ModelError


@dataclass(frozen=True)
class S2Pattern:
    """Settings of shifted sparse attention.

    Args:
        group_size: tokens in a group; even, at least 2.
        sink_tokens: leading tokens of each document that all its later tokens may attend to; less than `group_size`.

    Raises:
        ModelError: a value is out of range.
    """

    group_size: int
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.group_size < 2 or self.group_size % 2:
            raise ModelError(
                f"group_size={self.group_size}: must be an even number of at least 2, because groups shift by half"
            )
        if not 0 <= self.sink_tokens < self.group_size:
            raise ModelError(
                f"sink_tokens={self.sink_tokens}: must be at least 0 and less than group_size={self.group_size}"
            )


@dataclass(frozen=True)
class Run:
    """`count` neighbouring segments of `size` tokens from `start` on, each seeing the first `sinks` tokens as well.

    Positions count from the beginning of the document.
    """

    start: int
    size: int
    count: int
    sinks: int

    @property
    def stop(self) -> int:
        return self.start + self.size * self.count


def shifted_heads(num_heads: int) -> int:
    """How many of the last query heads use the shifted grid: half, rounded down."""
    return num_heads // 2


def may_attend(query: int, key: int, length: int, pattern: S2Pattern, *, shifted: bool) -> bool:
    """Whether position `query` sees position `key` in a document of `length` tokens: the definition of the pattern."""
    if key > query:
        return False
    if length <= pattern.group_size or key < pattern.sink_tokens:
        return True
    offset = pattern.group_size // 2 if shifted else 0
    return (query + offset) // pattern.group_size == (key + offset) // pattern.group_size


def runs(length: int, pattern: S2Pattern, *, shifted: bool) -> list[Run]:
    """Cut a document of `length` tokens into runs of equal segments, in order and without gaps."""
    if length <= pattern.group_size:
        return [Run(0, length, 1, 0)] if length else []
    first = pattern.group_size // 2 if shifted else pattern.group_size
    cuts = [0, *range(first, length, pattern.group_size), length]
    merged: list[Run] = []
    for start, stop in pairwise(cuts):
        size, sinks = stop - start, min(pattern.sink_tokens, start)
        last = merged[-1] if merged else None
        if last is not None and (last.size, last.sinks) == (size, sinks):
            merged[-1] = Run(last.start, size, last.count + 1, sinks)
        else:
            merged.append(Run(start, size, 1, sinks))
    return merged


@dataclass(frozen=True)
class HeadSlice:
    """Neighbouring query heads on one grid that share the same ratio of query to key/value heads."""

    query_heads: int
    kv_start: int
    kv_heads: int
    shifted: bool


def head_slices(query_heads: int, kv_heads: int) -> list[HeadSlice]:
    """Cut the query heads into slices, in order, so that no key/value head needs to be copied.

    The border between unshifted and shifted heads may fall inside the query heads that share one key/value head
    (9 query and 3 key/value heads: border after 5); that key/value head then appears in two slices.

    >>> [(s.query_heads, s.kv_start, s.kv_heads, s.shifted) for s in head_slices(9, 3)]
    [(3, 0, 1, False), (2, 1, 1, False), (1, 1, 1, True), (3, 2, 1, True)]
    """
    share = query_heads // kv_heads
    border = query_heads - shifted_heads(query_heads)
    whole, part = divmod(border, share)
    after = kv_heads - whole - (part > 0)
    slices = [
        HeadSlice(whole * share, 0, whole, False),
        HeadSlice(part, whole, int(part > 0), False),
        HeadSlice(share - part if part else 0, whole, int(part > 0), True),
        HeadSlice(after * share, kv_heads - after, after, True),
    ]
    return [piece for piece in slices if piece.query_heads]


def check_bounds(bounds: Sequence[int], length: int) -> None:
    """Raise `ModelError` unless `bounds` are strictly increasing document bounds from 0 to at most `length`."""
    if not bounds or bounds[0] != 0 or bounds[-1] > length:
        raise ModelError(f"document bounds {list(bounds)[:8]}: must begin with 0 and end within {length} tokens")
    for before, after in pairwise(bounds):
        if after <= before:
            raise ModelError(f"document bounds {before}, {after}: must be strictly increasing")
