"""Layouts: what is the same, and what is refused."""

import re

import pytest
from attention_cases import layout, qkv

from longlora.attention.layout import Layout
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern
from longlora.errors import ModelError


def test_that_of_tensors() -> None:
    q, k, _ = qkv(2, 4, 2, 8)
    of = Layout.of(q, k, [[0, 3, 8], [0, 7]], FULL)
    assert of == layout([[0, 3, 8], [0, 7]], 8, FULL, (4, 2))
    assert hash(of) == hash(layout([[0, 3, 8], [0, 7]], 8, FULL, (4, 2)))


@pytest.mark.parametrize("bounds", [[0, 9], [], [1, 8], [0, 4, 4]])
def test_bad_bounds_are_refused(bounds: list[int]) -> None:
    with pytest.raises(ModelError, match=re.escape("document bounds ")):
        layout([[0, 8], bounds], 8, FULL)


@pytest.mark.parametrize(
    ("pattern", "split", "shift"),
    [
        (S2Pattern(4), True, "half"),
        (S2Pattern(4, 1, "all"), True, "all"),
        (S2Pattern(4, 1, "none"), True, "none"),
        (S2Pattern(6), False, "none"),  # the longest document has 6 tokens
        (WindowPattern(2), False, "none"),
        (FULL, False, "none"),
    ],
)
def test_what_is_cut(pattern: Pattern, split: bool, shift: str) -> None:
    of = layout([[0, 1, 7], [0, 5]], 8, pattern)
    assert (of.split, of.shift) == (split, shift)
    assert layout([[0]], 8, pattern).shift == "none"
