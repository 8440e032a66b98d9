"""One conversation -> token ids with a flag a token, short enough for the context.

What is trained on has to be what the model is given and gives later: the prompt is tokenized as it is when it stands
alone, and an answer as it continues it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from longlora.data.formats import decode
from longlora.data.instruct_examples import Example
from longlora.data.instruct_template import render, special_tokens
from longlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["middle", "head", "tail"]
Unusable = Literal["empty", "undecodable", "control_tokens"]
"""An answer is empty, a text is no valid Unicode, or it would become control tokens, such as the end of an answer."""


@dataclass(frozen=True)
class Encoded:
    """Token ids, flags (1: to be learned), and how many tokens of its documents were taken out."""

    tokens: list[int]
    mask: list[int]
    removed: int = 0


class Encoder:
    """Conversations to tokens with one tokenizer, whose chat template is set.

    Args:
        context_length: tokens of the longest example.
        shorten: where tokens of a document are taken out of a longer one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int, shorten: Side) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length
        self._shorten = shorten
        self._control = re.compile("|".join(map(re.escape, special_tokens(tokenizer))) or "(?!)")

    def unusable(self, example: Example) -> Unusable | None:
        """Why `example` can neither be learned nor asked, or None."""
        if any(message.role == "assistant" and not message.content.strip() for message in example.messages):
            return "empty"
        if any(decode(message.content) is None for message in example.messages):
            return "undecodable"
        if any(self._control.search(message.content) for message in example.messages):
            return "control_tokens"
        return None

    def encode(self, example: Example) -> Encoded | None:
        """`example` in at most `context_length` tokens; None if it is longer even without its documents.

        Raises:
            DataError: as `render`, or the tokenizer does not say which characters its tokens stand for.
        """
        # For the first example, however short it is: the first one that is too long may come after hours.
        if not self._tokenizer.is_fast:
            raise DataError(
                f"{type(self._tokenizer).__name__} of {self._tokenizer.name_or_path or 'the model'} gives no character "
                "offsets, which instructions need to shorten documents: take a model with a fast tokenizer"
            )
        tokens, mask = self._tokens(example)
        before = len(tokens)
        # More than once only where tokens merge differently around the cut.
        while (excess := len(tokens) - self._context_length) > 0:
            shorter = self._without(example, excess)
            if shorter is None:
                return None
            example = shorter
            tokens, mask = self._tokens(example)
        return Encoded(tokens, mask, before - len(tokens))

    def prompt(self, example: Example) -> list[int]:
        """The tokens that a model is given to say the last answer of `example`, as they are in training.

        Raises:
            DataError: as `render`.
        """
        tokens, mask = self._tokens(example)
        if 1 not in mask:
            raise DataError(f"{example.place}: the template writes nothing of its answers")
        end = len(mask) - mask[::-1].index(1)
        return tokens[: len(mask[:end]) - mask[:end][::-1].index(0)]

    def _without(self, example: Example, excess: int) -> Example | None:
        """`example` with `excess` tokens less in its longest document; None if that does not have as many."""
        longest = max(range(len(example.messages)), key=lambda index: len(example.messages[index].document))
        document = example.messages[longest].document
        offsets = self._tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        kept = len(offsets) - excess
        if kept <= 0:
            return None
        first = {"head": 0, "tail": kept, "middle": (kept + 1) // 2}[self._shorten]
        # One character at least: some tokens stand for none, and taking out nothing would never end.
        start = min(offsets[first][0], len(document) - 1)
        stop = max(offsets[first + excess - 1][1], start + 1)
        return example.with_document(longest, document[:start] + document[stop:])

    def _tokens(self, example: Example) -> tuple[list[int], list[int]]:
        turns = [{"role": message.role, "content": message.content} for message in example.messages]
        rendered = render(self._tokenizer, turns, example.place)
        text = rendered.text
        bounds = [0, *itertools.chain.from_iterable(rendered.spans), len(text)]
        pieces = [self._ids(text[start:stop]) for start, stop in itertools.pairwise(bounds)]
        joined, whole = list(itertools.chain.from_iterable(pieces)), self._ids(text)
        ends = list(itertools.accumulate(map(len, pieces)))
        if joined != whole:
            # Some tokenizers write the beginning of a text differently. Where tokens merge over a bound, though, the
            # pieces are right: the model is never given a prompt that ends inside of a token.
            prefixes = [self._ids(text[:stop]) for stop in bounds[1:]]
            if all(whole[: len(prefix)] == prefix for prefix in prefixes):
                joined, ends = whole, [len(prefix) for prefix in prefixes]
        return joined, _flags(ends)

    def _ids(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _flags(ends: Sequence[int]) -> list[int]:
    """0 for the tokens up to the first end, 1 up to the second, and so on."""
    lengths = [stop - start for start, stop in itertools.pairwise([0, *ends])]
    return [index % 2 for index, length in enumerate(lengths) for _ in range(length)]
