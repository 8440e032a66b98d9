"""RULER's three tasks with more than one place: a chain of variables, the most common words, the most frequent codes.

What differs from the original: it shuffles the words of every prompt with the same seed, so that the common ones stand
at the same places in all prompts of a length, and builds one example per length; here each prompt draws its own. Its
names can repeat; here they differ. With a chat template its examples stand inside or in front of the user's turn, by
the way it is called; here they always stand inside.
"""

from __future__ import annotations

import math
import random
import string
from itertools import pairwise

from longlora.evaluation.retrieval.ruler_draft import (
    Build,
    Draft,
    Filled,
    Setting,
    insert,
    largest,
    new_name,
    word_list,
)
from longlora.evaluation.retrieval.ruler_needles import NOISE

# Wordings and numbers: NVIDIA/RULER (Apache-2.0, Copyright (c) 2024 NVIDIA CORPORATION), commit c3f5e3b, constants.py,
# variable_tracking.py, common_words_extraction.py and freq_words_extraction.py in scripts/data/synthetic.
_TRACK = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
)
_TRACK_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{num_v} variables are assigned the value {query}, they are: "
)
_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
_COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FREQUENT_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"

_VARIABLES = 5
_EXAMPLE_TOKENS = 500
_COMMON_WORDS = 10
# From this length on common words stand 30 times in the list and others 3 times; below, 6 times and once.
_LONG = 4096
_FREQUENT_NEW_TOKENS = 50
_CODE_LETTERS = 6
_TOKENS_PER_CODE = 50
_ZETA_2 = math.pi**2 / 6


def track_variables(setting: Setting) -> Build:
    """A chain of five variables with one value, each assigned from the one before, among lines of noise.

    An example with shorter names stands in front, of 500 tokens at most as in the original (or half the length, where
    that is less); its size is at least one line of noise for each variable.
    """
    generator = random.Random(setting.seed)
    names, value = _names(5, generator), _number(generator)
    example = _tracking(_names(3, generator), _number(generator), f"{setting.seed}-example")

    def make(size: int) -> Filled:
        draft = example(size)
        return Filled(draft, setting.encode(draft.question + draft.prefix))

    found = largest(make, _VARIABLES, min(_EXAMPLE_TOKENS, setting.length // 2)) or make(_VARIABLES)
    shown = f"{found.draft.question}{found.draft.prefix} {' '.join(found.draft.references)}\n\n"
    own = _tracking(names, value, setting.seed)

    def build(size: int) -> Draft:
        draft = own(size)
        return Draft(shown + draft.question, draft.prefix, draft.references)

    return build


def _tracking(names: list[str], value: str, seed: str) -> Build:
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]

    def build(size: int) -> Draft:
        places = sorted(random.Random(f"{seed}-places").sample(range(size), len(lines)))
        merged, _ = insert(lines, [NOISE] * size, places)
        question = _TRACK.format(context="\n".join(merged), query=value)
        return Draft(question, _TRACK_PREFIX.format(num_v=len(names), query=value), tuple(names))

    return build


def _names(letters: int, generator: random.Random) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < _VARIABLES:
        names["".join(generator.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


def _number(generator: random.Random) -> str:
    return str(generator.randint(10000, 99998))


def list_words(setting: Setting) -> Build:
    """A numbered list in which ten words are more common than all others, behind an example of the same kind.

    The size is the number of different words. Where it exceeds the word list (8,000 words, enough for about 130,000
    tokens) the rest are pairs of an adjective and a noun; the original takes another list there.
    """
    generator = random.Random(setting.seed)
    words = list(word_list("noun", "adjective", "verb"))
    is_long = setting.length >= _LONG
    example_words = generator.sample(words, 40 if is_long else 20)
    listed = _numbered(example_words, 10 if is_long else 3, 3 if is_long else 1, f"{setting.seed}-example")
    answer = " ".join(f"{place}. {word}" for place, word in enumerate(example_words[:_COMMON_WORDS], 1))
    shown = f"{_COMMON.format(context=listed)}{_COMMON_PREFIX} {answer}\n"
    generator.shuffle(words)

    def build(size: int) -> Draft:
        pairs, taken = random.Random(f"{setting.seed}-pairs"), set(words)
        chosen = words[:size] + [new_name(pairs, taken) for _ in range(size - len(words))]
        listed = _numbered(chosen, 30 if is_long else 6, 3 if is_long else 1, f"{setting.seed}-order")
        return Draft(shown + _COMMON.format(context=listed), _COMMON_PREFIX, tuple(words[:_COMMON_WORDS]))

    return build


def _numbered(words: list[str], common: int, others: int, seed: str) -> str:
    """Words in any order with numbers in front, the first ten `common` times and all behind them `others` times."""
    entries = words[:_COMMON_WORDS] * common + words[_COMMON_WORDS:] * others
    random.Random(seed).shuffle(entries)
    return " ".join(f"{place}. {word}" for place, word in enumerate(entries, 1))


def list_codes(setting: Setting) -> Build:
    """Codes of six letters whose frequencies fall with the square of their rank; the first rank is dots, to be ignored.

    The size is the number of codes before fractions are cut off. From `LEAST_CODES` on, ranks 4 and 5 differ: there is
    one right answer.
    """
    generator = random.Random(setting.seed)
    kinds = max(5, (setting.length - _FREQUENT_NEW_TOKENS) // _TOKENS_PER_CODE)
    codes: dict[str, None] = {"...": None}
    while len(codes) < kinds:
        codes["".join(generator.choices(string.ascii_lowercase, k=_CODE_LETTERS))] = None
    ranked = list(codes)

    def build(size: int) -> Draft:
        text = [code for rank, code in enumerate(ranked, 1) for _ in range(int(size / rank**2 / _ZETA_2))]
        random.Random(f"{setting.seed}-order").shuffle(text)
        return Draft(_FREQUENT.format(context=" ".join(text)), _FREQUENT_PREFIX, tuple(ranked[1:4]))

    return build


# The size from which on rank 4 exceeds rank 5 by one code or more.
LEAST_CODES = math.ceil(_ZETA_2 / (1 / 16 - 1 / 25))
LEAST_WORDS = _COMMON_WORDS + 1
LEAST_LINES = _VARIABLES
