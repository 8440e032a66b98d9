"""Chapter headings of a text, by the one kind of heading that the text uses; none where it has no such thing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_NUMBER = r"(?:[IVXLCDM]+|\d+|[A-Za-z]+(?:-[a-z]+)?)"
_WORDS = "chapter|book|part|letter|act|canto|section|kapitel|teil|chapitre|cap[ií]tulo|capitolo|hoofdstuk"
_NAMED = re.compile(rf"^[ \t]*(?:{_WORDS})[ \t]+{_NUMBER}\b(?:[.:\-—–][^\n]*|[ \t]*)$", re.M | re.I)  # noqa: RUF001
_ROMAN = re.compile(r"(?<=\n\n)[ \t]*[IVXLC]+\.?[ \t]*(?=\n\s*\n)")
_ALONE = re.compile(r"(?<=\n\n\n)[ \t]*[^\W\d_a-z][^\na-z]{2,79}[ \t]*(?=\n\s*\n)")
_MARKDOWN = re.compile(r"^(#{1,6})[ \t]+(\S[^\n]*?)[ \t]*#*[ \t]*$", re.M)
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)
_LONGEST_TITLE = 100
_FEWEST = 2


@dataclass(frozen=True)
class Chapter:
    """A heading: characters `start` to `end` of the text, and what it says on one line."""

    start: int
    end: int
    title: str


def find_chapters(text: str) -> list[Chapter]:
    """Headings in order; of the first kind below that the text has at least two of.

    Kinds: markdown headings of the highest level that occurs twice; lines such as ``CHAPTER IV`` or ``Part 2: North``;
    Roman numerals alone between blank lines; lines in capitals behind two blank lines and in front of one.
    """
    for found in (_markdown(text), *(list(_lines(text, kind)) for kind in (_NAMED, _ROMAN, _ALONE))):
        if len(found) >= _FEWEST:
            return found
    return []


def _markdown(text: str) -> list[Chapter]:
    fences = [match.span() for match in _FENCE.finditer(text)]
    levels: dict[int, list[Chapter]] = {}
    for match in _MARKDOWN.finditer(text):
        if any(start <= match.start() < end for start, end in fences):  # a comment in a program
            continue
        if len(match[2]) <= _LONGEST_TITLE:
            levels.setdefault(len(match[1]), []).append(Chapter(match.start(), match.end(), match[2]))
    return next((levels[level] for level in sorted(levels) if len(levels[level]) >= _FEWEST), [])


def _lines(text: str, kind: re.Pattern[str]) -> Iterator[Chapter]:
    for match in kind.finditer(text):
        title = " ".join(match.group().split())
        if 0 < len(title) <= _LONGEST_TITLE:
            yield Chapter(match.start(), match.end(), title)
