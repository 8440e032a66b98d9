"""Loss on held-out documents, by the protocol of Press et al. (2021, section 2), and by position.

Windows of `context_length` tokens advance by `stride`; a window scores only the tokens that no earlier one scored, so
that every token but the first of a document is scored exactly once. Windows never cross documents. Losses are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TAIL_TOKENS = 1024
_BUCKET_TOKENS = 1024


@dataclass(frozen=True)
class Window:
    """Tokens start..stop of a document are read, of which first_scored..stop count."""

    start: int
    stop: int
    first_scored: int


def press_windows(tokens: int, context_length: int, stride: int) -> list[Window]:
    """Windows over a document of `tokens` tokens; the last one is moved back to be full where it can be.

    Nothing predicts the first token of a window, so windows overlap by at least one token.

    >>> [(w.start, w.stop, w.first_scored) for w in press_windows(10, context_length=5, stride=5)]
    [(0, 5, 1), (4, 9, 5), (5, 10, 9)]
    """
    windows: list[Window] = []
    scored, stop = 1, min(context_length, tokens)
    while scored < tokens:
        windows.append(Window(max(0, stop - context_length), stop, scored))
        scored, stop = stop, min(stop + min(stride, context_length - 1), tokens)
    return windows


def first_window(context_lengths: Sequence[int], tokens_per_document: int | None) -> int:
    """Tokens of the longest window that begins where a document begins."""
    return max(min(context_length, tokens_per_document or context_length) for context_length in context_lengths)


def document_rows(
    name: str,
    first_losses: Tensor,
    scored: Sequence[bool],
    context_lengths: Sequence[int],
    stride: int | None,
    tokens_per_document: int | None,
    losses_of: Callable[[int, int], Tensor],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of one document: one for each context length, and the loss by position at the longest.

    Args:
        first_losses: losses [first_window] of a reading of the document from its beginning.
        scored: for each token of the document, whether it counts; false for those that an evaluation put in.
        tokens_per_document: tokens of the document that are scored; the context length itself if None.
        losses_of: (start, stop) -> losses [stop - start] of a fresh reading of these tokens, for the other windows. One
            that begins where a longer one begins is not read again: with full attention its losses are the same.
    """
    counts = torch.tensor(scored)
    read = {0: first_losses}

    def losses(window: Window) -> Tensor:
        known = read.get(window.start)
        if known is None or len(known) < window.stop - window.start:
            known = read[window.start] = losses_of(window.start, window.stop)
        return known[: window.stop - window.start]

    rows = []
    for context_length in sorted(context_lengths, reverse=True):
        total = min(len(scored), tokens_per_document or context_length)
        advance = min(stride or context_length, context_length)
        windows = press_windows(total, context_length, advance)
        parts = [_part(losses(window), counts, window) for window in windows]
        all_losses = torch.cat(parts)
        first = windows[0]
        tail = losses(first)[-TAIL_TOKENS:][counts[: first.stop][-TAIL_TOKENS:]]
        tail = tail[~tail.isnan()]
        rows.append(
            {
                "document": name,
                "context_length": context_length,
                "stride": advance,
                "protocol": "press",
                "tokens": len(all_losses),
                "loss": all_losses.double().mean().item(),
                "tail_tokens": len(tail),
                "tail_loss": tail.double().mean().item() if len(tail) else None,
            }
        )
    positions = []
    for start in range(0, len(first_losses), _BUCKET_TOKENS):
        stop = min(start + _BUCKET_TOKENS, len(first_losses))
        part = first_losses[start:stop][counts[start:stop]]
        part = part[~part.isnan()]
        if len(part):
            mean = part.double().mean().item()
            positions.append({"document": name, "start": start, "stop": stop, "tokens": len(part), "loss": mean})
    return rows, positions


def _part(losses: Tensor, counts: Tensor, window: Window) -> Tensor:
    wanted = slice(window.first_scored - window.start, None)
    return losses[wanted][counts[window.first_scored : window.stop]]
