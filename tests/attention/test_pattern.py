"""The pattern as integers: the cuts that the fast path uses against the definition."""

import pytest

from longlora.attention.pattern import (
    S2Pattern,
    WindowPattern,
    check_bounds,
    head_slices,
    may_attend,
    runs,
    shifted_heads,
)
from longlora.errors import LongLoraError


@pytest.mark.parametrize("group_size", [2, 4, 6])
@pytest.mark.parametrize("shifted", [False, True])
def test_runs_cut_what_the_definition_says(group_size: int, shifted: bool) -> None:
    for sinks in range(group_size):
        pattern = S2Pattern(group_size, sinks)
        for length in range(2 * group_size * 2 + 2):
            seen = {
                (i, j)
                for i in range(length)
                for j in range(length)
                if may_attend(i, j, length, pattern, shifted=shifted)
            }
            made = set()
            position = 0
            for run in runs(length, pattern, shifted=shifted):
                assert run.start == position
                position = run.stop
                for segment in range(run.count):
                    start = run.start + segment * run.size
                    for i in range(start, start + run.size):
                        keys = [*range(run.sinks), *range(start, i + 1)]
                        assert len(keys) == len(set(keys)), "a sink must not be counted twice"
                        made |= {(i, j) for j in keys}
            assert position == length
            assert made == seen


@pytest.mark.parametrize("window", [1, 2, 5, 16, 33, 70])
def test_blocks_of_a_window_cut_what_the_definition_says(window: int) -> None:
    for length in (*range(1, 8), 16, 33, 34, 70, 71, 150):
        position = 0
        for run in runs(length, WindowPattern(window), shifted=False):
            assert run.start == position
            position = run.stop
            assert run.start - run.history >= 0, "a block must not reach back before the document"
            for query in range(run.start, run.stop):
                segment = run.start + (query - run.start) // run.size * run.size
                first = query - run.history if run.history else segment
                seen = [
                    key for key in range(length) if may_attend(query, key, length, WindowPattern(window), shifted=False)
                ]
                assert seen == [*range(first, query + 1)]
        assert position == length


def test_no_position_sees_a_later_one_and_all_see_themselves() -> None:
    pattern = S2Pattern(4, 1)
    for shifted in (False, True):
        for i in range(20):
            assert may_attend(i, i, 20, pattern, shifted=shifted)
            assert not any(may_attend(i, j, 20, pattern, shifted=shifted) for j in range(i + 1, 20))


def test_wrap_around_does_not_happen() -> None:
    # The first half group of a shifted head is alone: the paper's roll would join it with the end.
    assert runs(16, S2Pattern(8), shifted=True)[0].size == 4
    assert [run.size for run in runs(16, S2Pattern(8), shifted=True)] == [4, 8, 4]


def test_a_document_of_one_group_is_one_segment_for_all_heads() -> None:
    for shifted in (False, True):
        assert [(run.start, run.stop, run.count) for run in runs(8, S2Pattern(8, 3), shifted=shifted)] == [(0, 8, 1)]


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(9, 3), (8, 8), (8, 2), (4, 1), (1, 1), (6, 2), (15, 5), (32, 8), (3, 3)]
)
def test_head_slices_cover_all_heads_in_order(heads: int, kv_heads: int) -> None:
    share = heads // kv_heads
    head = 0
    for piece in head_slices(heads, kv_heads):
        assert piece.query_heads % piece.kv_heads == 0
        per_kv = piece.query_heads // piece.kv_heads
        for offset in range(piece.query_heads):
            assert (head + offset) // share == piece.kv_start + offset // per_kv
            assert piece.shifted == (head + offset >= heads - shifted_heads(heads))
        head += piece.query_heads
    assert head == heads


@pytest.mark.parametrize(
    ("group_size", "sinks", "part"),
    [
        (0, 0, "group_size=0"),
        (3, 0, "group_size=3"),
        (-4, 0, "group_size=-4"),
        (4, 4, "sink_tokens=4"),
        (4, -1, "sink_tokens=-1"),
    ],
)
def test_bad_settings_are_refused(group_size: int, sinks: int, part: str) -> None:
    with pytest.raises(LongLoraError, match=part):
        S2Pattern(group_size, sinks)


@pytest.mark.parametrize("bounds", [[], [1, 4], [0, 4, 4], [0, 5, 3], [0, 9]])
def test_bad_bounds_are_refused(bounds: list[int]) -> None:
    with pytest.raises(LongLoraError, match="document bounds"):
        check_bounds(bounds, 8)
