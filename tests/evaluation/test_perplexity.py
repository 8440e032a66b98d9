"""The press protocol: every token once; windows, tails and positions with hand-computed values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longlora.evaluation.perplexity import Window, document_rows, press_windows


@given(st.integers(2, 300), st.integers(2, 64), st.integers(1, 64))
def test_every_token_but_the_first_is_scored_once(tokens: int, context: int, stride: int) -> None:
    scored = [0] * tokens
    for window in press_windows(tokens, context, stride):
        assert 0 <= window.start < window.stop <= tokens
        assert window.stop - window.start <= context
        assert len(range(window.start, window.stop)) == min(context, tokens)
        assert window.first_scored > window.start
        for position in range(window.first_scored, window.stop):
            scored[position] += 1
    assert scored == [0] + [1] * (tokens - 1)


def test_a_stride_of_one_gives_every_token_a_full_window() -> None:
    windows = press_windows(10, 4, 1)
    assert windows[0] == Window(0, 4, 1)
    assert windows[1:] == [Window(stop - 4, stop, stop - 1) for stop in range(5, 11)]


def test_disjoint_windows_overlap_by_the_token_that_nothing_predicts() -> None:
    rows, _ = document_rows("d", fake_losses(0, 3), [True] * 9, [3], None, 9, fake_losses)
    assert rows[0]["tokens"] == 8
    # Windows 0-3, 2-5, 4-7, 6-9: each scores its last two tokens.
    expected = [position + (0.01 if position % 2 else 0.02) for position in range(1, 9)]
    assert rows[0]["loss"] == pytest.approx(sum(expected) / 8)


def fake_losses(start: int, stop: int) -> torch.Tensor:
    """The loss of a token is its position in the document plus a hundredth of the context it is given."""
    position = torch.arange(start, stop).float()
    losses = position + (position - start) / 100
    losses[0] = torch.nan
    return losses


def test_rows_and_positions() -> None:
    calls = []

    def losses_of(start: int, stop: int) -> torch.Tensor:
        calls.append((start, stop))
        return fake_losses(start, stop)

    scored = [True] * 3000
    scored[5] = False
    rows, positions = document_rows("d", fake_losses(0, 2048), scored, [1000, 2048], None, None, losses_of)
    long, short = rows
    assert not calls, "the shorter window begins where the longer one does and is not read again"
    counted = [p for p in range(1, 2048) if p != 5]
    assert long["tokens"] == len(counted)
    assert long["loss"] == pytest.approx(sum(p * 1.01 for p in counted) / len(counted))
    assert long["tail_tokens"] == 1024
    assert long["tail_loss"] == pytest.approx(sum(p * 1.01 for p in range(1024, 2048)) / 1024)
    counted = [p for p in range(1, 1000) if p != 5]
    assert short["loss"] == pytest.approx(sum(p * 1.01 for p in counted) / len(counted))
    assert short["tail_tokens"] == len(counted)
    assert [(row["start"], row["stop"], row["tokens"]) for row in positions] == [(0, 1024, 1022), (1024, 2048, 1024)]


def test_strided_windows_over_more_of_the_document() -> None:
    rows, _ = document_rows("d", fake_losses(0, 4), [True] * 12, [4], 2, 12, fake_losses)
    # Windows 0-4, 2-6, 4-8, 6-10, 8-12; the first scores 1 to 3, the others their last two.
    expected = [1.01, 2.02, 3.03] + [position + 0.02 + (position % 2) / 100 for position in range(4, 12)]
    assert rows[0]["tokens"] == 11
    assert rows[0]["loss"] == pytest.approx(sum(expected) / 11)
