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
from typing import Literal, get_args

from longlora.errors import ModelError

HeadShift = Literal["half", "all", "none"]
"""Which query heads of a layer use the shifted grid: the last half (the paper), all of them, or none."""


@dataclass(frozen=True)
class S2Pattern:
    """Settings of shifted sparse attention in one layer.

    Args:
        group_size: tokens in a group; at least 2, and even where heads are shifted.
        sink_tokens: leading tokens of each document that all its later tokens may attend to; less than `group_size`.
        shift: which heads use the grid that is shifted by half a group.

    Raises:
        ModelError: a value is out of range.
    """

    group_size: int
    sink_tokens: int = 0
    shift: HeadShift = "half"

    def __post_init__(self) -> None:
        if self.group_size < 2 or (self.group_size % 2 and self.shift != "none"):
            raise ModelError(
                f"group_size={self.group_size}: must be an even number of at least 2, because groups shift by half"
            )
        if not 0 <= self.sink_tokens < self.group_size:
            raise ModelError(
                f"sink_tokens={self.sink_tokens}: must be at least 0 and less than group_size={self.group_size}"
            )
        if self.shift not in get_args(HeadShift):
            raise ModelError(f"shift={self.shift!r} of a layer: must be one of {', '.join(get_args(HeadShift))}")


@dataclass(frozen=True)
class WindowPattern:
    """The pattern of a layer with a sliding window: a token sees the last `size` tokens up to itself, in all heads."""

    size: int


Pattern = S2Pattern | WindowPattern

# A block of a window layer reads size + window keys: small blocks waste little, large ones make fewer calls.
_MIN_WINDOW_BLOCK, _MAX_WINDOW_BLOCK = 16, 512

FULL = S2Pattern(group_size=2**62, shift="none")
"""Full attention inside each document: no document is longer than one group."""


@dataclass(frozen=True)
class Run:
    """`count` neighbouring segments of `size` tokens from `start` on, causal inside.

    Each segment sees the first `sinks` tokens of the document as well. With a `history` a query sees the `history` keys
    before it, also those outside its segment, and no others. Positions count from the beginning of the document.
    """

    start: int
    size: int
    count: int
    sinks: int = 0
    history: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.size * self.count


def shifted_heads(num_heads: int, shift: HeadShift = "half") -> int:
    """How many of the last query heads use the shifted grid; half is rounded down."""
    return {"half": num_heads // 2, "all": num_heads, "none": 0}[shift]


def pattern_shift(pattern: Pattern) -> HeadShift:
    """Which heads are shifted; a window has none."""
    return pattern.shift if isinstance(pattern, S2Pattern) else "none"


def may_attend(query: int, key: int, length: int, pattern: Pattern, *, shifted: bool) -> bool:
    """Whether position `query` sees position `key` in a document of `length` tokens: the definition of the pattern."""
    if key > query:
        return False
    if isinstance(pattern, WindowPattern):
        return key > query - pattern.size
    if length <= pattern.group_size or key < pattern.sink_tokens:
        return True
    offset = pattern.group_size // 2 if shifted else 0
    return (query + offset) // pattern.group_size == (key + offset) // pattern.group_size


def runs(length: int, pattern: Pattern, *, shifted: bool) -> list[Run]:
    """Cut a document of `length` tokens into runs of equal segments, in order and without gaps."""
    if isinstance(pattern, WindowPattern):
        return _window_runs(length, pattern.size)
    if length <= pattern.group_size:
        return [Run(0, length, 1)] if length else []
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


def _window_runs(length: int, window: int) -> list[Run]:
    """The first `window` tokens see all before them; what follows is cut into blocks with a history."""
    if window == 1:  # a token sees itself
        return [Run(0, 1, length)] if length else []
    if length <= window:
        return [Run(0, length, 1)] if length else []
    block = min(max(window // 2, _MIN_WINDOW_BLOCK), _MAX_WINDOW_BLOCK)
    count, rest = divmod(length - window, block)
    blocks = [Run(window, block, count, history=window - 1), Run(length - rest, rest, 1, history=window - 1)]
    return [Run(0, window, 1), *(run for run in blocks if run.size and run.count)]


@dataclass(frozen=True)
class HeadSlice:
    """Neighbouring query heads on one grid that share the same ratio of query to key/value heads."""

    query_start: int
    query_heads: int
    kv_start: int
    kv_heads: int
    shifted: bool


def head_slices(query_heads: int, kv_heads: int, shift: HeadShift = "half") -> list[HeadSlice]:
    """Cut the query heads into slices, in order, so that no key/value head needs to be copied.

    The border between unshifted and shifted heads may fall inside the query heads that share one key/value head
    (9 query and 3 key/value heads: border after 5); that key/value head then appears in two slices.

    >>> [(s.query_start, s.query_heads, s.kv_start, s.kv_heads, s.shifted) for s in head_slices(9, 3)]
    [(0, 3, 0, 1, False), (3, 2, 1, 1, False), (5, 1, 1, 1, True), (6, 3, 2, 1, True)]
    """
    share = query_heads // kv_heads
    border = query_heads - shifted_heads(query_heads, shift)
    whole, part = divmod(border, share)
    next_whole = whole + (part > 0)
    slices = [
        HeadSlice(0, whole * share, 0, whole, False),
        HeadSlice(whole * share, part, whole, 1, False),
        HeadSlice(border, share - part if part else 0, whole, 1, True),
        HeadSlice(next_whole * share, query_heads - next_whole * share, next_whole, kv_heads - next_whole, True),
    ]
    return [piece for piece in slices if piece.query_heads]


def check_bounds(bounds: Sequence[int], length: int) -> None:
    """Raise `ModelError` unless `bounds` are strictly increasing document bounds from 0 to at most `length`."""
    if not bounds or bounds[0] != 0 or bounds[-1] > length:
        raise ModelError(f"document bounds {list(bounds)[:8]}: must begin with 0 and end within {length} tokens")
    for before, after in pairwise(bounds):
        if after <= before:
            raise ModelError(f"document bounds {before}, {after}: must be strictly increasing")
