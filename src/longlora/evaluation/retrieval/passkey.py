"""Passkey retrieval (Mohtashami and Jaggi 2023): a number is hidden in a long text and asked for at its end.

Three forms. `filler_prompts`: one key in a text of five repeated sentences, on an exact grid of lengths and depths.
`landmark_prompts`: the same as the original code makes it, cut at characters, the key at a random place.
`hide_facts` hides several numbers of different names in a real document that is read anyway for its loss, and asks for
each of them at every length: many retrievals for the price of one reading.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from longlora.errors import DataError
from longlora.evaluation.reading.stream import Question
from longlora.evaluation.retrieval.prompt import Encode, Prompt, split_answer

# The wording of the Landmark Attention code, also used by LongLoRA's passkey_retrivial.py.
_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NAMES = ("pass key", "phone number", "house number", "account number")
_NEW_TOKENS = 10  # as in the Landmark Attention code
# LongLoRA's code: so many characters of filler for a token, in steps of 1024.
_CHARACTERS_PER_TOKEN = 3.75
_CHARACTER_STEP = 1024


@dataclass(frozen=True)
class Hidden:
    """A text with hidden numbers, the questions about them, and what is known of each question."""

    tokens: list[int]
    scored: list[bool]
    """False where a token was put in by us and does not count for the loss of the text."""
    questions: list[Question]
    facts: list[dict[str, object]]
    """For each question: task, name, length, depth, trial, seed and key, as they appear in the rows."""


def filler_prompts(
    encode: Encode, before: Sequence[int], lengths: Sequence[int], depths: Sequence[float], num_trials: int, seed: int
) -> list[Prompt]:
    """One prompt for each length, depth and trial, with a key of five digits of its own.

    All prompts have the same filler from its beginning on, so two of them are equal up to the shallower of their keys.

    Args:
        before: tokens in front of every text, such as a BOS that the tokenizer adds.
        lengths: prompt and the tokens that are generated, exactly.
        depths: part of the filler that stands in front of the key.

    Raises:
        DataError: a length has no room for the prompt itself.
    """
    return [
        filler_prompt(encode, before, length, depth, trial, seed)
        for length in lengths
        for depth in depths
        for trial in range(num_trials)
    ]


def filler_prompt(encode: Encode, before: Sequence[int], length: int, depth: float, trial: int, seed: int) -> Prompt:
    """The prompt of one cell and trial of `filler_prompts`."""
    depth = float(depth)
    key = str(random.Random(f"{seed}-passkey-filler-{length}-{depth}-{trial}").randint(10000, 99999))
    inside = partial(_inside, encode)
    sentence = inside(_sentence("pass key", key))
    question, answer = split_answer(inside, _question("pass key"), f" {key}")
    new_tokens = max(_NEW_TOKENS, len(answer))
    task, first, again = _filler(encode)
    room = length - len(before) - len(task) - len(sentence) - len(question) - new_tokens
    if room < 0:
        raise DataError(_too_short(length, length - room))
    filler = first + again * (room // len(again) + 1)
    at = round(depth * room)
    tokens = [*before, *task, *filler[:at], *sentence, *filler[at:room], *question]
    facts = _facts("filler", length, depth, trial, seed)
    return Prompt(tuple(tokens), (key,), "first_integer", tuple(answer), new_tokens, facts)


def landmark_prompts(
    encode: Encode, before: Sequence[int], lengths: Sequence[int], num_trials: int, seed: int
) -> list[Prompt]:
    """One prompt for each length and trial as LongLoRA's code makes it: a key from 1 to 50,000 at a random character.

    A length is 3.75 characters of filler for each token, in steps of 1024 characters, so a prompt is shorter or longer
    than its length. Unlike there, filler is taken away in such steps until prompt and answer are within the length.

    Raises:
        DataError: a length has no room for the prompt itself.
    """
    return [landmark_prompt(encode, before, length, trial, seed) for length in lengths for trial in range(num_trials)]


def landmark_prompt(encode: Encode, before: Sequence[int], length: int, trial: int, seed: int) -> Prompt:
    """The prompt of one length and trial of `landmark_prompts`."""
    characters = int(_CHARACTERS_PER_TOKEN * length) // _CHARACTER_STEP * _CHARACTER_STEP
    tokens = length
    while characters >= 0:
        generator = random.Random(f"{seed}-passkey-landmark-{length}-{trial}")
        in_front = generator.randint(0, characters)
        key = str(generator.randint(1, 50000))
        filler = " ".join([_FILLER] * (characters // len(_FILLER) + 1))
        parts = (filler[:in_front], _sentence("pass key", key), filler[: characters - in_front], _question("pass key"))
        prompt, answer = split_answer(encode, _TASK + "".join(parts), f" {key}")
        new_tokens = max(_NEW_TOKENS, len(answer))
        tokens = len(before) + len(prompt) + new_tokens
        if tokens <= length:
            depth = in_front / characters if characters else 0.0
            facts = _facts("landmark", length, depth, trial, seed)
            return Prompt((*before, *prompt), (key,), "first_integer", tuple(answer), new_tokens, facts)
        fitting = int(characters * length / tokens) // _CHARACTER_STEP * _CHARACTER_STEP
        characters = min(characters - _CHARACTER_STEP, fitting)
    raise DataError(_too_short(length, tokens))


def hide_facts(
    encode: Encode, document: Sequence[int], lengths: Sequence[int], depths: Sequence[float], trial: int, seed: int
) -> Hidden:
    """Hide one number for each of `depths` in `document`, which loses as many tokens at its end as are put in.

    Depths are parts of the shortest length, so that every number is there to be asked for at every length.

    Raises:
        DataError: more depths than names, or the shortest length has no room for them.
    """
    if len(depths) > len(_NAMES):
        raise DataError(f"{len(depths)} depths: a document hides at most {len(_NAMES)} numbers, give fewer depths")
    shortest = min(lengths)
    inside = partial(_inside, encode)
    generator = random.Random(f"{seed}-{trial}")
    planted = []
    # Another name at each depth in every document, so that a name that is easy to find favours no depth.
    names = [_NAMES[(place + trial) % len(_NAMES)] for place in range(len(depths))]
    for depth, name in zip(sorted(depths), names, strict=True):
        key = str(generator.randint(10000, 99999))
        planted.append((max(1, round(depth * shortest)), name, key))
    asked = [split_answer(inside, _question(name), f" {key}") for _, name, key in planted]
    tokens: list[int] = []
    scored: list[bool] = []
    places: list[int] = []
    used = 0
    for position, name, key in planted:
        sentence = inside(_sentence(name, key))
        text = document[used : used + max(0, position - len(tokens))]
        used += len(text)
        places.append(len(tokens) + len(text))  # behind `position` where the number before ends behind it
        tokens += [*text, *sentence]
        scored += [True] * len(text) + [False] * len(sentence)
    if len(tokens) + max(len(question) + len(answer) for question, answer in asked) > shortest:
        raise DataError(
            f"passkey length {shortest} is too short for {len(depths)} hidden numbers: raise eval.passkey.lengths or "
            "give fewer depths"
        )
    text = document[used : used + len(document) - len(tokens)]
    tokens += text
    scored += [True] * len(text)
    questions, facts = [], []
    for length in lengths:
        for (_, name, key), place, (question, answer) in zip(planted, places, asked, strict=True):
            questions.append(Question(length - len(question) - len(answer), tuple(question), tuple(answer)))
            facts.append({**_facts(name, length, place / length, trial, seed), "key": key})
    return Hidden(tokens, scored, questions, facts)


def _too_short(length: int, tokens: int) -> str:
    return f"passkey length {length} is too short: the prompt alone has {tokens} tokens, raise eval.passkey.lengths"


def _facts(name: str, length: int, depth: float, trial: int, seed: int) -> dict[str, object]:
    fact = {"task": "passkey", "name": name, "length": length, "depth": depth, "trial": trial}
    return {**fact, "document": None, "seed": seed}


def _filler(encode: Encode) -> tuple[list[int], list[int], list[int]]:
    """The task, the filler behind it and the filler behind filler, as they are tokenized in one text."""
    task, once, twice = encode(_TASK), encode(_TASK + _FILLER), encode(f"{_TASK}{_FILLER} {_FILLER}")
    if once[: len(task)] == task and twice[: len(once)] == once:
        return task, once[len(task) :], twice[len(once) :]
    return task, encode(f"{_FILLER} "), encode(f"{_FILLER} ")


def _inside(encode: Encode, text: str) -> list[int]:
    """`text` as it is tokenized behind other text: at the beginning, some tokenizers put a space in front of it."""
    word = encode("again")
    both = encode(f"again{text}")
    return both[len(word) :] if both[: len(word)] == word else encode(text)


def _sentence(name: str, key: str) -> str:
    return f"\nThe {name} is {key}. Remember it. {key} is the {name}.\n"


def _question(name: str) -> str:
    return f"\nWhat is the {name}? The {name} is"
