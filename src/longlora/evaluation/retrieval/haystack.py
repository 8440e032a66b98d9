"""Real text to hide something in: texts with names, cut into sentences, read from any place on and as far as needed.

In: text files of the user, or the held-out documents decoded. Out: sentences, for `needle.py` and `ruler_needles.py`.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from longlora.data.sentences import sentences
from longlora.errors import DataError


@dataclass(frozen=True)
class Haystack:
    """Texts by their names (file names or document numbers)."""

    texts: Mapping[str, str]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the texts that have a word in them, in the order of `texts`.

        Raises:
            DataError: no text has one.
        """
        names = tuple(name for name, text in self.texts.items() if text.strip())
        if not names:
            raise DataError(
                f"{len(self.texts)} haystack texts, none with a word in it: name text files in eval.haystack"
            )
        return names

    def sentences(self, name: str) -> list[str]:
        """Sentences of one text; cut once, then kept."""
        if name not in self._cut:
            self._cut[name] = sentences(self.texts[name])
        return self._cut[name]

    def choose(self, generator: random.Random) -> tuple[str, int]:
        """Any sentence of any text, each as likely as the other: the name of its text, and its number there."""
        counts = [len(self.sentences(name)) for name in self.names]
        ends = list(accumulate(counts))
        place = generator.randrange(ends[-1])
        text = bisect_right(ends, place)
        return self.names[text], place - ends[text] + counts[text]

    def read(self, name: str, start: int) -> Iterator[str]:
        """Sentences from number `start` of a text on, then of the texts behind it, then from the first text on: no end.

        At the end of a text, where nothing parts it from the next, a blank line is put in.
        """
        order = self.names[self.names.index(name) :] + self.names[: self.names.index(name)]
        skipped = start
        while True:
            for each in order:
                found = self.sentences(each)[skipped:]
                skipped = 0
                yield from found[:-1]
                if found:
                    yield found[-1] if found[-1][-1].isspace() else found[-1] + "\n\n"

    @cached_property
    def _cut(self) -> dict[str, list[str]]:
        return {}
