"""A question to a model as plain data: made by the task modules, answered by `answering.py`, scored here.

A prompt can be made again from its facts alone: task modules draw nothing but from a generator seeded with them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from longlora.data.longqa.score import score_answer

Encode = Callable[[str], list[int]]
"""Text to token ids, without any that a tokenizer puts around it."""

Metric = Literal["all", "any", "first_integer", "last_integer", "words", "order", "count"]
"""``all``: the part of the references that the answer contains, ``any``: whether it contains one of them, both without
regard to case (RULER's ``string_match_all`` and ``string_match_part``); whether the first or last integer of the
answer is the reference; or F1 of the answer as the reference's form has it (`longlora.data.longqa.score`)."""


@dataclass(frozen=True)
class Prompt:
    """Tokens up to the place where the answer begins, and what a right answer is."""

    tokens: tuple[int, ...]
    """With the BOS of a tokenizer that adds one."""
    references: tuple[str, ...]
    metric: Metric
    answer: tuple[int, ...] = ()
    """The right answer as it would stand there, for its log-probability; empty: none is computed."""
    max_new_tokens: int = 0
    """Greedy tokens at most; 0: nothing is generated, and it counts whether greedy decoding would give `answer`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What its row says: ``task``, ``name``, ``length``, ``depth``, ``trial``, ``document``, ``seed``."""

    @property
    def sha256(self) -> str:
        """Of the token ids as decimal numbers with commas between: the same in every process and on every machine."""
        return hashlib.sha256(",".join(map(str, self.tokens)).encode()).hexdigest()


def score(metric: Metric, text: str, references: Sequence[str]) -> float:
    """How right an answer is, from 0 to 1.

    >>> score("all", "one is 17 and the other 4", ["17", "23"])
    0.5
    """
    if metric in ("words", "order", "count"):
        return score_answer(metric, text, references[0])[1]
    if metric in ("all", "any"):
        found = [reference.lower() in text.lower() for reference in references]
        return sum(found) / len(found) if metric == "all" else float(any(found))
    numbers = re.findall(r"\d+", text)
    if not numbers:
        return 0.0
    return float(numbers[0 if metric == "first_integer" else -1] == references[0])


def is_right(metric: Metric, text: str, references: Sequence[str]) -> bool:
    """Whether an answer counts as right: where F1 is its score, only what matches the reference exactly."""
    if metric in ("words", "order", "count"):
        return score_answer(metric, text, references[0])[0] == 1.0
    return score(metric, text, references) == 1.0


def is_settled(metric: Metric, text: str, references: Sequence[str]) -> bool:
    """Whether no further token of the answer can change its score, so that generation may stop."""
    if metric == "first_integer":
        return re.search(r"\d+\D", text) is not None
    return metric in ("all", "any") and score(metric, text, references) == 1.0


def split_answer(encode: Encode, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Question and answer as they are tokenized in one text: alone, the answer may begin with other tokens."""
    alone, together = encode(question), encode(question + answer)
    shared = 0
    while shared < min(len(alone), len(together)) and alone[shared] == together[shared]:
        shared += 1
    return together[:shared], together[shared:]
