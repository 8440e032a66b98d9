"""Attention matrices as text: a list of strings, one a query, one letter a key.

Every cell is asked of `may_attend`, the definition of the pattern, or, for the paper's Algorithm 1, follows from the
roll that defines it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longlora.attention.pattern import S2Pattern, may_attend

FUTURE, UNSEEN, GROUP, SINK, SHORT, LEAK = " ", ".", "g", "s", "d", "x"


def pattern_cells(length: int, group_size: int, sink_tokens: int, *, shifted: bool) -> list[str]:
    """One document under the pattern of longlora."""
    pattern = S2Pattern(group_size, sink_tokens)
    short = length <= group_size

    def cell(query: int, key: int) -> str:
        if not may_attend(query, key, length, pattern, shifted=shifted):
            return FUTURE if key > query else UNSEEN
        if short:
            return SHORT
        without_sinks = may_attend(query, key, length, S2Pattern(group_size), shifted=shifted)
        return GROUP if without_sinks else SINK

    return ["".join(cell(query, key) for key in range(length)) for query in range(length)]


def rolled_cells(length: int, group_size: int) -> list[str]:
    """A shifted head of the paper's Algorithm 1: roll by half a group, attend causally in each group, roll back."""
    order = np.roll(np.arange(length), -(group_size // 2))
    seen = {(group[i], group[j]) for group in order.reshape(-1, group_size).tolist() for i in range(group_size)
            for j in range(i + 1)}  # fmt: skip

    def cell(query: int, key: int) -> str:
        if (query, key) in seen:
            return LEAK if key > query else GROUP
        return FUTURE if key > query else UNSEEN

    return ["".join(cell(query, key) for key in range(length)) for query in range(length)]


def packed_cells(lengths: Sequence[int], group_size: int, sink_tokens: int, *, shifted: bool) -> list[str]:
    """Documents one behind the other; a token of another document is not seen."""
    total, rows, start = sum(lengths), [], 0
    for length in lengths:
        for row in pattern_cells(length, group_size, sink_tokens, shifted=shifted):
            rows.append(UNSEEN * start + row + FUTURE * (total - start - length))
        start += length
    return rows
