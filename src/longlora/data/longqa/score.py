"""How right an answer is: exact match and F1, as reading comprehension is scored (SQuAD, arXiv 1606.05250)."""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal

from longlora.data.longqa.text import WORD

Form = Literal["words", "order", "count"]
"""What a right answer is: words, numbers in order with commas between, or one number."""

_FORMS: dict[str, Form] = {"order_events": "order", "count_mentions": "count"}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_LETTER = re.compile(r"[^\w\s]|_")
_INTEGER = re.compile(r"\d+")
_IN_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def form_of(task: str) -> Form:
    """What an answer to a task of `tasks.py` looks like; answers to any other question are words."""
    return _FORMS.get(task, "words")


def score_answer(form: Form, answer: str, reference: str) -> tuple[float, float]:
    """Exact match (0 or 1) and F1 (0 to 1) of an answer against the right one.

    ``words``: both are lowered, and lose punctuation and the articles a, an, the; F1 is over words (over characters
    where a script puts no space between words). ``order``: the first numbers count, F1 is the share of places with the
    right one. ``count``: the first number counts, F1 is the exact match.
    """
    if form == "order":
        right = _INTEGER.findall(reference)
        given = _INTEGER.findall(answer)[: len(right)]
        share = sum(one == other for one, other in zip(given, right, strict=False)) / max(len(right), 1)
        return float(given == right), share
    if form == "count":
        number = _number(answer)
        exact = float(number is not None and number == _number(reference))
        return exact, exact
    given, right = _words(answer), _words(reference)
    common = sum((Counter(given) & Counter(right)).values())
    if not common:
        exact = float(given == right)
        return exact, exact
    return float(given == right), 2 * common / (len(given) + len(right))


def _words(text: str) -> list[str]:
    plain = _NO_LETTER.sub(" ", text.lower().replace("'", "").replace("’", ""))  # noqa: RUF001
    return WORD.findall(_ARTICLES.sub(" ", plain))


def _number(text: str) -> int | None:
    for word in re.findall(r"\w+", text.lower()):
        if _INTEGER.fullmatch(word):
            return int(word)
        if word in _IN_WORDS:
            return _IN_WORDS.index(word)
    return None
