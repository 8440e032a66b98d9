"""A text cut into sentences by rules: for needles, and for questions about sentences."""

from __future__ import annotations

import re

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
