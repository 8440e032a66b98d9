"""A document as sentences and chapters, and windows of it that are about so many tokens long."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from longlora.data.documents import Document
from longlora.data.longqa.chapters import Chapter, find_chapters
from longlora.data.sentences import sentences

# A run of other characters, or one character of a script that puts no space between words.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_FEWEST_WORDS, _MOST_WORDS = 6, 60
# Letters that begin a sentence, behind quotes and brackets; a small letter is the rest of a sentence cut wrongly.
_BEGINNING = re.compile(r"""["'“‘«„¿¡(「『]*[^\W\d_a-zß-öø-ÿ]""")  # noqa: RUF001
_ENDING = re.compile(r"""[.!?…。！？]["'”’»)\]」』）]*$""")  # noqa: RUF001

TokenCounter = Callable[[Sequence[str]], list[int]]
"""Token counts of texts."""


def quarter_of_characters(texts: Sequence[str]) -> list[int]:
    """Token counts without a tokenizer: characters / 4, rounded up."""
    return [-(-len(text) // 4) for text in texts]


def flatten(text: str) -> str:
    """Without case, and each run of white space as one space."""
    return " ".join(text.split()).casefold()


@dataclass(frozen=True)
class Sentence:
    """A sentence: characters `start` to `end` of the text, without the space around it."""

    start: int
    end: int
    text: str
    """On one line: each run of white space is one space."""

    @cached_property
    def words(self) -> list[tuple[int, int]]:
        """Start and end of each word in `text`."""
        return [match.span() for match in WORD.finditer(self.text)]

    @cached_property
    def is_plain(self) -> bool:
        """Can be asked about: 6 to 60 words, a capital letter in front, an end mark behind."""
        return (
            _FEWEST_WORDS <= len(self.words) <= _MOST_WORDS
            and _BEGINNING.match(self.text) is not None
            and _ENDING.search(self.text) is not None
        )


@dataclass(frozen=True)
class Window:
    """A part of a document that a model reads, cut at sentence bounds; positions count from its own beginning."""

    text: str
    start: int
    """Characters of the document in front of it."""
    sentences: Sequence[Sentence]
    chapters: Sequence[Chapter]

    @cached_property
    def _flat(self) -> str:
        return flatten(self.text)

    def find(self, words: str) -> list[tuple[int, int]]:
        """Start and end of every place where `words` stand exactly so, whatever white space parts them."""
        pattern = r"\s+".join(re.escape(word) for word in words.split())
        return [match.span() for match in re.finditer(pattern, self.text)]

    def is_unique(self, words: str) -> bool:
        """Whether `words` stand exactly once in the window, also as parts of words, in other case or across lines."""
        wanted = flatten(words)
        first = self._flat.find(wanted)
        return first >= 0 and self._flat.find(wanted, first + 1) < 0

    def is_unique_line(self, words: str) -> bool:
        """The same, but not as a part of a word: ``Chapter I`` does not stand in ``Chapter II``."""
        return len(re.findall(rf"(?<!\w){re.escape(flatten(words))}(?!\w)", self._flat)) == 1

    def count(self, letters: str) -> int:
        """How often `letters` stand in the window in any case, also as parts of words."""
        return self._flat.count(flatten(letters))

    @cached_property
    def unique(self) -> list[int]:
        """Numbers of the sentences that can be asked about and stand once in the window."""
        return [number for number, each in enumerate(self.sentences) if each.is_plain and self.is_unique(each.text)]

    def chapter_between(self, first: Sentence, second: Sentence) -> bool:
        """Whether a heading parts the two."""
        return any(first.end <= chapter.start < second.start for chapter in self.chapters)


class Text:
    """One document, cut into sentences and counted once, from which windows are drawn."""

    def __init__(self, document: Document, count: TokenCounter) -> None:
        self.name, self.text = document.name, document.text
        self.chapters = find_chapters(self.text)
        self.sentences = list(_sentences(self.text, self.chapters))
        # Each with the white space in front of it, as most tokenizers cut it: the sums are nearly those of the whole.
        ends = [each.end for each in self.sentences]
        pieces = [self.text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        self._tokens_until = [0, *accumulate(count(pieces) if pieces else [])]

    @property
    def tokens(self) -> int:
        """Of the whole document."""
        return self._tokens_until[-1]

    def window(self, tokens: int, generator: random.Random) -> Window | None:
        """Neighbouring sentences of at most `tokens` tokens from anywhere; the whole document if that is shorter.

        None where one sentence alone is longer than that.
        """
        last = bisect_right(self._tokens_until, self.tokens - tokens) - 1 if self.tokens > tokens else 0
        first = generator.randint(0, last)
        behind = bisect_right(self._tokens_until, self._tokens_until[first] + tokens) - 1
        if behind <= first:
            return None
        start, end = self.sentences[first].start, self.sentences[behind - 1].end
        return Window(
            self.text[start:end],
            start,
            [replace(each, start=each.start - start, end=each.end - start) for each in self.sentences[first:behind]],
            [
                replace(each, start=each.start - start, end=each.end - start)
                for each in self.chapters
                if start <= each.start and each.end <= end
            ],
        )


def _sentences(text: str, chapters: Sequence[Chapter]) -> list[Sentence]:
    """Sentences without the space around them; a heading is one by itself."""
    found = []
    bounds = sorted({0, len(text), *(bound for chapter in chapters for bound in (chapter.start, chapter.end))})
    for first, behind in pairwise(bounds):
        place = first
        for piece in sentences(text[first:behind]):
            stripped = piece.strip()
            if stripped:
                start = place + piece.index(stripped[0])
                found.append(Sentence(start, start + len(stripped), " ".join(stripped.split())))
            place += len(piece)
    return found
