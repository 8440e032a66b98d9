"""Needles in a haystack of real text: sentences with a number each, one of which is asked for at the end.

In: texts, an encoder, lengths and depths. Out: prompts. The idea is Kamradt's needle-in-a-haystack test (2023), here
with an answer that a program can check, other needles of other names that a model must not mistake for the one asked
for, and a chain that has to be followed over two needles. The wordings are our own.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from longlora.errors import DataError
from longlora.evaluation.retrieval.filling import Passage, most_that_fits, passage
from longlora.evaluation.retrieval.haystack import Haystack
from longlora.evaluation.retrieval.prompt import Encode, Prompt, split_answer

NeedleName = Literal["single", "uuid", "chain"]
"""``single``: a number that belongs to a town is asked for. ``uuid``: a UUID instead. ``chain``: the number of the town
where somebody works, which another needle says."""

_HEAD = "Read the text below. Some of its sentences do not belong there: remember them, I will ask about one.\n\n"
_SLACK = 0.02  # part of the length that may stay free


@dataclass(frozen=True)
class _Form:
    needle: str
    question: str
    answer: str


_FORMS = (
    _Form(
        "The registration number of the archive in {place} is {key}.",
        "What is the registration number of the archive in {place}?",
        "The registration number of the archive in {place} is",
    ),
    _Form(
        "The storage room in {place} opens with the code {key}.",
        "Which code opens the storage room in {place}?",
        "The storage room in {place} opens with the code",
    ),
    _Form(
        "The parcel waiting in {place} carries the tracking code {key}.",
        "Which tracking code does the parcel waiting in {place} carry?",
        "The parcel waiting in {place} carries the tracking code",
    ),
    _Form(
        "The water meter of the school in {place} bears the serial number {key}.",
        "Which serial number does the water meter of the school in {place} bear?",
        "The water meter of the school in {place} bears the serial number",
    ),
)
_WORKS = "{person} works in {place}."
_PLACES = (
    *("Aarhus", "Accra", "Adelaide", "Bergen", "Bogota", "Brno", "Cardiff", "Colombo", "Dakar", "Durban", "Esbjerg"),
    *("Fukuoka", "Gaborone", "Ghent", "Halifax", "Hobart", "Izmir", "Jaipur", "Kigali", "Kyoto", "Lagos", "Lima"),
    *("Lusaka", "Maputo", "Mendoza", "Nagoya", "Nantes", "Osaka", "Porto", "Quito", "Riga", "Rosario", "Tallinn"),
    *("Tampere", "Tbilisi", "Trieste", "Uppsala", "Utrecht", "Vilnius", "Windhoek", "Winnipeg", "Zagreb"),
)
_PEOPLE = (
    *("Ada Lindqvist", "Amir Halabi", "Ana Ferreira", "Bram Verhoeven", "Chidi Okafor", "Daria Novak"),
    *("Elif Aydin", "Emeka Nwosu", "Femke Jansen", "Goran Petrovic", "Hana Kimura", "Ines Carvalho"),
    *("Ivo Kralj", "Jonas Berglund", "Kavita Rao", "Kenji Mori", "Lars Nygaard", "Leila Haddad"),
    *("Lucia Morales", "Maja Wisniewska", "Marek Dvorak", "Mireille Dupont", "Nadia Petrova", "Nuno Tavares"),
    *("Olga Smirnova", "Omar Diallo", "Pedro Quispe", "Priya Nair", "Rafael Ortega", "Rosa Bianchi"),
    *("Sanna Virtanen", "Sefu Mwangi", "Sofia Papadaki", "Tariq Mahmoud", "Teresa Lopez", "Thabo Dlamini"),
    *("Ulrich Steiner", "Vera Horvat", "Wanjiru Kamau", "Xavier Moreau", "Yara Mansour", "Zoltan Nagy"),
)


@dataclass(frozen=True)
class _Trial:
    """What the prompts of all lengths and depths of one trial have in common."""

    passage: Passage
    form: _Form
    question: str
    answer: str
    places: list[str]
    """The first is the one asked for."""
    others: list[tuple[float, str]]
    """Sentences with the part of the text in front of them."""
    keys: set[str]
    """Keys of the distractors."""


def needle_prompts(
    encode: Encode,
    before: Sequence[int],
    texts: Mapping[str, str],
    lengths: Sequence[int],
    depths: Sequence[float],
    num_trials: int,
    seed: int,
    *,
    distractors: int = 2,
    names: Sequence[NeedleName] = ("single",),
) -> list[Prompt]:
    """One prompt for each name, length, depth and trial, with a key of its own.

    Text, wording, names and distractors are the same for all prompts of a trial, and at one length they stand at the
    same places, so that two prompts are equal up to the shallower of their keys.

    Args:
        before: tokens in front of every prompt, such as a BOS that the tokenizer adds.
        texts: names and texts of the haystack; a trial begins at any sentence and uses each text once at most.
        lengths: prompt and the tokens that are generated, at most; at least 97% of it.
        depths: where the key stands: in front of the sentence that holds this part of the text, 1 is behind all of it.
            The other needle of a chain is anywhere.
        distractors: other needles of the same wording.

    Raises:
        DataError: the texts are too short for a length, a length has no room for needles and question, or there are
            more distractors than names.
    """
    haystack = Haystack(texts)
    trials = {
        (name, trial): _trial(haystack, name, trial, seed, distractors) for name in names for trial in range(num_trials)
    }
    return [
        _prompt(encode, before, trials[name, trial], name, length, float(depth), trial, seed)
        for name in names
        for length in lengths
        for depth in depths
        for trial in range(num_trials)
    ]


def needle_prompt(
    encode: Encode,
    before: Sequence[int],
    haystack: Haystack,
    length: int,
    depth: float,
    trial: int,
    seed: int,
    *,
    distractors: int = 2,
    name: NeedleName = "single",
) -> Prompt:
    """The prompt of one cell and trial of `needle_prompts`."""
    common = _trial(haystack, name, trial, seed, distractors)
    return _prompt(encode, before, common, name, length, float(depth), trial, seed)


def _trial(haystack: Haystack, name: NeedleName, trial: int, seed: int, distractors: int) -> _Trial:
    most = min(len(_PLACES), len(_PEOPLE)) - 1
    if distractors > most:
        raise DataError(f"{distractors} distractors: there are names for {most}, lower eval.needle.distractors")
    text = passage(haystack, random.Random(f"{seed}-needle-{trial}"))
    generator = random.Random(f"{seed}-needle-{name}-{trial}")
    form = generator.choice(_FORMS)
    places, people = generator.sample(_PLACES, distractors + 1), generator.sample(_PEOPLE, distractors + 1)
    keys: set[str] = set()
    others = []
    for place in places[1:]:
        key = _key(generator, name, keys, text.text)
        keys.add(key)
        others.append((generator.random(), form.needle.format(place=place, key=key)))
    asked = places[0]
    if name == "chain":
        others += [
            (generator.random(), _WORKS.format(person=person, place=place))
            for person, place in zip(people, places, strict=True)
        ]
        asked = f"the town where {people[0]} works"
    question, answer = form.question.format(place=asked), form.answer.format(place=asked)
    return _Trial(text, form, question, answer, places, others, keys)


def _key(generator: random.Random, name: NeedleName, taken: set[str], text: str) -> str:
    """A key that is neither that of another needle nor by chance in the text."""
    while True:
        if name == "uuid":
            key = str(uuid.UUID(int=generator.getrandbits(128), version=4))
        else:
            key = str(generator.randint(1_000_000, 9_999_999))
        if key not in taken and key not in text:
            return key


def _prompt(
    encode: Encode,
    before: Sequence[int],
    common: _Trial,
    name: NeedleName,
    length: int,
    depth: float,
    trial: int,
    seed: int,
) -> Prompt:
    generator = random.Random(f"{seed}-needle-{name}-{length}-{depth}-{trial}")
    key = _key(generator, name, common.keys, common.passage.text)
    asked = common.form.needle.format(place=common.places[0], key=key)
    text = common.passage.text
    # Characters that are about `length` tokens of this text: the same at every depth, so the distractors stand still.
    sample = text[:length]
    usual = min(len(text), round(length * len(sample) / len(encode(sample))))
    still = [(round(part * usual), sentence) for part, sentence in common.others]

    def build(size: int) -> str:
        end = common.passage.word_end(size)
        place = round(depth * end)
        at = end if place == end else common.passage.boundary(place)
        needles = [(common.passage.boundary(min(other, end)), sentence) for other, sentence in still]
        body = _insert(text[:end], [*needles, (at, asked)])
        return f"{body.rstrip()}\n\nQuestion: {common.question}\nAnswer: {common.answer}"

    new_tokens = len(split_answer(encode, common.answer, f" {key}")[1]) + 4
    size = _fit(encode, build, len(text), length, len(before) + new_tokens, usual)
    tokens, answer = split_answer(encode, build(size), f" {key}")
    facts = {"task": "needle", "name": name, "length": length, "depth": depth, "trial": trial}
    facts |= {"document": common.passage.name, "seed": seed}
    metric: Literal["all", "first_integer"] = "all" if name == "uuid" else "first_integer"
    return Prompt((*before, *tokens), (key,), metric, tuple(answer), new_tokens, facts)


def _insert(text: str, needles: list[tuple[int, str]]) -> str:
    """Put each sentence in front of its character of the text, in the order given where it is the same one."""
    body, used = _HEAD, 0
    for at, sentence in sorted(needles, key=lambda needle: needle[0]):
        body += text[used:at]
        body += f"{'' if body[-1].isspace() else ' '}{sentence} "
        used = at
    return body + text[used:]


def _fit(encode: Encode, build: Callable[[int], str], most: int, length: int, reserved: int, guess: int) -> int:
    """Characters of text with which the prompt has nearly `length` tokens; `reserved` are not part of its text."""
    room = length - reserved
    enough = room - int(_SLACK * length)
    size = most_that_fits(lambda size: len(encode(build(size))), room, enough=enough, guess=guess, most=most)
    if size < 0:
        alone = len(encode(build(0))) + reserved
        raise DataError(
            f"needle length {length} is too short: the prompt alone has {alone} tokens, raise eval.needle.lengths"
        )
    if size == most and len(encode(build(size))) < enough:
        longest = len(encode(build(size))) + reserved
        raise DataError(
            f"needle length {length} is longer than the haystack texts, which are enough for {longest} tokens: "
            "add texts to eval.haystack or lower eval.needle.lengths"
        )
    return size
