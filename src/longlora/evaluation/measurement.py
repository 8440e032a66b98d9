"""One loaded model, asked everything: documents read for their loss, key tokens, prompts. Each row is kept at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora.attention.cached import cached_attention
from longlora.config import Recipe
from longlora.data.shards import bound_tokens
from longlora.evaluation.loss.longppl import KeyDocument, key_document, longppl_row
from longlora.evaluation.loss.perplexity import byte_counter, document_rows, first_window
from longlora.evaluation.material import Material, Text
from longlora.evaluation.progress import CostProgress
from longlora.evaluation.reading.answering import Answered, PromptReader, Work
from longlora.evaluation.reading.stream import Reading, read
from longlora.evaluation.retrieval.prompt import Prompt
from longlora.evaluation.samples import Samples, key_of
from longlora.evaluation.variants import SAME_MODEL, environment
from longlora.memory.limit import peak_bytes
from longlora.model.build import tokenizer_hash
from longlora.model.end_tokens import end_tokens
from longlora.model.head import output_head

_LISTS = ("perplexity", "positions", "longppl", "retrieval")


@dataclass(frozen=True)
class _Item:
    """A document to measure."""

    key: str
    name: str
    tokens: int
    """Read at least."""
    measure: Callable[[], dict[str, Any]]
    """Rows by list."""


class _Meter:
    """What a reader did, and how long it took, since it was last asked."""

    def __init__(self, reader: PromptReader) -> None:
        self._reader, self._work, self._moment = reader, asdict(reader.work), time.monotonic()

    def more(self) -> dict[str, float]:
        work, moment = asdict(self._reader.work), time.monotonic()
        made = {name: work[name] - self._work[name] for name in work} | {"seconds": moment - self._moment}
        self._work, self._moment = work, moment
        return made


class Measurement:
    """Measures `model` as the recipe's ``eval`` says; `name` is what a person sees.

    Rows that `samples` holds of the same model are not measured again.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: Path,
        console: Console,
        name: str,
    ) -> None:
        self._recipe, self._model, self._tokenizer = recipe, model, tokenizer
        self._path, self._console, self._name = samples, console, name
        self._head = output_head(model)
        self._environment = environment(recipe, model)
        self._costs: dict[str, dict[str, float]] = {}

    def of(
        self, material: Material, windows: Sequence[int], keys: Sequence[KeyDocument], keys_context: int
    ) -> dict[str, Any]:
        """All rows, by list, and what they were measured on.

        Args:
            windows: context lengths of the loss, in tokens.
            keys: documents of LongPPL with their key tokens.
            keys_context: tokens of the long context in which these were found.
        """
        began = time.monotonic()
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in _LISTS}
        with self._samples() as samples, cached_attention(self._model):
            for part in (
                self._documents(material.documents, windows, samples),
                self._longppl(keys, keys_context, samples),
                self._prompts(material.prompts, samples),
            ):
                for found in part:
                    for name, more in found.items():
                        rows[name] += more
        bos, _ = bound_tokens(self._tokenizer)
        return {
            **self._environment,
            "tokenizer_hash": tokenizer_hash(self._tokenizer),
            "bos": bool(bos),
            "seed": self._recipe.eval.seed,
            "settings": self._recipe.eval.model_dump(mode="json"),
            "seconds": time.monotonic() - began,
            "peak_bytes": peak_bytes(),
            **rows,
            "cost": [{"task": task, **cost} for task, cost in self._costs.items()],
        }

    def key_documents(
        self,
        documents: Sequence[tuple[str, list[int]]],
        context_length: int,
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None,
    ) -> list[KeyDocument]:
        """Key tokens of LongPPL, with this model as the evaluator; see `longppl.key_document`."""
        settings = self._recipe.eval.longppl
        decisive = [settings.model_dump(mode="json"), context_length, tokenizers is None]
        keys = [key_of("keys", name, tokens, *decisive) for name, tokens in documents]
        with self._samples() as samples, cached_attention(self._model):
            wanted = [place for place, key in enumerate(keys) if samples.get(key) is None]
            with self._progress(len(wanted)) as progress:
                for place in wanted:
                    name, tokens = documents[place]
                    made = key_document(
                        name, tokens, lambda part: self._read(part).losses_T, settings,
                        tokenizers=tokenizers, context_length=context_length,
                    )  # fmt: skip
                    samples.add(keys[place], asdict(made))
                    progress.advance(1, name)
            return [KeyDocument(**samples[key]) for key in keys]

    def _samples(self) -> Samples:
        return Samples(self._path, {name: self._environment[name] for name in SAME_MODEL})

    def _progress(self, total: float) -> CostProgress:
        return CostProgress(self._console, self._name, total)

    def _read(self, tokens: Sequence[int], questions: Sequence[Any] = ()) -> Reading:
        return read(
            self._model,
            self._head,
            tokens,
            questions,
            chunk_tokens=self._recipe.eval.prefill_chunk_tokens,
            loss_chunk_tokens=self._recipe.train.loss_chunk_tokens,
        )

    def _each(self, task: str, items: Sequence[_Item], samples: Samples) -> Iterator[dict[str, Any]]:
        """The rows of each document, measured or kept."""
        wanted = [item for item in items if samples.get(item.key) is None]
        with self._progress(len(wanted)) as progress:
            for item in wanted:
                began = time.monotonic()
                rows = item.measure()
                work = asdict(Work(tokens_read=item.tokens))
                samples.add(item.key, {"rows": rows, "seconds": time.monotonic() - began, **work})
                progress.advance(1, f"{task} {item.name}")
        for item in items:
            kept = samples[item.key]
            self._count(task, kept, 0)
            yield kept["rows"]

    def _documents(self, texts: Sequence[Text], windows: Sequence[int], samples: Samples) -> Iterator[dict[str, Any]]:
        settings = self._recipe.eval.perplexity
        decisive = [settings.protocol, settings.stride, settings.tokens_per_document, list(windows)]
        items = []
        for text in texts:
            asked = [asdict(question) for question in text.hidden.questions]
            key = key_of("document", text.name, text.hidden.tokens, text.hidden.scored, asked, decisive)
            items.append(_Item(key, text.name, len(text.hidden.tokens), partial(self._document, text, windows)))
        yield from self._each("perplexity", items, samples)

    def _document(self, text: Text, windows: Sequence[int]) -> dict[str, Any]:
        settings, hidden = self._recipe.eval.perplexity, text.hidden
        first = first_window(windows, settings.tokens_per_document, settings.protocol)
        reading = self._read(hidden.tokens[:first], hidden.questions)
        perplexity, positions = document_rows(
            text.name,
            reading.losses_T,
            hidden.scored,
            windows,
            settings.stride,
            settings.tokens_per_document,
            lambda start, stop: self._read(hidden.tokens[start:stop]).losses_T,
            protocol=settings.protocol,
            bytes_until=byte_counter(self._tokenizer, hidden.tokens, hidden.scored),
        )
        answered = []
        for prompt, answer in zip(text.prompts(), reading.answers, strict=True):
            right = answer.likeliest == prompt.answer
            said = Answered(self._tokenizer.decode(answer.likeliest), float(right), right, answer.log_probability)
            answered.append(_retrieval_row(prompt, said))
        return {"perplexity": perplexity, "positions": positions, "retrieval": answered}

    def _longppl(self, keys: Sequence[KeyDocument], context: int, samples: Samples) -> Iterator[dict[str, Any]]:
        settings = self._recipe.eval.longppl
        evaluator = settings.evaluator or self._recipe.model.name_or_path
        items = []
        for document in keys:
            key = key_of("longppl", asdict(document), settings.model_dump(mode="json"), context)
            measure = partial(self._longppl_document, document, context, evaluator)
            items.append(_Item(key, document.name, len(document.tokens), measure))
        yield from self._each("longppl", items, samples)

    def _longppl_document(self, document: KeyDocument, context: int, evaluator: str) -> dict[str, Any]:
        losses_T: Tensor = self._read(document.tokens).losses_T
        settings = self._recipe.eval.longppl
        row = longppl_row(document, losses_T, settings, context_length=context, evaluator=evaluator)
        return {"longppl": [row]}

    def _prompts(self, prompts: Sequence[Prompt], samples: Samples) -> Iterator[dict[str, Any]]:
        """Task by task, so that each has its cost; within a task in the order in which prompts share most."""
        reader = PromptReader(
            self._model,
            self._head,
            lambda tokens: str(self._tokenizer.decode(tokens, skip_special_tokens=True)),
            end_tokens(self._model, self._tokenizer),
            chunk_tokens=self._recipe.eval.prefill_chunk_tokens,
            batch_tokens=self._recipe.eval.batch_tokens,
        )
        keys = [_key(prompt) for prompt in prompts]
        wanted: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            if samples.get(keys[index]) is None:
                wanted.setdefault(str(prompt.facts["task"]), []).append(index)
        plans = {task: reader.order([prompts[index] for index in indices]) for task, indices in wanted.items()}
        with self._progress(sum(step.cost for plan in plans.values() for step in plan)) as progress:
            for task, indices in wanted.items():
                # The first answer of a step is there when the whole step is done.
                costs = {step.indices[0]: step.cost for step in plans[task]}
                meter = _Meter(reader)
                for place, answered in reader.answers([prompts[index] for index in indices]):
                    prompt = prompts[indices[place]]
                    samples.add(keys[indices[place]], {"rows": _retrieval_row(prompt, answered), **meter.more()})
                    progress.advance(costs.get(place, 0.0), f"{task} {prompt.facts['name']} {prompt.facts['length']}")
        for prompt, key in zip(prompts, keys, strict=True):
            kept = samples[key]
            self._count(str(prompt.facts["task"]), kept, 1)
            # The facts are this recipe's own: the same prompt may have been asked by another one under another name.
            yield {"retrieval": [kept["rows"] | prompt.facts]}

    def _count(self, task: str, kept: dict[str, Any], prompts: int) -> None:
        cost = self._costs.setdefault(task, dict.fromkeys(("seconds", "prompts", *_WORK), 0))
        cost["prompts"] += prompts
        for name in ("seconds", *_WORK):
            cost[name] += kept[name]


_WORK = tuple(field.name for field in fields(Work))


def _key(prompt: Prompt) -> str:
    return key_of("prompt", prompt.sha256, prompt.references, prompt.metric, prompt.answer, prompt.max_new_tokens)


def _retrieval_row(prompt: Prompt, answered: Answered) -> dict[str, Any]:
    return {
        **prompt.facts,
        "tokens": len(prompt.tokens),
        "references": list(prompt.references),
        "answer": answered.text.strip(),
        "score": answered.score,
        "correct": answered.correct,
        "log_probability": answered.log_probability,
        "answer_tokens": len(prompt.answer),
        "prompt_sha256": prompt.sha256,
    }
