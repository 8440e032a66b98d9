"""The 11 synthetic tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654) that need no data set, and its summary numbers.

Read first: `ruler_prompts`. Wordings, numbers of needles and scores are the original's; the modules with the tasks say
what is drawn otherwise. Its two tasks of questions on Wikipedia (qa_1, qa_2) need downloads and are left out, so an
average over these 11 is not the published one over 13.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from longlora.config.evaluation import RulerConfig
from longlora.errors import DataError
from longlora.evaluation.retrieval.haystack import Haystack
from longlora.evaluation.retrieval.prompt import Encode, Prompt, split_answer
from longlora.evaluation.retrieval.ruler_draft import Build, Draft, Filled, Setting, largest
from longlora.evaluation.retrieval.ruler_lists import (
    LEAST_CODES,
    LEAST_LINES,
    LEAST_WORDS,
    list_codes,
    list_words,
    track_variables,
)
from longlora.evaluation.retrieval.ruler_needles import NEEDLE_TASKS, hide_needles

Wrap = Callable[[str, str], str]
"""Question and beginning of the answer to the whole text, such as through a chat template."""


@dataclass(frozen=True)
class _Task:
    draw: Callable[[Setting], Build]
    least: int
    new_tokens: int


_TASKS: dict[str, _Task] = {
    **{name: _Task(partial(hide_needles, task), task.keys * task.values, 128) for name, task in NEEDLE_TASKS.items()},
    "vt": _Task(track_variables, LEAST_LINES, 30),
    "cwe": _Task(list_words, LEAST_WORDS, 120),
    "fwe": _Task(list_codes, LEAST_CODES, 50),
}


def ruler_prompts(
    encode: Encode,
    before: Sequence[int],
    texts: Mapping[str, str],
    settings: RulerConfig,
    lengths: Sequence[int],
    seed: int,
    wrap: Wrap | None = None,
) -> list[Prompt]:
    """`num_samples` prompts for each task of `settings` and each length, by task, length and trial.

    Args:
        encode: a text in whole to tokens, with the special tokens that a chat template writes, without any around it.
        before: tokens in front of every prompt, such as a BOS.
        texts: real text by its name, for the tasks with an essay; where it is too short, the next one follows, and
            again.
        lengths: tokens of the prompt with the tokens that may be generated, at most.
        wrap: puts question and beginning of the answer into a chat template; an example in the prompt belongs to the
            question. None: one after the other.

    Raises:
        DataError: a length is too short for a task, or no text has words and a task needs them.
    """
    haystack = Haystack(texts)
    make = partial(ruler_prompt, encode, before, haystack, seed=seed, wrap=wrap)
    return [
        make(task, length, trial)
        for task in settings.tasks
        for length in lengths
        for trial in range(settings.num_samples)
    ]


def ruler_prompt(
    encode: Encode,
    before: Sequence[int],
    haystack: Haystack,
    task: str,
    length: int,
    trial: int,
    seed: int,
    wrap: Wrap | None = None,
) -> Prompt:
    """The prompt that a row names by task, length, trial and seed, whatever was made before.

    It fills the length but for 1% or about one line. `answer` is the value asked for where there is one, and empty
    where there are several, which may be given in any order.

    Raises:
        DataError: as `ruler_prompts`.
    """
    kind = _TASKS[task]
    build = kind.draw(Setting(encode, haystack, length, f"{seed}-ruler-{task}-{length}-{trial}"))

    def make(size: int) -> Filled:
        draft = build(size)
        return Filled(draft, encode(wrap(draft.question, draft.prefix) if wrap else draft.question + draft.prefix))

    filled = largest(make, kind.least, length - kind.new_tokens - len(before))
    if filled is None:
        needed = len(make(kind.least).tokens) + kind.new_tokens + len(before)
        raise DataError(
            f"ruler task {task} needs about {needed} tokens: length {length} is too short, raise eval.ruler.lengths or "
            "leave the task out of eval.ruler.tasks"
        )
    draft = filled.draft
    return Prompt(
        tokens=(*before, *filled.tokens),
        references=draft.references,
        metric="all",
        answer=_answer(encode, draft),
        max_new_tokens=kind.new_tokens,
        facts={
            "task": "ruler",
            "name": task,
            "length": length,
            "depth": draft.depth,
            "trial": trial,
            "document": draft.document,
            "seed": seed,
        },
    )


def _answer(encode: Encode, draft: Draft) -> tuple[int, ...]:
    if len(draft.references) > 1:
        return ()
    value = f" {draft.references[0]}"
    prefix, answer = split_answer(encode, draft.prefix, value)
    # The prompt ends with all tokens of the prefix: where the answer would change the last one, it is taken alone.
    return tuple(answer if prefix == encode(draft.prefix) else encode(value))


def effective_length(scores: Mapping[int, float], threshold: float) -> int | None:
    """The largest length with a score at or above the threshold, as in the paper's table 3; None where there is none.

    A shorter length below the threshold does not matter; in the published tables none is.

    Args:
        scores: average over tasks in percent, by length in tokens.
        threshold: percent; the original's 85.6 is Llama-2-7B-chat's at 4k over all 13 tasks.
    """
    return max((length for length, score in scores.items() if score >= threshold), default=None)


def weighted_average(scores: Mapping[int, float], increasing: bool) -> float:
    """RULER's wAvg: weights 1, 2, 3 ... by rank of the length (`increasing`), or the other way round."""
    ordered = [scores[length] for length in sorted(scores, reverse=not increasing)]
    return sum(rank * score for rank, score in enumerate(ordered, 1)) / sum(range(len(ordered) + 1))
