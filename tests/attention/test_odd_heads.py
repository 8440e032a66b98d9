"""Odd numbers of heads, and scores with another factor: what a reference that shares code cannot tell."""

from __future__ import annotations

import torch
from attention_cases import qkv

from longlora.attention.pattern import S2Pattern, shifted_heads
from longlora.attention.reference import reference_attention
from longlora.attention.rolled import rolled_attention


def test_wraparound_takes_the_scaling_and_odd_numbers_of_heads() -> None:
    """From the first half group on, which alone leaks, it is the pattern: with any factor of the scores."""
    q, k, v = qkv(1, 3, 3, 16)
    rolled = rolled_attention(q, k, v, group_size=8, scaling=0.7)
    truth = reference_attention(q, k, v, [[0, 16]], S2Pattern(8), scaling=0.7)
    torch.testing.assert_close(rolled[:, 4:12], truth[:, 4:12])


def test_of_an_odd_number_of_heads_the_smaller_part_is_shifted() -> None:
    assert [shifted_heads(heads) for heads in (9, 8, 3, 1)] == [4, 4, 1, 0]
    assert (shifted_heads(9, "all"), shifted_heads(9, "none")) == (9, 0)
