"""What RULER's tasks have in common: a prompt of a given size, and the size that fills a length.

A task draws all that does not depend on the size once and returns a function from size to draft. Sizes are counted in
the task's own units: words of a real text, lines, words of a list.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from longlora.evaluation.retrieval.haystack import Haystack
from longlora.evaluation.retrieval.prompt import Encode

# Guesses before the interval is halved instead, so that the search ends soon for a tokenizer of any behaviour.
_GUESSES = 12
# The next guess has at most this many times the tokens of the largest size that is known to fit: what a unit costs is
# known roughly from a few of them, and a prompt that is far too long takes longest to tokenize.
_GROWTH = 8
# Part of the room that may stay unused.
_SLACK = 0.01
# A token stands for this many units at most; where even these fit, no more are asked for.
_UNITS_PER_TOKEN = 8


@dataclass(frozen=True)
class Setting:
    """All that decides a prompt of a task."""

    encode: Encode
    haystack: Haystack
    length: int
    """Tokens of prompt and answer at most."""
    seed: str
    """Of this one prompt."""


@dataclass(frozen=True)
class Draft:
    """A prompt as text."""

    question: str
    prefix: str
    """Beginning of the answer, which the model continues; behind the chat template where there is one."""
    references: tuple[str, ...]
    depth: float | None = None
    """Place in the text of the only needle that is asked for: 0 its beginning, 1 its end. None: there are more."""
    document: str | None = None
    """Name of the text in which the haystack begins."""


@dataclass(frozen=True)
class Filled:
    """A draft and the tokens of its whole text."""

    draft: Draft
    tokens: list[int]


Build = Callable[[int], Draft]
Category = Literal["noun", "adjective", "verb"]


@lru_cache
def word_list(*categories: Category) -> tuple[str, ...]:
    """Words of the package wonderwords, each once, in alphabetical order."""
    from wonderwords import RandomWord  # here, because it reads its files when it is imported

    return tuple(RandomWord(enhanced_prefixes=False).filter(include_categories=categories))


def new_name(generator: random.Random, taken: set[str]) -> str:
    """An adjective and a noun with a hyphen between that is not yet taken, and now is: one of about six million."""
    while True:
        name = f"{generator.choice(word_list('adjective'))}-{generator.choice(word_list('noun'))}"
        if name not in taken:
            taken.add(name)
            return name


def insert(lines: Sequence[str], parts: Sequence[str], places: Sequence[int]) -> tuple[list[str], list[int]]:
    """Put each line in front of the part whose number stands in `places` (ascending).

    Returns:
        All of them in order, and where in it each line stands.

    >>> insert(["a", "b"], ["x", "y"], [1, 2])
    (['x', 'a', 'y', 'b'], [1, 3])
    """
    merged, found, used = list[str](), [], 0
    for line, place in zip(lines, places, strict=True):
        merged += parts[used:place]
        found.append(len(merged))
        merged.append(line)
        used = place
    return [*merged, *parts[used:]], found


def largest(make: Callable[[int], Filled], least: int, room: int) -> Filled | None:
    """The prompt of a size of at least `least` that fills `room`, up to 1% of it or about one unit; None: none fits.

    Tokens grow almost in proportion with the size, so the next size is read off the line through the known ones: two or
    three prompts are tokenized in whole. Each new size lies strictly between one that fits and one that does not, and
    after some guesses the interval is halved, so the search ends whatever `make` does.
    """
    best = make(least)
    first = len(best.tokens)
    if first > room:
        return None
    low, high, too_many = least, least + _UNITS_PER_TOKEN * room + 1, 0
    size, guesses = min(least + 32, high - 1), 0
    while low + 1 < high:
        filled = make(size)
        if len(filled.tokens) <= room:
            low, best = size, filled
        else:
            high, too_many = size, len(filled.tokens)
        guesses += 1
        known = len(best.tokens)
        unit = (too_many - known) / (high - low) if too_many else (known - first) / (low - least)
        slack = max(_SLACK * room, unit)
        if room - known <= slack:
            break
        size = (low + high) // 2
        if unit > 0 and guesses < _GUESSES:
            size = low + int((min(room - slack / 2, _GROWTH * max(known, 1)) - known) / unit)
        size = min(max(size, low + 1), high - 1)
    return best
