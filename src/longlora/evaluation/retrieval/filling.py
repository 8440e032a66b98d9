"""How much fits a prompt, and real text to fill it with, none of it twice.

In: a `Haystack`, a generator of random numbers, an encoder. Out: a `Passage`, and sizes. For the task modules.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from longlora.evaluation.retrieval.haystack import Haystack

_GUESSES = 6  # guesses by proportion before the search halves what is left
_LONG_SENTENCE = 600  # characters
_LONG_WORD = 16


@dataclass(frozen=True)
class Passage:
    """All of a haystack once, from some sentence on, and around its end to that sentence again."""

    name: str
    """The text in which it begins."""
    text: str
    starts: list[int]
    """Characters at which sentences begin, ascending from 0."""

    def boundary(self, place: int) -> int:
        """The beginning of a sentence that is nearest to character `place`, at it or before it.

        In a sentence of more than 600 characters, as a text without full stops is one, the end of a word.
        """
        start = self.starts[bisect_right(self.starts, place) - 1]
        return start if place - start <= _LONG_SENTENCE else self.word_end(place)

    def word_end(self, place: int) -> int:
        """The nearest place at `place` or before it where no word is cut; `place` itself if that is too far off."""
        for end in range(min(place, len(self.text)), max(0, place - _LONG_WORD), -1):
            if end == len(self.text) or self.text[end].isspace() or self.text[end - 1].isspace():
                return end
        return place


def passage(haystack: Haystack, generator: random.Random) -> Passage:
    """The haystack from a random sentence on; where one text ends the next one follows, behind a blank line."""
    name, first = haystack.choose(generator)
    here = haystack.names.index(name)
    cuts = [haystack.sentences(other) for other in haystack.names[here:] + haystack.names[:here]]
    pieces: list[str] = []
    starts: list[int] = []
    at = 0
    for cut in [cuts[0][first:], *cuts[1:], cuts[0][:first]]:
        if cut and pieces and not pieces[-1].endswith("\n"):
            pieces.append("\n\n")
            at += 2
        for sentence in cut:
            pieces.append(sentence)
            starts.append(at)
            at += len(sentence)
    return Passage(name, "".join(pieces), starts)


def most_that_fits(count: Callable[[int], int], limit: int, *, enough: int, guess: int, most: int) -> int:
    """The largest size from 0 to `most` with at most `limit` tokens, or the first one found with at least `enough`.

    Args:
        count: tokens of a size; grows with it, nearly in proportion, so that a few counts are enough.
        guess: the size to begin with.

    Returns:
        The size; -1 if even size 0 has more than `limit` tokens.
    """
    fits, too_large = -1, most + 1
    size, aim, guesses = min(max(guess, 0), most), (limit + enough) // 2, 0
    while too_large - fits > 1:
        tokens = count(size)
        if enough <= tokens <= limit:
            return size
        if tokens <= limit:
            fits = size
        else:
            too_large = size
        guesses += 1
        if guesses < _GUESSES:
            size += round((aim - tokens) * max(size, 1) / max(tokens, 1))
        else:
            size = (fits + too_large) // 2
        size = min(max(size, fits + 1), too_large - 1)
    return fits
