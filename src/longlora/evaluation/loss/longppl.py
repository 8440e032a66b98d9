"""LongPPL (Fang et al. 2024, arXiv 2410.23771): perplexity on the tokens that a long context makes predictable.

An evaluator model reads a document with all of its context and again with a short one. A token is a key token if the
long context lowers its loss by more than `gain` (alpha) and leaves it below `ceiling` (beta: published as a
log-probability of -2, so 2 nats here). A model under test is then measured on the key tokens alone. Where it has
another tokenizer than the evaluator, key tokens are carried over as ranges of characters.

Differences from the published code: the first block behind the short context is not read again, because its short
context is the long one; ranges are plain integers that are never evaluated as program text; a token without characters,
such as BOS, is never a key token. Losses are in nats. T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from longlora.config.evaluation import LongPPLConfig
from longlora.data.shards import bound_tokens
from longlora.errors import DataError

Span = tuple[int, int]
"""First character and the one behind the last."""


@dataclass(frozen=True)
class KeyDocument:
    """What a model under test reads, and which of its tokens count; plain values, so that they can be kept as JSON."""

    name: str
    tokens: list[int]
    key: list[bool]
    """For each token, whether it is a key token."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of a text with the characters each of them covers; (n, n) for those that a tokenizer puts in."""

    tokens: list[int]
    spans: list[Span]


def short_losses(losses_of: Callable[[int, int], Tensor], tokens: int, short_context: int, block_tokens: int) -> Tensor:
    """Losses [tokens] with a short context: `block_tokens` tokens share one, which begins `short_context` before them.

    NaN for the first `short_context` + `block_tokens` tokens: their short context is the long one, so no gain is
    possible there.

    Args:
        losses_of: (start, stop) -> losses [stop - start] of a fresh reading of these tokens.
    """
    losses_T = torch.full((tokens,), torch.nan)
    for start in range(block_tokens, tokens - short_context, block_tokens):
        stop = min(start + short_context + block_tokens, tokens)
        losses_T[start + short_context : stop] = losses_of(start, stop)[short_context:]
    return losses_T


def key_tokens(losses_long_T: Tensor, losses_short_T: Tensor, gain: float, ceiling: float) -> Tensor:
    """Key tokens, bool [T]: the long context lowers the loss by more than `gain`, and to less than `ceiling` nats.

    Unknown losses (NaN) make no key token.
    """
    return (losses_short_T - losses_long_T > gain) & (losses_long_T < ceiling)


def key_loss(losses_T: Tensor, mask_T: Tensor) -> float | None:
    """Mean loss over key tokens, in nats, the logarithm of LongPPL; None where there are none."""
    losses = losses_T[mask_T]
    return float(losses.double().mean()) if len(losses) else None


def encode_with_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Tokens of `text`, with a BOS in front if the tokenizer puts one there itself.

    Raises:
        DataError: the tokenizer does not say which characters its tokens stand for.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} of {tokenizer.name_or_path or 'the model'} gives no character offsets, which "
            "LongPPL needs to compare two tokenizers: take an evaluator with the tokenizer of the model"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    before, _ = bound_tokens(tokenizer)
    spans = [(int(start), int(stop)) for start, stop in encoded["offset_mapping"]]
    return Encoded([*before, *encoded["input_ids"]], [(0, 0)] * len(before) + spans)


def key_spans(mask: Sequence[bool], spans: Sequence[Span]) -> list[Span]:
    """Ranges of characters that key tokens cover, in ascending order; what touches or overlaps is one range.

    >>> key_spans([True, True, False, True], [(0, 2), (2, 5), (5, 6), (6, 9)])
    [(0, 5), (6, 9)]
    """
    found: list[Span] = []
    for start, stop in sorted(span for is_key, span in zip(mask, spans, strict=True) if is_key):
        if start == stop:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def tokens_in_spans(spans: Sequence[Span], keys: Sequence[Span]) -> list[bool]:
    """For each token, whether all of its characters lie in one of the ranges `keys` (from `key_spans`).

    >>> tokens_in_spans([(0, 1), (1, 5), (4, 7)], [(0, 5)])
    [True, True, False]
    """
    inside, place = [], 0
    for start, stop in spans:
        while place < len(keys) and keys[place][1] <= start:
            place += 1
        inside.append(start < stop and place < len(keys) and keys[place][0] <= start and stop <= keys[place][1])
    return inside


def least_tokens(settings: LongPPLConfig) -> int:
    """Tokens of the shortest document that can have a key token."""
    return settings.short_context + settings.block_tokens + 1


def long_enough(
    documents: Sequence[tuple[str, list[int]]], context_length: int, settings: LongPPLConfig
) -> tuple[list[tuple[str, list[int]]], int]:
    """Names and tokens of documents that can have key tokens, cut to `context_length`, and how many were left out.

    Raises:
        DataError: the context or every document ends before the first token that could be one.
    """
    needed = least_tokens(settings)
    parts = f"short_context {settings.short_context} + block_tokens {settings.block_tokens}"
    if context_length < needed:
        raise DataError(
            f"eval.longppl.context_length {context_length} has no room behind {parts}: "
            f"raise it to {needed} or more, or lower eval.longppl.short_context"
        )
    kept = [(name, tokens[:context_length]) for name, tokens in documents if len(tokens) >= needed]
    if not kept:
        longest = max((len(tokens) for _, tokens in documents), default=0)
        raise DataError(
            f"no document has the {needed} tokens that LongPPL needs ({parts} + 1), the longest has {longest}: "
            "give longer ones or lower eval.longppl.short_context"
        )
    return kept, len(documents) - len(kept)


def key_document(
    name: str,
    tokens: list[int],
    read_losses: Callable[[Sequence[int]], Tensor],
    settings: LongPPLConfig,
    *,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
    context_length: int | None = None,
) -> KeyDocument:
    """Key tokens of one document, found by the evaluator behind `read_losses`.

    Args:
        tokens: [T] document, from `long_enough`, in ids of the model under test.
        read_losses: tokens -> losses of the evaluator, [same length], each call a fresh reading; NaN for the first.
        tokenizers: of the model under test and of the evaluator, where they differ; the document is then decoded and
            tokenized by both, so that its tokens may become others.
        context_length: tokens that the evaluator reads at most; for `tokenizers` only, which change their number.

    Raises:
        DataError: a tokenizer gives no character offsets.
    """
    if tokenizers is None:
        return KeyDocument(name, tokens, _find(tokens, read_losses, settings))
    own, other = tokenizers
    text = own.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = text.rstrip("\ufffd")  # a character that was cut with the document
    evaluated, tested = encode_with_spans(other, text), encode_with_spans(own, text)
    count = context_length or len(evaluated.tokens)
    spans = evaluated.spans[:count]
    keys = key_spans(_find(evaluated.tokens[:count], read_losses, settings), spans)
    # Both models read the same text: what the evaluator's context cuts off is not read by the other one either.
    end = spans[-1][1]
    read = sum(stop <= end for _, stop in tested.spans)
    return KeyDocument(name, tested.tokens[:read], tokens_in_spans(tested.spans[:read], keys))


def _find(tokens: list[int], read_losses: Callable[[Sequence[int]], Tensor], settings: LongPPLConfig) -> list[bool]:
    long_T = read_losses(tokens)
    short_T = short_losses(
        lambda start, stop: read_losses(tokens[start:stop]), len(tokens), settings.short_context, settings.block_tokens
    )
    return [bool(is_key) for is_key in key_tokens(long_T, short_T, settings.gain, settings.ceiling).tolist()]


def longppl_row(
    document: KeyDocument, losses_T: Tensor, settings: LongPPLConfig, *, context_length: int, evaluator: str
) -> dict[str, Any]:
    """The row of one document for one model.

    A document without key tokens has loss None; over documents, losses are to be weighted by `key_tokens`.

    Args:
        losses_T: losses of the model under test on `document.tokens`, read from their beginning; NaN for the first.
        context_length: tokens of the evaluator's long context.
        evaluator: name of the evaluator.
    """
    mask_T = torch.tensor(document.key, dtype=torch.bool)
    known_T = ~losses_T.isnan()
    return {
        "document": document.name,
        "context_length": context_length,
        "short_context": settings.short_context,
        "tokens": int(known_T.sum()),
        "key_tokens": int((mask_T & known_T).sum()),
        "loss": key_loss(losses_T, mask_T & known_T),
        "all_loss": key_loss(losses_T, known_T),
        "evaluator": evaluator,
        "alpha": settings.gain,
        "beta": settings.ceiling,
    }
