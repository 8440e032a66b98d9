"""The plan of sequence parallelism as integers, without processes: against the definition of the pattern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora.attention.halo_plan import Block, Edge, HaloPlan, Whole, halo_plan, stretch_length
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern, may_attend, runs
from longlora.errors import LongLoraError

HEADS = [(4, 2), (9, 3), (4, 1), (1, 1)]


def plans_of(
    bounds_B: Sequence[Sequence[int]], tokens: int, pattern: Pattern, heads: tuple[int, int], world: int
) -> list[HaloPlan]:
    return [halo_plan(bounds_B, tokens, pattern, heads, rank, world) for rank in range(world)]


def positions_of(blocks: Sequence[Block], row: int, kv_start: int) -> list[int]:
    return [
        position
        for block in blocks
        if (block.row, block.kv_start) == (row, kv_start)
        for position in range(block.start, block.stop)
    ]


def seen_at_edge(edge: Edge, shifted: bool, windowed: int | None) -> Iterator[tuple[int, list[int]]]:
    """Of each query at an edge, in positions of the document, the keys that it is computed with."""
    position = edge.skipped
    for run in edge.cuts[shifted]:
        for segment in range(run.start, run.stop, run.size):
            for query in range(max(segment, edge.skipped), segment + run.size):
                assert query == position, "queries must follow each other"
                first = segment if windowed is None else max(segment, query - windowed + 1)
                yield query, [*range(run.sinks), *range(first, query + 1)]
                position += 1
    assert position == edge.skipped + edge.tokens


def assert_rank_computes_its_rows(plan: HaloPlan, bounds_B: Sequence[Sequence[int]], pattern: Pattern) -> None:
    """Every query of a stretch sees the keys of the definition, and nothing is received that no query sees."""
    begin = plan.rank * plan.stretch
    windowed = pattern.size if isinstance(pattern, WindowPattern) else None
    received = [block for stage in plan.receives for block in stage]
    for row, (bounds, parts) in enumerate(zip(bounds_B, plan.rows, strict=True)):
        documents = dict(pairwise(bounds))
        position = begin
        for part in parts:
            assert begin + part.begin == position, "parts must follow each other"
            if isinstance(part, Whole):
                for start, stop in pairwise(part.bounds):
                    assert documents[position + start] == position + stop
            position += part.tokens
        assert position == max(begin, min(begin + plan.stretch, bounds[-1])), "what is left must be padding"
        for piece in plan.slices:
            wanted: set[int] = set()
            grids = [other.shifted for other in plan.slices if other.kv_start == piece.kv_start]
            for edge, shifted in product([part for part in parts if isinstance(part, Edge)], grids):
                document = begin + edge.begin - edge.skipped
                length = documents[document] - document
                for query, keys in seen_at_edge(edge, shifted, windowed):
                    seen = [key for key in range(length) if may_attend(query, key, length, pattern, shifted=shifted)]
                    assert keys == seen
                    wanted |= {document + key for key in keys if key < edge.skipped}
            assert positions_of(received, row, piece.kv_start) == sorted(wanted)


def assert_messages_match(plans: list[HaloPlan]) -> None:
    """What one rank sends to another is what that one expects, in the same order; everybody sends only what it has."""
    for sender, receiver in product(plans, plans):
        for stage in range(2):
            sent = [block for block in sender.sends[stage] if block.target == receiver.rank]
            assert sent == [block for block in receiver.receives[stage] if block.source == sender.rank]
            begin = sender.rank * sender.stretch
            assert all(begin <= block.start < block.stop <= begin + sender.stretch for block in sent)
            assert not sent or sender.rank < receiver.rank, "causal attention needs nothing from later ranks"


def assert_right(
    bounds_B: Sequence[Sequence[int]], tokens: int, pattern: Pattern, heads: tuple[int, int], world: int
) -> None:
    plans = plans_of(bounds_B, tokens, pattern, heads, world)
    for plan in plans:
        assert_rank_computes_its_rows(plan, bounds_B, pattern)
        for stage, piece in product(range(2), plan.slices):
            if plan.stage(piece) != stage:
                assert all(block.kv_start != piece.kv_start for block in plan.receives[stage])
    assert_messages_match(plans)


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("world", [2, 3])
def test_every_small_document(world: int, sinks: int) -> None:
    """Groups of 4, stretches of 4 to 7 tokens, a document from anywhere to anywhere, with others around it."""
    for stretch in range(4, 8):
        tokens = world * stretch
        for start in range(stretch):
            for stop in range(start + 1, tokens + 1):
                bounds = sorted({0, start, stop})
                for after in ({stop}, {tokens}):
                    assert_right([sorted({*bounds, *after})], tokens, S2Pattern(4, sinks), (9, 3), world)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], int, Pattern, tuple[int, int], int]:
    group_size = draw(st.integers(1, 6)) * 2
    shift = draw(st.sampled_from(["half", "all", "none"]))
    sinks = draw(st.integers(0, group_size - 1))
    pattern = draw(
        st.sampled_from([S2Pattern(group_size, sinks, shift), WindowPattern(group_size - 1), WindowPattern(group_size)])
    )
    world, stretch = draw(st.integers(1, 4)), draw(st.integers(group_size, 3 * group_size))
    tokens = world * stretch
    cuts = st.lists(st.integers(1, tokens), max_size=6, unique=True).map(sorted)
    bounds_B = draw(st.lists(cuts.map(lambda inner: [0, *inner]), min_size=1, max_size=2))
    return bounds_B, tokens, pattern, draw(st.sampled_from(HEADS)), world


@given(batches())
@settings(max_examples=150, deadline=None)
def test_any_batch(batch: tuple[list[list[int]], int, Pattern, tuple[int, int], int]) -> None:
    assert_right(*batch)


@given(batches())
@settings(max_examples=100, deadline=None)
def test_the_halo_is_less_than_a_group_from_the_left_neighbour(
    batch: tuple[list[list[int]], int, Pattern, tuple[int, int], int],
) -> None:
    bounds_B, tokens, pattern, heads, world = batch
    for plan in plans_of(bounds_B, tokens, pattern, heads, world):
        for block in (block for stage in plan.receives for block in stage):
            document = max(bound for bound in bounds_B[block.row] if bound <= block.start)
            if isinstance(pattern, S2Pattern) and block.stop <= document + pattern.sink_tokens:
                continue  # sink tokens come from wherever the document began
            assert block.source == plan.rank - 1
            reach = pattern.size if isinstance(pattern, WindowPattern) else pattern.group_size
            assert plan.rank * plan.stretch - block.start < reach + getattr(pattern, "sink_tokens", 0)


def test_one_document_cut_on_group_bounds_needs_half_a_group_for_half_of_the_heads() -> None:
    plan = halo_plan([[0, 64]], 64, S2Pattern(8), (4, 2), 2, 4)
    assert plan.receives == ((), (Block(1, 2, 0, 1, 1, 28, 32),))
    assert plan.sends == ((), (Block(2, 3, 0, 1, 1, 44, 48),))


def test_sink_tokens_come_from_the_first_rank_of_the_document() -> None:
    plan = halo_plan([[0, 64]], 64, S2Pattern(8, 2), (4, 2), 2, 4)
    assert plan.receives[0] == (Block(0, 2, 0, 0, 1, 0, 2),)
    assert plan.receives[1] == (Block(0, 2, 0, 1, 1, 0, 2), Block(1, 2, 0, 1, 1, 28, 32))


def test_a_document_of_one_group_is_completed_in_all_heads() -> None:
    plan = halo_plan([[0, 13, 20]], 32, S2Pattern(8, 3), (4, 2), 1, 2)
    assert [(block.kv_start, block.start, block.stop) for stage in plan.receives for block in stage] == [
        (0, 13, 16),
        (1, 13, 16),
    ]


def test_documents_in_one_stretch_need_nothing() -> None:
    for rank in range(2):
        plan = halo_plan([[0, 3, 16, 32]], 32, S2Pattern(4, 1), (4, 2), rank, 2)
        assert (plan.sends, plan.receives) == (((), ()), ((), ()))
        assert all(isinstance(part, Whole) for parts in plan.rows for part in parts)


def test_a_long_document_has_few_calls() -> None:
    """Segments of a size are one run, however long the stretch is: the cost of planning and of calls stays constant."""
    plan = halo_plan([[0, 2**19]], 2**19, S2Pattern(2048, 4), (4, 2), 1, 4)
    (edge,) = plan.rows[0]
    assert isinstance(edge, Edge)
    assert [len(cut) for cut in edge.cuts] == [1, 3]
    assert len(runs(2**19, S2Pattern(2048, 4), shifted=True)) <= 4


def test_one_rank_has_everything() -> None:
    assert_right([[0, 5, 30]], 31, S2Pattern(8, 2), (4, 2), 1)
    assert_right([[0, 5]], 7, S2Pattern(8, 2), (4, 2), 1)  # a row shorter than a group


@pytest.mark.parametrize(
    ("tokens", "world", "pattern", "part"),
    [
        (64, 8, S2Pattern(16), "stretches of 8, shorter than group_size=16: use at most 4 sequence ranks"),
        (64, 2, S2Pattern(128), "use at most 1 sequence ranks"),
        (64, 8, WindowPattern(9), "shorter than window=9"),
        (64, 2, FULL, "full attention"),
    ],
)
def test_a_stretch_shorter_than_a_group_is_refused(tokens: int, world: int, pattern: Pattern, part: str) -> None:
    with pytest.raises(LongLoraError, match=part):
        stretch_length(tokens, world, pattern)
    with pytest.raises(LongLoraError, match=part):
        halo_plan([[0, tokens]], tokens, pattern, (4, 2), 0, world)


def test_rows_that_do_not_divide_are_padded_first() -> None:
    assert stretch_length(63, 4, S2Pattern(8)) == 16
    with pytest.raises(LongLoraError, match="pad them at the end to 64 tokens"):
        halo_plan([[0, 63]], 63, S2Pattern(8), (4, 2), 0, 4)


@pytest.mark.parametrize("bounds", [[], [1, 4], [0, 4, 4], [0, 65]])
def test_bad_bounds_are_refused(bounds: list[int]) -> None:
    with pytest.raises(LongLoraError, match="document bounds"):
        halo_plan([bounds], 64, S2Pattern(8), (4, 2), 0, 4)


def test_a_batch_of_other_sizes_is_refused() -> None:
    plan = halo_plan([[0, 64]], 64, S2Pattern(8), (4, 2), 0, 4)
    plan.require(1, 4, 2, 16)
    with pytest.raises(LongLoraError, match=r"planned were \(1, 4, 2, 16\)"):
        plan.require(1, 4, 2, 64)
