"""RULER's eight needle tasks: numbers or UUIDs behind names, in a repeated line, in real text, or among other needles.

Sizes are words of the real text, or lines. What differs from the original: it begins every text at the first word of
its essays, and shuffles the needles of every prompt with the same seed; here each prompt draws where the text begins,
the order of the needles and their places. Its keys can occur twice in a prompt; here they differ. It puts two spaces
where needles meet and one in front of a needle that begins the text; here one parts and none stands in front.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from longlora.evaluation.retrieval.haystack import Haystack
from longlora.evaluation.retrieval.ruler_draft import Build, Draft, Setting, insert, new_name

# Wordings and numbers: NVIDIA/RULER (Apache-2.0, Copyright (c) 2024 NVIDIA CORPORATION), commit c3f5e3b,
# scripts/synthetic.yaml and constants.py, niah.py in scripts/data/synthetic.
_QUESTION = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
_SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"))
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = tuple(round(100 * step / 39) for step in range(40))

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Needles:
    """One of the needle tasks."""

    haystack: Literal["noise", "essay", "needle"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    """For each key."""
    queries: int = 1
    """Keys that are asked for."""


NEEDLE_TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}


def hide_needles(task: Needles, setting: Setting) -> Build:
    """Draw keys, values, their order and where the text begins; the places follow from the size."""
    generator = random.Random(setting.seed)
    taken: set[str] = set()
    keys = [_key(task.key, generator, taken) for _ in range(task.keys)]
    hidden = [(key, _value(task.value, generator)) for key in keys for _ in range(task.values)]
    asked = generator.sample(keys, task.queries)
    references = tuple(value for query in asked for key, value in hidden if key == query)
    generator.shuffle(hidden)
    lines = [_NEEDLE.format(kind=task.value, key=key, value=value) for key, value in hidden]
    target = [key for key, _ in hidden].index(asked[0])
    between = " " if task.haystack == "essay" else "\n"
    document, make_parts = _haystack(task, setting, taken, generator)
    depths = sorted(generator.sample(_DEPTHS, len(lines)))

    def build(size: int) -> Draft:
        parts = make_parts(size)
        places = [len(parts) * depth // 100 for depth in depths]
        if task.haystack != "essay":
            places = sorted(random.Random(f"{setting.seed}-places").sample(range(size), len(lines)))
        merged, found = insert(lines, parts, places)
        context = between.join(merged)
        start = sum(len(part) + len(between) for part in merged[: found[target]])
        depth = round(start / max(1, len(context) - len(lines[target])), 4)
        question, prefix = _ask(task, context, asked)
        return Draft(question, prefix, references, depth if len(references) == 1 else None, document)

    return build


def _haystack(
    task: Needles, setting: Setting, taken: set[str], generator: random.Random
) -> tuple[str | None, Callable[[int], list[str]]]:
    """Name of the text in which it begins, and its parts by size."""
    if task.haystack == "noise":
        return None, lambda size: [NOISE] * size
    if task.haystack == "needle":
        return None, lambda size: _other_needles(task, size, set(taken), random.Random(f"{setting.seed}-others"))
    document, start = setting.haystack.choose(generator)
    return document, lambda size: _first_words(setting.haystack, document, start, size)


def _other_needles(task: Needles, size: int, taken: set[str], generator: random.Random) -> list[str]:
    keys = (_key(task.key, generator, taken) for _ in range(size))
    return [_NEEDLE.format(kind=task.value, key=key, value=_value(task.value, generator)) for key in keys]


def _first_words(haystack: Haystack, document: str, start: int, size: int) -> list[str]:
    """Sentences of `size` words together, the last one cut; one space between words."""
    reader, found, left = haystack.read(document, start), [], size
    while left:
        words = next(reader).split()[:left]
        left -= len(words)
        if words:
            found.append(" ".join(words))
    return found


def _ask(task: Needles, context: str, asked: list[str]) -> tuple[str, str]:
    """Question and beginning of the answer, in the singular where one value is asked for."""
    question, prefix, kind = _QUESTION, _PREFIX, str(task.value)
    if task.queries * task.values == 1:
        kind = kind[:-1]
        for plural, singular in _SINGULAR:
            question, prefix = question.replace(plural, singular), prefix.replace(plural, singular)
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    return question.format(kind=kind, context=context, query=query), prefix.format(kind=kind, query=query)


def _key(kind: Kind, generator: random.Random, taken: set[str]) -> str:
    return new_name(generator, taken) if kind == "words" else _value(kind, generator)


def _value(kind: Kind, generator: random.Random) -> str:
    if kind == "numbers":
        return str(generator.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=generator.getrandbits(128), version=4))
