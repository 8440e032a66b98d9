"""Questions with answers that can be checked: drawn from a window of a text, each with exactly one right answer.

Every task looks its sentences and phrases up in the whole window, without regard to case and line ends, and drops
what stands there twice. A task returns None where the window has nothing to ask.
"""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from longlora.data.longqa.text import Sentence, Window
from longlora.data.longqa.wording import WORDINGS
from longlora.errors import DataError

_TRIES = 20
_PHRASE_WORDS = (4, 6)
_FEWEST_SENTENCE_WORDS = 10  # around a phrase, so that the phrase is not the answer already
_GAP_WORDS = (4, 12)
_PASSAGES = 4
_MOST_PASSAGE_WORDS = 40
_MENTIONS = (2, 12)
_NAME = re.compile(r"(?<!\w)[^\W\d_]{3,}(?!\w)")


@dataclass(frozen=True)
class Draft:
    """A question about a window; evidence is characters `start` to `end` of the window."""

    task: str
    question: str
    answer: str
    start: int
    end: int


def next_sentence(window: Window, generator: random.Random) -> Draft | None:
    """Which sentence comes after this one."""
    unique = set(window.unique)
    pairs = [number for number in window.unique if number + 1 in unique]
    for number in _some(pairs, generator):
        first, second = window.sentences[number], window.sentences[number + 1]
        if not window.chapter_between(first, second):
            question = _ask("next_sentence", generator, sentence=first.text)
            return Draft("next_sentence", question, second.text, first.start, second.end)
    return None


def find_sentence(window: Window, generator: random.Random) -> Draft | None:
    """Which sentence holds a phrase."""
    for number in _some(window.unique, generator):
        sentence = window.sentences[number]
        phrase = _run_of_words(sentence, _PHRASE_WORDS, generator)
        if len(sentence.words) >= _FEWEST_SENTENCE_WORDS and phrase and window.is_unique(phrase):
            question = _ask("find_sentence", generator, phrase=phrase)
            return Draft("find_sentence", question, sentence.text, sentence.start, sentence.end)
    return None


def order_events(window: Window, generator: random.Random) -> Draft | None:
    """In which order four passages come; the evidence reaches from the first to the last."""
    short = [number for number in window.unique if len(window.sentences[number].words) <= _MOST_PASSAGE_WORDS]
    if len(short) < 2 * _PASSAGES:
        return None
    bounds = [len(short) * part // _PASSAGES for part in range(_PASSAGES + 1)]
    chosen = [short[generator.randrange(*part)] for part in pairwise(bounds)]
    shown = generator.sample(chosen, _PASSAGES)
    passages = "\n".join(f"{place}. {window.sentences[number].text}" for place, number in enumerate(shown, 1))
    answer = ", ".join(str(shown.index(number) + 1) for number in chosen)
    question = _ask("order_events", generator, passages=passages)
    first, last = window.sentences[chosen[0]], window.sentences[chosen[-1]]
    return Draft("order_events", question, answer, first.start, last.end)


def fill_passage(window: Window, generator: random.Random) -> Draft | None:
    """Which words were removed from a passage that is quoted with a gap."""
    for number in _some(window.unique, generator):
        sentence = window.sentences[number]
        span = _span_of_words(sentence, _GAP_WORDS, generator)
        if span is None:
            continue
        gap = sentence.text[slice(*span)].rstrip(",;:")
        before, behind = sentence.text[: span[0]].strip(), sentence.text[span[0] + len(gap) :].strip()
        # One side that stands only here is enough to find the place.
        if window.is_unique(gap) and (window.is_unique(before) or window.is_unique(behind)):
            passage = f"{before} [...] {behind}"
            question = _ask("fill_passage", generator, passage=passage)
            return Draft("fill_passage", question, gap, sentence.start, sentence.end)
    return None


def count_mentions(window: Window, generator: random.Random) -> Draft | None:
    """How often a name occurs: one that is counted alike whether or not case, endings or parts of words count.

    The number is drawn first, then a word with it: small numbers would be nearly all otherwise.
    """
    words = (word for word in _NAME.findall(window.text) if word[0].isupper() and word[1:].islower())
    by_count: dict[int, list[str]] = {}
    for word, count in Counter(words).items():
        if _MENTIONS[0] <= count <= _MENTIONS[1] and window.count(word) == count:
            by_count.setdefault(count, []).append(word)
    if not by_count:
        return None
    count = generator.choice(sorted(by_count))
    word = generator.choice(by_count[count])
    places = [match.span() for match in re.finditer(re.escape(word), window.text)]
    question = _ask("count_mentions", generator, word=word)
    return Draft("count_mentions", question, str(count), places[0][0], places[-1][1])


def which_chapter(window: Window, generator: random.Random) -> Draft | None:
    """Under which heading a sentence stands; only where the window shows at least two chapters with their headings."""
    ends = [*(chapter.start for chapter in window.chapters[1:]), len(window.text)]
    inside = [
        (chapter, [number for number in window.unique if chapter.end <= window.sentences[number].start < end])
        for chapter, end in zip(window.chapters, ends, strict=False)
        if window.is_unique_line(chapter.title)
    ]
    filled = [(chapter, numbers) for chapter, numbers in inside if numbers]
    if len(filled) < 2:
        return None
    chapter, numbers = generator.choice(filled)
    sentence = window.sentences[generator.choice(numbers)]
    question = _ask("which_chapter", generator, sentence=sentence.text)
    return Draft("which_chapter", question, chapter.title, chapter.start, sentence.end)


TASKS: dict[str, Callable[[Window, random.Random], Draft | None]] = {
    function.__name__: function
    for function in (next_sentence, find_sentence, order_events, fill_passage, count_mentions, which_chapter)
}


@dataclass(frozen=True)
class Offline:
    """A maker of questions that needs nothing but the text: the tasks in turn, another one where a window has none."""

    tasks: Sequence[str]
    attempts: int = 12

    def settings(self) -> dict[str, Any]:
        """What decides the questions, for the settings file and the card."""
        return {"tasks": list(self.tasks)}

    def draft(self, window: Window, generator: random.Random, index: int, attempt: int) -> Draft | str:
        """A question about `window`, or why there is none."""
        in_turn = attempt < self.attempts // 2
        name = self.tasks[index % len(self.tasks)] if in_turn else generator.choice(self.tasks)
        return TASKS[name](window, generator) or "no question found"


def known_tasks(names: Iterable[str]) -> list[str]:
    """The names without repetitions, all there are if none is given; `DataError` for an unknown one."""
    chosen = list(dict.fromkeys(names)) or list(TASKS)
    for name in chosen:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, 1)
            meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(TASKS)}"
            raise DataError(f"task {name!r} is not known: {meant}")
    return chosen


def _ask(task: str, generator: random.Random, **filled: str) -> str:
    return generator.choice(WORDINGS[task]).format(**filled)


def _some(numbers: Sequence[int], generator: random.Random) -> list[int]:
    return generator.sample(numbers, min(_TRIES, len(numbers)))


def _span_of_words(sentence: Sentence, lengths: tuple[int, int], generator: random.Random) -> tuple[int, int] | None:
    """Characters of a run of words inside the sentence, at least two words from its start and one from its end."""
    length = generator.randint(*lengths)
    room = len(sentence.words) - 3 - length
    if room < 0:
        return None
    first = 2 + generator.randint(0, room)
    return sentence.words[first][0], sentence.words[first + length - 1][1]


def _run_of_words(sentence: Sentence, lengths: tuple[int, int], generator: random.Random) -> str | None:
    span = _span_of_words(sentence, lengths, generator)
    return None if span is None else sentence.text[slice(*span)].strip(",;:")
