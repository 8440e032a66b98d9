"""Real text to hide something in: texts with names, cut into sentences, read from any place on and as far as needed.

In: text files of the user, or the held-out documents decoded. Out: sentences, for `needle.py` and `ruler_needles.py`.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from longlora.errors import DataError

# A sentence ends behind . ! ? … with closing quotes and brackets and the space that follows, or behind their wide
# forms, which need no space; a blank line ends one too.
_END = re.compile(r"""[.!?…]+["'”’»)\]]*\s+|[。！？]+[”’」』）]*\s*|\n\s*\n\s*""")  # noqa: RUF001
# A full stop ends no sentence behind a single capital letter (initials) or one of these.
_NO_END = re.compile(r"(?:\b[A-Z]|\b(?:Mr|Mrs|Ms|Dr|St|Prof|Gen|Col|Capt|vs|i\.e|e\.g|cf|No|Vol|Fig))\.\s*$")
_LONGEST_NO_END = 16


def sentences(text: str) -> list[str]:
    """Sentences of a text with the space behind each: joined without anything between, they are the text again.

    Rules for European, Chinese and Japanese punctuation, no statistics: a wrong cut moves a needle and does no more.

    >>> sentences("Mr. Ash left. Why? Nobody knew.")
    ['Mr. Ash left. ', 'Why? ', 'Nobody knew.']
    """
    found, start = [], 0
    for end in _END.finditer(text):
        is_paragraph = end.group().count("\n") > 1
        if not is_paragraph and _NO_END.search(text, max(start, end.end() - _LONGEST_NO_END), end.end()):
            continue
        found.append(text[start : end.end()])
        start = end.end()
    return [*found, text[start:]] if start < len(text) else found


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
