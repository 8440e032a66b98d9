"""Loss on held-out documents by three protocols, by position, and the bytes of text behind it. Losses are in nats.

``press`` (Press et al. 2021, section 2) is the one to report: windows of `context_length` tokens advance by `stride`; a
window scores only the tokens that no earlier one scored, so that every token but the first of a document is scored
exactly once. ``longlora`` is what the original LongLoRA code computes, for comparison with the paper's tables only: the
mean over all positions of windows that advance by 256. It scores a token in many windows, with contexts from one token
to a whole window, and costs context / stride readings of each token: 128 at 32,768. ``truncate`` reads the first
`context_length` tokens of a document and no more. Windows never cross documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longlora.errors import DataError

Protocol = Literal["press", "longlora", "truncate"]

LONGLORA_STRIDE = 256
TAIL_TOKENS = 1024
_BUCKET_TOKENS = 1024
_CHARACTER_BYTES = 4
_CUT_TOKENS = 8  # at the end of a cut document, text may be tokenized otherwise than in front of the rest
_CUT_CHARACTER = "\ufffd"


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


def longlora_windows(tokens: int, context_length: int, stride: int = LONGLORA_STRIDE) -> list[Window]:
    """Complete windows from every `stride`-th token on, without the last, as the original's ``eval.py`` has them.

    The original asks for one token behind each window and then drops the last window that has one.

    >>> [(w.start, w.stop) for w in longlora_windows(13, context_length=4, stride=3)]
    [(0, 4), (3, 7)]
    """
    starts = range(0, tokens - context_length, stride)[:-1]
    return [Window(start, start + context_length, start + 1) for start in starts]


def first_window(context_lengths: Sequence[int], tokens_per_document: int | None, protocol: Protocol = "press") -> int:
    """Tokens of the longest window that begins where a document begins."""
    if protocol != "press":
        return max(context_lengths)
    return max(min(context_length, tokens_per_document or context_length) for context_length in context_lengths)


def needed_tokens(
    protocol: Protocol, context_lengths: Sequence[int], stride: int | None, tokens_per_document: int | None
) -> int:
    """Tokens that a document must have, and that are read of it at most.

    Raises:
        DataError: `tokens_per_document` leaves no window to ``longlora``.
    """
    longest = max(context_lengths)
    if protocol == "truncate":
        return longest
    if protocol == "press":
        return max(longest, tokens_per_document or 0)
    needed = _one_window(longest, stride)
    if tokens_per_document is not None and tokens_per_document < needed:
        raise DataError(
            f"eval.perplexity.tokens_per_document {tokens_per_document}: protocol longlora needs {needed} tokens for "
            f"one window of {longest}; raise it or lower eval.perplexity.context_lengths"
        )
    return tokens_per_document or needed


def _one_window(context_length: int, stride: int | None) -> int:
    return context_length + (stride or LONGLORA_STRIDE) + 1


def document_rows(
    name: str,
    first_losses: Tensor,
    scored: Sequence[bool],
    context_lengths: Sequence[int],
    stride: int | None,
    tokens_per_document: int | None,
    losses_of: Callable[[int, int], Tensor],
    *,
    protocol: Protocol = "press",
    bytes_until: Callable[[int], int] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of one document: one for each context length, and the loss by position at the longest.

    Args:
        first_losses: losses [first_window] of a reading of the document from its beginning.
        scored: for each token of the document, whether it counts; false for those that an evaluation put in.
        stride: tokens a window advances; None: the context length, or 256 with ``longlora``.
        tokens_per_document: first tokens of the document that windows lie in; None: enough for one window.
        losses_of: (start, stop) -> losses [stop - start] of a fresh reading of these tokens, for the other windows. One
            that begins where a longer one begins is not read again: with full attention its losses are the same.
        bytes_until: from `byte_counter`; None: the rows' ``bytes`` are None. With ``longlora`` the bytes of a token
            count as often as its loss does, so that bits per byte are loss * tokens / ln 2 / bytes in every protocol.

    Raises:
        DataError: the document has no window (``longlora`` only), or nothing in it counts.
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
        windows, advance = _windows(protocol, len(scored), context_length, stride, tokens_per_document)
        if not windows:
            raise DataError(
                f"document {name} has {len(scored)} tokens: protocol {protocol} needs "
                f"{_one_window(context_length, stride)} for one window of {context_length}; give longer documents or "
                "lower eval.perplexity.context_lengths"
            )
        all_losses = torch.cat([_part(losses(window), counts, window) for window in windows])
        if not len(all_losses):
            raise DataError(f"document {name} has no token that counts in its first {context_length}: leave it out")
        first = windows[0]
        tail = _known(losses(first)[-TAIL_TOKENS:], counts[: first.stop][-TAIL_TOKENS:])
        rows.append(
            {
                "document": name,
                "context_length": context_length,
                "stride": advance,
                "protocol": protocol,
                "tokens": len(all_losses),
                "loss": _mean(all_losses),
                "bytes": _bytes(windows, bytes_until),
                "tail_tokens": len(tail),
                "tail_loss": _mean(tail) if len(tail) else None,
            }
        )
    return rows, _positions(name, first_losses, counts)


def _windows(
    protocol: Protocol, tokens: int, context_length: int, stride: int | None, tokens_per_document: int | None
) -> tuple[list[Window], int]:
    """Windows over a document of `tokens` tokens, and how far they advance."""
    if protocol == "longlora":
        total = min(tokens, tokens_per_document or _one_window(context_length, stride))
        return longlora_windows(total, context_length, stride or LONGLORA_STRIDE), stride or LONGLORA_STRIDE
    if protocol == "truncate":
        return press_windows(min(tokens, context_length), context_length, context_length), context_length
    advance = min(stride or context_length, context_length)
    return press_windows(min(tokens, tokens_per_document or context_length), context_length, advance), advance


def _positions(name: str, losses: Tensor, counts: Tensor) -> list[dict[str, Any]]:
    positions = []
    for start in range(0, len(losses), _BUCKET_TOKENS):
        stop = min(start + _BUCKET_TOKENS, len(losses))
        part = _known(losses[start:stop], counts[start:stop])
        if len(part):
            row = {"document": name, "start": start, "stop": stop, "tokens": len(part), "loss": _mean(part)}
            positions.append(row)
    return positions


def _part(losses: Tensor, counts: Tensor, window: Window) -> Tensor:
    wanted = slice(window.first_scored - window.start, None)
    return losses[wanted][counts[window.first_scored : window.stop]]


def _known(losses: Tensor, counts: Tensor) -> Tensor:
    """Losses that count; that of a window's first token is NaN and does not."""
    losses = losses[counts]
    return losses[~losses.isnan()]


def _mean(losses: Tensor) -> float:
    return float(losses.double().mean())


def _bytes(windows: Sequence[Window], bytes_until: Callable[[int], int] | None) -> int | None:
    if bytes_until is None:
        return None
    # Where one window begins to score, the one before has stopped, in most protocols: nothing is to be counted there.
    times: Counter[int] = Counter()
    for window in windows:
        times[window.stop] += 1
        times[window.first_scored] -= 1
    return sum(count * bytes_until(position) for position, count in times.items() if count) or None


def byte_counter(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], scored: Sequence[bool]
) -> Callable[[int], int] | None:
    """position -> UTF-8 bytes of the text of the scored tokens in front of it; None where they cannot be known exactly.

    A character belongs to the token that completes it, so the bytes of ranges of tokens add up to those of the whole
    even where characters are split over tokens. Tokens that do not count and special ones have no bytes. What is
    counted is decoded text, so it is known only if that text gives the same tokens again (but for the last few, which
    may have been cut from what followed) and no token is unknown.

    Args:
        tokens: [T], whole document; without those that do not count it is text as it was tokenized, or its beginning.
        scored: [T], whether each token counts.
    """
    kept = [int(token) for token, counts in zip(tokens, scored, strict=True) if counts]
    kept_before = list(accumulate(map(int, scored), initial=0))

    def decode(count: int) -> str:
        return str(tokenizer.decode(kept[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    # Of all tokens or up to three fewer, which end where a character ends, if the document was cut within one.
    ends = map(decode, range(len(kept), max(-1, len(kept) - _CHARACTER_BYTES), -1))
    text = next((text for text in ends if not text.endswith(_CUT_CHARACTER)), None)
    if text is None or not _gives_again(tokenizer, text, kept):
        return None

    @cache
    def bytes_until(position: int) -> int:
        # Where a character is cut, its beginning is decoded to the replacement character, by some decoders with what
        # is in front of it; without the tokens of the cut character, at most three, the text begins with what is
        # decoded. A genuine replacement character looks the same and counts with what follows it.
        parts = map(decode, range(kept_before[position], -1, -1))
        whole = (part for part in parts if text.startswith(part) and not part.endswith(_CUT_CHARACTER))
        return len(next(whole).encode())

    return bytes_until


def _gives_again(tokenizer: PreTrainedTokenizerBase, text: str, tokens: Sequence[int]) -> bool:
    """Whether `text` is tokenized to `tokens`, but for special ones and the last few."""
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if tokenizer.unk_token_id in tokens and tokenizer.unk_token_id not in others:
        return False
    special = set(tokenizer.all_special_ids)
    plain = [token for token in tokens if token not in special]
    again = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    sure = max(0, len(plain) - _CUT_TOKENS)
    return abs(len(again) - len(plain)) <= _CUT_TOKENS and again[:sure] == plain[:sure]
