"""Passkey retrieval (Mohtashami and Jaggi 2023): a number is hidden in a long text and asked for at its end.

Two forms. `filler_prompts` is the original: one key in a text of five repeated sentences, on a grid of lengths and
depths. `hide_facts` hides several numbers of different names in a real document that is read anyway for its loss, and
asks for each of them at every length: many retrievals for the price of one reading.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longlora.errors import DataError
from longlora.evaluation.stream import Question

# The prompt of the Landmark Attention code, also used by LongLoRA.
_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_NAMES = ("pass key", "phone number", "house number", "account number")

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Hidden:
    """A text with hidden numbers, the questions about them, and what is known of each question."""

    tokens: list[int]
    scored: list[bool]
    """False where a token was put in by us and does not count for the loss of the text."""
    questions: list[Question]
    facts: list[dict[str, object]]
    """For each question: length, depth, trial, name and key, as they appear in the rows."""


def filler_prompts(
    encode: Encode, before: Sequence[int], lengths: Sequence[int], depths: Sequence[float], num_trials: int, seed: int
) -> list[Hidden]:
    """One prompt for each length, depth and trial; `length` counts all tokens up to the end of the answer.

    Args:
        before: tokens in front of every text, such as a BOS that the tokenizer adds.

    Raises:
        DataError: a length has no room for the prompt itself.
    """
    return [
        _filler_prompt(encode, before, length, depth, trial, seed)
        for length in lengths
        for depth in depths
        for trial in range(num_trials)
    ]


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
    generator = random.Random(f"{seed}-{trial}")
    planted = []
    # Another name at each depth in every document, so that a name that is easy to find favours no depth.
    names = [_NAMES[(place + trial) % len(_NAMES)] for place in range(len(depths))]
    for depth, name in zip(sorted(depths), names, strict=True):
        key = str(generator.randint(10000, 99999))
        planted.append((max(1, round(depth * shortest)), name, key))
    asked = [_question(encode, name, key) for _, name, key in planted]
    tokens: list[int] = []
    scored: list[bool] = []
    used = 0
    for position, name, key in planted:
        sentence = _sentence(encode, name, key)
        text = document[used : used + max(0, position - len(tokens))]
        used += len(text)
        tokens += [*text, *sentence]
        scored += [True] * len(text) + [False] * len(sentence)
    if len(tokens) + max(len(question) + len(answer) for question, answer in asked) > shortest:
        raise DataError(f"passkey length {shortest} is too short for {len(depths)} hidden numbers; raise it")
    text = document[used : used + len(document) - len(tokens)]
    tokens += text
    scored += [True] * len(text)
    questions, facts = [], []
    for length in lengths:
        for (position, name, key), (question, answer) in zip(planted, asked, strict=True):
            questions.append(Question(length - len(question) - len(answer), tuple(question), tuple(answer)))
            facts.append({"length": length, "depth": position / length, "trial": trial, "name": name, "key": key})
    return Hidden(tokens, scored, questions, facts)


def _filler_prompt(encode: Encode, before: Sequence[int], length: int, depth: float, trial: int, seed: int) -> Hidden:
    key = str(random.Random(f"{seed}-{length}-{depth}-{trial}").randint(10000, 99999))
    task = [*before, *encode(_TASK)]
    sentence = _sentence(encode, "pass key", key)
    question, answer = _question(encode, "pass key", key)
    room = length - len(task) - len(sentence) - len(question) - len(answer)
    if room < 0:
        raise DataError(f"passkey length {length} is too short: the prompt alone has {length - room} tokens")
    filler = encode(_FILLER)
    filler = filler * (room // len(filler) + 1)
    at = round(depth * room)
    tokens = [*task, *filler[:at], *sentence, *filler[at:room]]
    asked = Question(len(tokens), tuple(question), tuple(answer))
    fact: dict[str, object] = {"length": length, "depth": depth, "trial": trial, "name": "pass key", "key": key}
    return Hidden(tokens, [False] * len(tokens), [asked], [fact])


def _sentence(encode: Encode, name: str, key: str) -> list[int]:
    return encode(f"\nThe {name} is {key}. Remember it. {key} is the {name}.\n")


def _question(encode: Encode, name: str, key: str) -> tuple[list[int], list[int]]:
    """Question and answer as they are tokenized in one text: alone, the answer may begin with other tokens."""
    question = f"\nWhat is the {name}? The {name} is"
    alone, together = encode(question), encode(f"{question} {key}")
    shared = 0
    while shared < len(alone) and alone[shared] == together[shared]:
        shared += 1
    return together[:shared], together[shared:]
