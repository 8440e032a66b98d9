from __future__ import annotations

import random
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora.errors import DataError
from longlora.evaluation.retrieval.haystack import Haystack, sentences


@given(st.text(alphabet="aB.!? \n\"'。）Mr1"))
def test_sentences_lose_no_character_and_none_is_empty(text: str) -> None:
    found = sentences(text)
    assert "".join(found) == text
    assert all(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One. ", "Two! ", "Three? ", "Four"]),
        ('"Go." He went. (So.) End.', ['"Go." ', "He went. ", "(So.) ", "End."]),
        ("Mr. Ash met Dr. Bo and J. R. Lee. Then rain.", ["Mr. Ash met Dr. Bo and J. R. Lee. ", "Then rain."]),
        ("Pi is 3.14 here. Done.", ["Pi is 3.14 here. ", "Done."]),
        ("A title\n\nA line\nthat goes on. End", ["A title\n\n", "A line\nthat goes on. ", "End"]),
        ("Signed by X.\n\nNext", ["Signed by X.\n\n", "Next"]),
        ("今天下雨。明天呢？好", ["今天下雨。", "明天呢？", "好"]),
        ("Well... yes. ", ["Well... ", "yes. "]),
        ("no end at all", ["no end at all"]),
        ("", []),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_every_sentence_of_every_text_is_as_likely_as_the_other() -> None:
    haystack = Haystack({"empty": " \n", "long": "A. B? C! " * 2 + "D? ", "short": "E? "})
    count = len(haystack.sentences("long")) + len(haystack.sentences("short"))
    generator = random.Random(0)
    seen = Counter(haystack.choose(generator) for _ in range(400 * count))
    assert len(seen) == count
    assert {name for name, _ in seen} == {"long", "short"}
    assert all(300 < times < 500 for times in seen.values())


def test_reading_goes_on_in_the_next_text_and_begins_again() -> None:
    haystack = Haystack({"one": "Aa. Bb. Cc.", "two": "Dd. Ee.\n"})
    read = [sentence.strip() for sentence in islice(haystack.read("two", 1), 8)]
    assert read == ["Ee.", "Aa.", "Bb.", "Cc.", "Dd.", "Ee.", "Aa.", "Bb."]


def test_sentences_of_two_texts_do_not_grow_together() -> None:
    assert "".join(islice(Haystack({"one": "no stop", "two": "Go."}).read("one", 0), 2)) == "no stop\n\nGo.\n\n"


@pytest.mark.parametrize("texts", [{}, {"blank": " \n "}])
def test_texts_without_a_word_are_refused(texts: dict[str, str]) -> None:
    with pytest.raises(DataError, match="eval.haystack"):
        Haystack(texts).choose(random.Random(0))
