"""Which models stand side by side in a report, and under which names: decided here for every table and figure.

In: run folders. Out: `Comparison`, a list of `Column` for the tables and one `Run` for each folder. A model that
several folders measured alike (the base model, say) is one column.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longlora.artifacts import RunFolder
from longlora.errors import RunFolderError
from longlora.evaluation.report.records import LABELS, VARIANTS, Evaluation, read_evaluations
from longlora.evaluation.report.tables import BEYOND, printable
from longlora.evaluation.report.training_log import TrainingRow, read_training, skipped_steps

_NAME_LENGTH = 28


@dataclass(frozen=True, eq=False)
class Column:
    """One measured model. `tint` numbers its colour in every figure: 0 is a model as it came."""

    label: str
    variant: str
    runs: tuple[str, ...]
    tint: int
    evaluation: Evaluation

    def mark(self, length: int) -> str:
        """The sign behind a number measured at `length` tokens: empty where the model's RoPE covers that length."""
        return BEYOND if length > self.evaluation.covered_context_length else ""


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder: its models by variant, its context lengths in tokens, its training and its recipe.

    `missing` are variants that its settings ask for and that were not measured. `borrowed` are variants that another
    folder of the comparison measured for the same model, `doubled` those that another folder measured as well and whose
    rows are shown. `left_out` says in words which rows of the folder are not shown, and why. `skipped_steps` are those
    that training did not take.
    """

    name: str
    columns: Mapping[str, Column]
    original_context_length: int
    context_length: int
    missing: tuple[str, ...]
    borrowed: tuple[str, ...]
    doubled: tuple[str, ...]
    left_out: tuple[str, ...]
    training: tuple[TrainingRow, ...]
    skipped_steps: int
    recipe: str | None

    @property
    def training_label(self) -> str:
        return self.columns["trained"].label if "trained" in self.columns else f"training of {self.name}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything a report shows."""

    runs: tuple[Run, ...]
    columns: tuple[Column, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(column.label for column in self.columns)

    @property
    def one_tokenizer(self) -> bool:
        return one_tokenizer(self.columns)

    def base_of(self, column: Column) -> Column | None:
        """The model as it came that `column` was made from; None where it was not measured or is `column` itself."""
        for run in self.runs:
            if column in run.columns.values():
                base = run.columns.get("base")
                return None if base is column else base
        return None


def one_tokenizer(columns: Sequence[Column]) -> bool:
    """Whether losses per token, token counts and prompts of these models compare at all."""
    return len({column.evaluation.tokenizer_hash for column in columns}) == 1


def read_comparison(folders: Sequence[RunFolder]) -> Comparison:
    """The models measured in `folders`, in their order; a folder named twice counts once.

    Raises:
        RunFolderError: no folder, one without an evaluation, or a damaged file; the message names the remedy.
    """
    distinct = list({folder.root.resolve(): folder for folder in folders}.values())
    if not distinct:
        raise RunFolderError("no run folder to report on: name at least one")
    names = _names(distinct)
    read = [read_evaluations(folder) for folder in distinct]
    measured = [item.evaluations for item in read]
    owners = _owners(names, measured)
    columns = _columns(names, owners)
    of_run = {(name, item.variant): item for item in columns for name in item.runs}
    runs = []
    for name, folder, item in zip(names, distinct, read, strict=True):
        evaluations = item.evaluations
        first = next(iter(evaluations.values()))
        asked = [variant for variant in VARIANTS if any(variant in e.settings.variants for e in evaluations.values())]
        held = {variant: of_run[name, variant] for variant in VARIANTS if (name, variant) in of_run}
        runs.append(
            Run(
                name=name,
                columns=held,
                original_context_length=first.original_context_length,
                context_length=first.context_length,
                missing=tuple(variant for variant in asked if variant not in held),
                borrowed=tuple(variant for variant in held if variant not in evaluations),
                doubled=tuple(variant for variant in evaluations if held[variant].runs[0] != name),
                left_out=item.left_out,
                training=tuple(read_training(folder)),
                skipped_steps=skipped_steps(folder),
                recipe=_recipe(folder),
            )
        )
    return Comparison(tuple(runs), columns)


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """The folders' own names, with the parent's in front where two are called the same."""
    paths = [folder.root.resolve() for folder in folders]
    names = [path.name or str(path) for path in paths]
    twice = {name for name, count in Counter(names).items() if count > 1}
    names = [f"{path.parent.name}/{name}" if name in twice else name for path, name in zip(paths, names, strict=True)]
    names = [_short(" ".join(printable(name).split()) or "run") for name in names]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name} ({number})" if name in twice else name for number, name in enumerate(names, 1)]


def _short(name: str) -> str:
    half = _NAME_LENGTH // 2
    return name if len(name) <= _NAME_LENGTH else f"{name[: half - 1]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


@dataclass(eq=False)
class _Owned:
    """One measured model and the runs that it belongs to."""

    evaluation: Evaluation
    runs: list[str]


def _owners(names: Sequence[str], measured: Sequence[Mapping[str, Evaluation]]) -> list[_Owned]:
    """Each model once. A run without a base or RoPE-only model of its own borrows an equal one."""
    owned: list[_Owned] = []
    for name, evaluations in zip(names, measured, strict=True):
        for evaluation in evaluations.values():
            same = [item for item in owned if _identity(item.evaluation) == _identity(evaluation)]
            if evaluation.variant != "trained" and same:
                same[0].runs.append(name)
                if same[0].evaluation.benchmarks is None:
                    same[0].evaluation = evaluation
            else:
                owned.append(_Owned(evaluation, [name]))
    for name, evaluations in zip(names, measured, strict=True):
        for variant in ("base", "rope_only"):
            if variant in evaluations or "trained" not in evaluations:
                continue
            fitting = [o for o in owned if o.evaluation.variant == variant and _made_of(o.evaluation, evaluations)]
            if fitting:
                fitting[0].runs.append(name)
    return owned


def _identity(item: Evaluation) -> tuple[str, frozenset[Any]]:
    """Equal for two measurements of the same weights with the same settings on the same texts."""
    settings = {name: value for name, value in item.settings.model_dump().items() if name != "variants"}
    facts = [item.variant, item.model, item.weights, item.dtype, item.attention, item.tokenizer_hash, item.seed]
    facts += [item.bos, item.rope_parameters]
    texts = [(row.document, row.context_length, row.tokens, row.stride, row.protocol) for row in item.perplexity]
    prompts = [(row.task, row.name, row.length, row.depth, row.trial, row.prompt_sha256) for row in item.retrieval]
    return json.dumps([*facts, settings], sort_keys=True), frozenset([*texts, *prompts])


def _made_of(other: Evaluation, own: Mapping[str, Evaluation]) -> bool:
    """Whether a base or RoPE-only model of another run is what the trained model of `own` was made from."""
    trained = own["trained"]
    facts = ("model", "tokenizer_hash", "original_context_length", "bos", "dtype")
    same = all(getattr(other, name) == getattr(trained, name) for name in facts)
    # Base and RoPE only have the same weights.
    same = same and all(item.weights == other.weights for variant, item in own.items() if variant != "trained")
    return same and (other.variant == "base" or other.rope_parameters == trained.rope_parameters)


def _columns(names: Sequence[str], owned: Sequence[_Owned]) -> tuple[Column, ...]:
    """In the order of the runs and of `VARIANTS`; the name of a run is added where a variant alone does not say it."""
    columns: list[Column] = []
    for item in sorted(owned, key=lambda item: (names.index(item.runs[0]), VARIANTS.index(item.evaluation.variant))):
        variant = item.evaluation.variant
        label = LABELS[variant]
        if len(item.runs) < len(names):
            label = f"{label} \N{MIDDLE DOT} {', '.join(item.runs)}"
        used = {column.tint for column in columns}
        tint = 0 if variant == "base" and 0 not in used else max(used, default=0) + 1
        columns.append(Column(label, variant, tuple(item.runs), tint, item.evaluation))
    return tuple(columns)


def _recipe(run: RunFolder) -> str | None:
    try:
        return run.recipe.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunFolderError(f"{run.recipe} cannot be read ({error}): repair it or remove it") from None
