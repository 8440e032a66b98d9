"""Which documents are held out: whole ones, and those that share text stay together."""

from __future__ import annotations

import difflib
import hashlib
import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

from longlora.data.documents import Document
from longlora.data.longqa.text import WORD, flatten
from longlora.errors import DataError

_SHINGLE_WORDS = 8
_KEEP_ONE_OF = 8
_SHARED = 0.2
_MANY = 100


def fingerprint(text: str) -> str:
    """SHA-256 of a text without case and white space differences: equal for copies."""
    return hashlib.sha256(flatten(text).encode()).hexdigest()


def without_copies(documents: Sequence[Document]) -> tuple[list[Document], list[tuple[str, str]]]:
    """The documents with distinct names, the first of equal ones only; and the name of each copy with its original's.

    A name that occurs again gets a number: ``book (2)``.
    """
    first: dict[str, str] = {}
    kept: list[Document] = []
    copies: list[tuple[str, str]] = []
    taken: set[str] = set()
    for document in documents:
        original = first.get(mark := fingerprint(document.text))
        if original is not None:
            copies.append((document.name, original))
            continue
        name, number = document.name, 2
        while name in taken:
            name, number = f"{document.name} ({number})", number + 1
        taken.add(name)
        first[mark] = name
        kept.append(Document(name, document.text))
    return kept, copies


def related_groups(documents: Sequence[Document]) -> list[list[str]]:
    """Names of documents that share text, in groups: a fifth of the runs of eight words of the smaller one is enough.

    One run in eight is compared, chosen by its checksum, so a text of a few sentences can be missed.
    """
    marks = [_shingles(document.text) for document in documents]
    where: dict[int, list[int]] = defaultdict(list)
    for number, own in enumerate(marks):
        for mark in own:
            where[mark].append(number)
    shared: Counter[tuple[int, int]] = Counter()
    for numbers in where.values():
        shared.update(_pairs(numbers))
    group = list(range(len(documents)))
    for (one, other), count in sorted(shared.items()):
        if count >= _SHARED * min(len(marks[one]), len(marks[other])):
            group = [group[one] if each == group[other] else each for each in group]
    together: dict[int, list[str]] = defaultdict(list)
    for number, document in enumerate(documents):
        together[group[number]].append(document.name)
    return list(together.values())


def _pairs(numbers: Sequence[int]) -> Iterable[tuple[int, int]]:
    """All pairs; neighbours only where so many documents share a run that all pairs would be too many."""
    return combinations(numbers, 2) if len(numbers) <= _MANY else pairwise(numbers)


def _shingles(text: str) -> set[int]:
    words = [word.encode() for word in WORD.findall(flatten(text))]
    runs = (zlib.crc32(b" ".join(words[at : at + _SHINGLE_WORDS])) for at in range(len(words) - _SHINGLE_WORDS + 1))
    return {mark for mark in runs if mark % _KEEP_ONE_OF == 0}


def held_out(groups: Sequence[Sequence[str]], share: float, names: Sequence[str], seed: int) -> set[str]:
    """Names of the held-out documents: those given with their relatives, else a share of the documents drawn by seed.

    At least one group is held out when `share` is above 0, and at least one is left to train on.

    Raises:
        DataError: an unknown name, or no way to have both sides.
    """
    known = [name for group in groups for name in group]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, known[:5]))}"
            raise DataError(
                f"held-out document {name!r} is not among the {len(known)} documents that are used: {meant}"
            )
    if names:
        chosen = {name for group in groups if set(group) & set(names) for name in group}
        if len(chosen) == len(known):
            raise DataError(f"all {len(known)} documents are held out, or share text with one: leave some to train on")
        return chosen
    if share <= 0:
        return set()
    if len(groups) < 2:
        raise DataError(
            f"{len(known)} documents that are one text cannot be split: give other documents, or --heldout 0"
        )
    order = sorted(list(group) for group in groups)
    random.Random(f"{seed} split").shuffle(order)
    wanted = max(1, round(share * len(known)))
    taken: set[str] = set()
    for group in order:
        if len(taken) + len(group) <= wanted:
            taken.update(group)
    return taken or set(sorted(order, key=len)[0])
