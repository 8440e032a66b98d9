"""Held-out questions about documents, asked in the chat template that instructions are trained in.

In: files of instructions. Out: prompts, whose answers are scored by exact match and F1 (SQuAD, arXiv 1606.05250). An
example's last answer is the reference; what is before it is the prompt, whole: nothing is shortened.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from longlora.config import InstructConfig
from longlora.data.instruct_examples import Example, read_examples
from longlora.data.instruct_template import joint_of, set_chat_template
from longlora.data.instruct_tokens import Encoder
from longlora.data.longqa.score import form_of
from longlora.errors import DataError
from longlora.evaluation.retrieval.prompt import Prompt

_NO_LIMIT = sys.maxsize


def question_prompts(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    instruct: InstructConfig,
    *,
    per_length: int,
    max_new_tokens: int,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[Prompt]:
    """Prompts of `sources`, at most `per_length` of each length, by length and then as they stand in their files.

    Rows of ``longlora data longqa`` say their task, their length and where the evidence stands. Other examples are of
    the task ``question``, their length is that of their prompt, rounded up to a power of two.

    Args:
        max_new_tokens: tokens of an answer at most.
        seed: draws the questions.
        say: is told how many examples training would leave out too, and are not asked.

    Raises:
        DataError: a source or the template cannot be used, or no example is left.
    """
    tokenizer = copy.copy(tokenizer)
    set_chat_template(tokenizer, instruct.template)
    encoder = Encoder(tokenizer, _NO_LIMIT, instruct.shorten)
    by_length: dict[int, list[Prompt]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for source in sources:
        for example in read_examples(source, instruct.system, joint_of(instruct.template)):
            if why := encoder.unusable(example):
                left_out[why] += 1
                continue
            prompt = _prompt(example, encoder, max_new_tokens, seed)
            by_length[prompt.facts["length"]].append(prompt)
    if left_out:
        counts = ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in left_out.items())
        say(f"questions: left out {counts}, as in training")
    chosen = []
    for length, prompts in sorted(by_length.items()):
        generator = random.Random(f"{seed}-questions-{length}")
        places = sorted(generator.sample(range(len(prompts)), min(per_length, len(prompts))))
        chosen += [prompts[place] for place in places]
    if not chosen:
        raise DataError(f"eval.questions: {', '.join(sources)} holds no example to ask: name files with questions")
    return chosen


def _prompt(example: Example, encoder: Encoder, max_new_tokens: int, seed: int) -> Prompt:
    tokens = encoder.prompt(example)
    row = example.values
    ours = "document_end" in row  # LongAlign has a length too, another one for nearly each example
    task, length = row.get("task"), row.get("length") if ours else None
    task = task if isinstance(task, str) else "question"
    facts = {
        "task": "questions",
        "name": task,
        "length": length if isinstance(length, int) and length > 1 else 1 << (len(tokens) - 1).bit_length(),
        "depth": _depth(row.get("evidence")),
        "trial": 0,
        "document": str(row.get("document")) if ours else example.name,
        "example": str(row.get("id", example.name)),
        "seed": seed,
    }
    reference = example.messages[-1].content
    return Prompt(tuple(tokens), (reference,), form_of(task), max_new_tokens=max_new_tokens, facts=facts)


def _depth(evidence: Any) -> float | None:
    position = evidence.get("position") if isinstance(evidence, dict) else None
    return float(position) if isinstance(position, int | float) and 0 <= position <= 1 else None
