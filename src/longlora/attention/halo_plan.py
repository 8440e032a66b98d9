"""Sequence parallelism, the plan: what a rank lacks of its documents, who has it, and in which steps it is computed.

Integers only, no processes: every rank computes the same plan from the document bounds of the whole rows.

A row of tokens is cut into as many stretches of equal length as there are ranks. A document that lies in one stretch
needs nothing from elsewhere. Of one that a cut goes through, the rank behind the cut needs the keys and values of the
segment in progress (at most one group, from its left neighbour) and the document's sink tokens (from their owner).
One long document, cut on bounds of groups of 4, no sinks::

    unshifted   0 1 2 3 | 4 5 6 7 || 8 9 10 11 | ...       nothing
    shifted     0 1 | 2 3 4 5 | 6 7 || 8 9 | 10 11 ...     keys and values of 6 and 7, for the queries 8 and 9

K key/value heads. Positions of `Run` count from the beginning of the document, those of `Block` from that of the row,
those of `Edge` and `Whole` from that of the stretch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from longlora.attention.pattern import (
    FULL,
    HeadSlice,
    Pattern,
    Run,
    WindowPattern,
    check_bounds,
    head_slices,
    pattern_shift,
    runs,
)
from longlora.errors import ModelError


@dataclass(frozen=True)
class Whole:
    """Neighbouring documents that lie in the stretch entirely."""

    begin: int
    bounds: tuple[int, ...]
    """Of these documents, from 0; the first begins at `begin`."""

    @property
    def tokens(self) -> int:
        return self.bounds[-1]


@dataclass(frozen=True)
class Edge:
    """The part in the stretch of a document that a cut goes through."""

    begin: int
    tokens: int
    skipped: int
    """Tokens of the document before the stretch."""
    cuts: tuple[tuple[Run, ...], tuple[Run, ...]]
    """Segments of unshifted and of shifted heads; the first may have begun before the stretch, and is alone then."""


@dataclass(frozen=True)
class Block:
    """Keys and values that one rank sends to another: neighbouring tokens of a row, in neighbouring heads."""

    source: int
    target: int
    row: int
    kv_start: int
    kv_heads: int
    start: int
    stop: int

    @property
    def vectors(self) -> int:
        """How many keys; and as many values."""
        return self.kv_heads * (self.stop - self.start)


@dataclass(frozen=True)
class HaloPlan:
    """What one rank does in the attention of a batch, for all layers with this pattern and these heads.

    There are two stages, so that unshifted heads are computed while the keys and values of the others travel: in stage
    0 are those of key/value heads that unshifted heads read, in stage 1 the rest.
    """

    rank: int
    world: int
    stretch: int
    """Tokens of a row on each rank, padding included."""
    heads: tuple[int, int]
    """Query heads and key/value heads."""
    pattern: Pattern
    slices: tuple[HeadSlice, ...]
    rows: tuple[tuple[Whole | Edge, ...], ...]
    """The tokens of each row in the stretch, in order and without gaps; padding follows the last."""
    sends: tuple[tuple[Block, ...], tuple[Block, ...]]
    """By stage. Blocks between two ranks have the same order on both."""
    receives: tuple[tuple[Block, ...], tuple[Block, ...]]
    """By stage; in the order of rows, heads and positions."""

    def stage(self, piece: HeadSlice) -> int:
        """The stage in which the key/value heads of a slice of heads arrive."""
        return int(all(other.shifted for other in self.slices if other.kv_start == piece.kv_start))

    def require(self, batch: int, query_heads: int, kv_heads: int, tokens: int) -> None:
        """Raise `ModelError` unless a batch on this rank has the sizes that were planned."""
        given, planned = (batch, query_heads, kv_heads, tokens), (len(self.rows), *self.heads, self.stretch)
        if given != planned:
            raise ModelError(
                f"rows, query and key heads and tokens are {given}, planned were {planned}: plan each batch"
            )


def stretch_length(tokens: int, world: int, pattern: Pattern) -> int:
    """Tokens of each of `world` stretches of a row of `tokens` tokens, which is padded where they do not divide.

    Raises:
        ModelError: a stretch is shorter than a group or a window, or attention is full.
    """
    stretch = -(-tokens // world)
    if pattern == FULL and world > 1:
        raise ModelError(
            f"full attention with the sequence cut across {world} ranks: a halo serves shifted sparse attention and "
            "windows only; full attention goes through `ulysses_attention`"
        )
    name, reach = ("window", pattern.size) if isinstance(pattern, WindowPattern) else ("group_size", pattern.group_size)
    if stretch < reach and world > 1:
        raise ModelError(
            f"{tokens} tokens on {world} sequence ranks are stretches of {stretch}, shorter than {name}={reach}: use "
            f"at most {max(1, tokens // reach)} sequence ranks, or a longer context"
        )
    return stretch


def halo_plan(
    bounds_B: Sequence[Sequence[int]], tokens: int, pattern: Pattern, heads: tuple[int, int], rank: int, world: int
) -> HaloPlan:
    """The plan of one rank.

    Args:
        bounds_B: of each whole row the document bounds, strictly increasing from 0; what follows the last is padding.
        tokens: length of the whole rows, padding included; a multiple of `world`.
        heads: query heads and key/value heads.
        rank: of `world`, in the order of the stretches.

    Raises:
        ModelError: the bounds are wrong, the rows cannot be cut evenly, or a stretch is shorter than a group.
    """
    stretch = stretch_length(tokens, world, pattern)
    if tokens % world:
        raise ModelError(
            f"rows of {tokens} tokens on {world} sequence ranks: pad them at the end to {stretch * world} tokens"
        )
    slices = tuple(head_slices(*heads, pattern_shift(pattern)))
    rows: list[tuple[Whole | Edge, ...]] = []
    blocks: list[list[Block]] = [[], []]
    for row, bounds in enumerate(bounds_B):
        check_bounds(bounds, tokens)
        parts: list[Whole | Edge] = []
        for document, end in pairwise(bounds):
            owners = range(document // stretch, (end - 1) // stretch + 1)
            if len(owners) > 1:
                cut_document = _CutDocument(row, document, end, stretch, pattern)
                if rank in owners:
                    parts.append(cut_document.edge(rank))
                for target in owners[1:]:
                    for stage, block in cut_document.blocks(target, slices):
                        blocks[stage].append(block)
            elif rank in owners:
                _add_whole(parts, document - rank * stretch, end - rank * stretch)
        rows.append(tuple(parts))
    sends = [tuple(block for block in stage if block.source == rank) for stage in blocks]
    receives = [tuple(block for block in stage if block.target == rank) for stage in blocks]
    return HaloPlan(
        rank, world, stretch, heads, pattern, slices, tuple(rows), (sends[0], sends[1]), (receives[0], receives[1])
    )


def _add_whole(parts: list[Whole | Edge], begin: int, stop: int) -> None:
    last = parts[-1] if parts else None
    if isinstance(last, Whole):
        parts[-1] = Whole(last.begin, (*last.bounds, stop - last.begin))
    else:
        parts.append(Whole(begin, (0, stop - begin)))


class _CutDocument:
    """A document of a row, from `document` to `end`, that lies in more than one stretch."""

    def __init__(self, row: int, document: int, end: int, stretch: int, pattern: Pattern) -> None:
        self._row, self._document, self._end, self._stretch, self._pattern = row, document, end, stretch, pattern
        windowed = isinstance(pattern, WindowPattern)
        self._runs = [[] if windowed else runs(end - document, pattern, shifted=shifted) for shifted in (False, True)]

    def edge(self, rank: int) -> Edge:
        """Its part on a rank."""
        start, stop = self._span(rank)
        cuts = self._cuts(start, stop)
        return Edge(self._document + start - rank * self._stretch, stop - start, start, (cuts[0], cuts[1]))

    def blocks(self, target: int, slices: Sequence[HeadSlice]) -> Iterator[tuple[int, Block]]:
        """With its stage, what `target` needs of other ranks, by heads and positions."""
        start, stop = self._span(target)
        cuts = self._cuts(start, stop)
        heads = sorted({(piece.kv_start, piece.kv_heads) for piece in slices})
        for kv_start, kv_heads in heads:
            grids = {piece.shifted for piece in slices if piece.kv_start == kv_start}
            for first, last in _needed(start, [cuts[grid] for grid in grids]):
                for source, begin, end in self._owned(first, last):
                    yield int(False not in grids), Block(source, target, self._row, kv_start, kv_heads, begin, end)

    def _span(self, rank: int) -> tuple[int, int]:
        """First and last position in the document, plus one, of what a rank has of it."""
        start, stop = rank * self._stretch, (rank + 1) * self._stretch
        return max(start, self._document) - self._document, min(stop, self._end) - self._document

    def _cuts(self, start: int, stop: int) -> list[tuple[Run, ...]]:
        """Segments of unshifted and of shifted heads between two positions."""
        if isinstance(self._pattern, WindowPattern):  # one segment, with what its first query sees before it
            reach = max(0, start - self._pattern.size + 1)
            return [(Run(reach, stop - reach, 1),)] * 2
        return [tuple(_clipped(cut, start, stop)) for cut in self._runs]

    def _owned(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """By rank, the positions in the row of those from `first` to `last` in the document."""
        begin, end = self._document + first, self._document + last
        for rank in range(begin // self._stretch, (end - 1) // self._stretch + 1):
            yield rank, max(begin, rank * self._stretch), min(end, (rank + 1) * self._stretch)


def _clipped(cut: Sequence[Run], start: int, stop: int) -> Iterator[Run]:
    """What lies between two positions: a segment that began before them is kept from its start on, alone."""
    for run in cut:
        begin, end = max(run.start, start), min(run.stop, stop)
        if begin >= end:
            continue
        before = (begin - run.start) // run.size
        segment = run.start + before * run.size
        if segment < begin:
            yield Run(segment, min(end, segment + run.size) - segment, 1, run.sinks)
            segment += run.size
        if segment >= end:
            continue
        count, rest = divmod(end - segment, run.size)
        if count:
            yield Run(segment, run.size, count, run.sinks)
        if rest:
            yield Run(segment + count * run.size, rest, 1, run.sinks)


def _needed(start: int, cuts: Sequence[Sequence[Run]]) -> list[tuple[int, int]]:
    """Positions in the document before `start` that segments from there on see: sinks, and the segment in progress."""
    sinks = min(start, max(run.sinks for cut in cuts for run in cut))
    begun = min(start, *(cut[0].start for cut in cuts))
    if sinks >= begun:
        return [(0, start)]
    return [span for span in ((0, sinks), (begun, start)) if span[0] < span[1]]
