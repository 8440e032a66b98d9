"""Needles at their depth in text that is used once, checkable answers, and prefixes that prompts have in common."""

import random
import re
import zlib
from collections.abc import Callable, Sequence

import pytest
from tiny import word_tokenizer

from longlora.errors import DataError
from longlora.evaluation.retrieval.filling import most_that_fits, passage
from longlora.evaluation.retrieval.haystack import Haystack, sentences
from longlora.evaluation.retrieval.needle import _key, needle_prompt, needle_prompts
from longlora.evaluation.retrieval.prompt import Prompt, score

tokenizer = word_tokenizer()
WORDS = ["ash", "birch", "cedar", "élan", "fir", "größe", "hazel", "森林", "juniper", "larch", "maple", "oak", "pine"]
NAMES = ("single", "uuid", "chain")


def tale(name: str, characters: int) -> str:
    """A text without numbers in sentences of 3 to 9 words, some of more than one byte a letter."""
    generator = random.Random(name)
    text = ""
    while len(text) < characters:
        text += f"{' '.join(generator.choices(WORDS, k=generator.randint(3, 9)))}. ".capitalize()
    return text


TEXTS = {"first": tale("first", 9000), "second": tale("second", 9000)}


def encode_bytes(text: str) -> list[int]:
    return list(text.encode())


def encode_tiny(text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_words(text: str) -> list[int]:
    return [zlib.crc32(word.encode()) for word in re.findall(r"\s?\w+|\W", text)]


def text_of(prompt: Prompt) -> str:
    return bytes(prompt.tokens).decode()


def copied(prompt: Prompt) -> str:
    """The answer of a model that looks the sentences up."""
    body, question = text_of(prompt).split("\n\nQuestion: ")
    lead = question.split("\nAnswer: ")[1]
    if asked := re.search(r"the town where (\w+ \w+) works", lead):
        (place,) = re.findall(rf"{asked[1]} works in (\w+)\.", body)
        lead = lead.replace(asked[0], place)
    (key,) = re.findall(rf"{lead} ([0-9a-f-]+)\.", body)
    return f" {key}."


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


@pytest.mark.parametrize("encode", [encode_bytes, encode_tiny, encode_words])
def test_prompts_nearly_fill_their_length(encode: Callable[[str], list[int]]) -> None:
    prompts = needle_prompts(encode, [1], TEXTS, [1200, 2500], [0.0, 0.4, 1.0], 2, 0, names=NAMES)
    assert len(prompts) == 3 * 2 * 3 * 2
    for prompt in prompts:
        used = len(prompt.tokens) + prompt.max_new_tokens
        assert 0.97 * prompt.facts["length"] <= used <= prompt.facts["length"]
        assert prompt.tokens[0] == 1
        assert prompt.max_new_tokens > len(prompt.answer) > 0


def test_a_copier_is_right_and_a_guesser_wrong() -> None:
    prompts = needle_prompts(encode_bytes, [], TEXTS, [1500, 2500], [0.0, 0.5, 1.0], 2, 0, names=NAMES, distractors=3)
    for prompt in prompts:
        answer = copied(prompt)
        assert score(prompt.metric, answer, prompt.references) == 1
        assert bytes(prompt.answer).decode() == answer[:-1]
        assert text_of(prompt).count(prompt.references[0]) == 1
        keys = set(re.findall(r"\b\d{7}\b|\b[0-9a-f]{8}-[0-9a-f-]{27}\b", text_of(prompt)))
        assert len(keys) == 4, "three distractors"
        for wrong in keys - {prompt.references[0]}:
            assert score(prompt.metric, f" {wrong}.", prompt.references) == 0
    assert len({prompt.references for prompt in prompts}) == len(prompts)


def test_needles_stand_before_the_sentence_at_their_depth() -> None:
    for depth in (0.0, 0.3, 0.75, 1.0):
        for prompt in needle_prompts(encode_bytes, [], TEXTS, [2500], [depth], 3, 0, distractors=0):
            text = text_of(prompt)
            body = text[text.index("\n\n") + 2 : text.index("\n\nQuestion: ")]
            (needle,) = re.findall(r"The [\w ]+ \d{7}\. ?", body)
            before, after = body.split(needle)
            place = depth * (len(before) + len(after))
            if depth == 1:
                assert after == ""
            else:
                assert before == "" or before.endswith(". ")
                assert len(before) <= place + 1
                assert len(before) + len(sentences(after)[0]) >= place - 1
            assert f"{before}{after}".strip() in "\n\n".join([TEXTS["second"], TEXTS["first"], TEXTS["second"]])


def test_prompts_of_a_length_are_equal_up_to_the_shallower_key() -> None:
    prompts = needle_prompts(encode_bytes, [1], TEXTS, [3000], [0.25, 0.5, 0.75, 1.0], 1, 0, distractors=3)
    for first in prompts:
        for second in prompts:
            if first is not second:
                shallower = min(float(prompt.facts["depth"]) for prompt in (first, second))
                # A sentence has up to 100 bytes, and depth counts characters.
                assert common_prefix(first.tokens, second.tokens) > shallower * 3000 - 400
    for length in (1200, 2400):  # without distractors, other lengths share as much
        (shorter,) = needle_prompts(encode_bytes, [1], TEXTS, [length], [1.0], 1, 0, distractors=0)
        (longer,) = needle_prompts(encode_bytes, [1], TEXTS, [3000], [1.0], 1, 0, distractors=0)
        assert common_prefix(shorter.tokens, longer.tokens) > 0.75 * length


def test_distractors_are_all_over_the_text() -> None:
    places = []
    for prompt in needle_prompts(encode_bytes, [], TEXTS, [4000], [1.0], 8, 0, distractors=3):
        text = text_of(prompt)
        places += [found.start() / len(text) for found in re.finditer(r"\b\d{7}\b", text)][:3]
    assert min(places) < 0.2
    assert max(places) > 0.8
    assert sum(places) / len(places) == pytest.approx(0.5, abs=0.12)


def test_a_key_is_drawn_again_that_is_elsewhere() -> None:
    generator = random.Random(0)
    first, second, third = (str(generator.randint(1_000_000, 9_999_999)) for _ in range(3))
    assert _key(random.Random(0), "single", {first}, f"It was {second}.") == third


def test_a_prompt_is_made_again_from_its_facts() -> None:
    haystack = Haystack(TEXTS)
    prompts = needle_prompts(encode_bytes, [], TEXTS, [1500], [0, 0.5], 2, 7, names=NAMES)
    for prompt in prompts:
        fact = prompt.facts
        assert (fact["task"], fact["document"] in TEXTS) == ("needle", True)
        cell = (fact["length"], fact["depth"], fact["trial"])
        assert prompt == needle_prompt(encode_bytes, [], haystack, *cell, fact["seed"], name=fact["name"])
        assert prompt != needle_prompt(encode_bytes, [], haystack, *cell, 8, name=fact["name"])
    trials = [text_of(prompt) for prompt in prompts if prompt.facts["name"] == "single"]
    assert trials[0][:300] != trials[1][:300], "each trial has text of its own"


def test_a_text_without_full_stops_is_cut_at_words() -> None:
    texts = {"list": " ".join(WORDS * 200)}
    for prompt in needle_prompts(encode_bytes, [], texts, [3000], [0.5], 2, 0, distractors=0):
        before, _, after = re.split(r"(The [\w ]+ \d{7}\. )", text_of(prompt).split("\n\n")[1])
        assert len(before) == pytest.approx(len(after), abs=40)
        assert before.split()[-1] in WORDS
        assert after.split()[0] in WORDS
        assert after.split()[-1] in WORDS


def test_texts_that_are_too_short_are_said() -> None:
    texts = {"short": tale("short", 500)}
    with pytest.raises(DataError, match=r"needle length 4000 is longer .* enough for \d{3,4} tokens: add texts to"):
        needle_prompts(encode_bytes, [], texts, [4000], [0.5], 1, 0)
    with pytest.raises(DataError, match=r"needle length 200 is too short: the prompt alone has [3-6]\d\d tokens"):
        needle_prompts(encode_bytes, [], TEXTS, [200], [0.5], 1, 0)
    with pytest.raises(DataError, match=r"99 distractors: there are names for \d\d, lower eval.needle.distractors"):
        needle_prompts(encode_bytes, [], TEXTS, [2000], [0.5], 1, 0, distractors=99)


def test_a_passage_has_every_sentence_once() -> None:
    texts = {"one": "A a. B b. C c.", "blank": " \n", "two": "D d. E e.\n"}
    seen = set()
    for trial in range(30):
        found = passage(Haystack(texts), random.Random(trial))
        cut = [found.text[start:stop] for start, stop in zip(found.starts, [*found.starts[1:], None], strict=True)]
        assert sorted(sentence.strip() for sentence in cut) == ["A a.", "B b.", "C c.", "D d.", "E e."]
        assert any(found.text.startswith(sentence.strip()) for sentence in sentences(texts[found.name]))
        assert "C c.\n\nD d." in found.text or found.text.startswith("D d.")
        seen.add(found.text)
        assert [found.boundary(place) for place in (0, 1, found.starts[1], found.starts[1] + 2)] == [
            *(0, 0),
            *[found.starts[1]] * 2,
        ]
    assert len(seen) == 5


@pytest.mark.parametrize("per_unit", [0.2, 1.0, 3.7, 40.0])
def test_the_search_finds_the_largest_size_with_few_counts(per_unit: float) -> None:
    for room in (5, 90, 100, 1000, 5003):
        asked: list[int] = []

        def count(size: int, asked: list[int] = asked) -> int:
            asked.append(size)
            return 90 + int(per_unit * size)

        size = most_that_fits(count, room, enough=room + 1, guess=10, most=2000)
        expected = max((size for size in range(2001) if 90 + int(per_unit * size) <= room), default=-1)
        assert size == expected
        assert len(asked) <= 18
        assert len(set(asked)) == len(asked)
