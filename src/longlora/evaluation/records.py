"""What the measuring half wrote into a run folder, read back as validated, frozen rows.

In: ``eval/VARIANT.json`` and ``metrics.jsonl``. Out: `Evaluation` by variant, `TrainingRow` by step.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longlora.artifacts import RunFolder, read_json
from longlora.errors import RunFolderError

VARIANTS = ("base", "rope_only", "trained")
LABELS = {"base": "base", "rope_only": "RoPE only", "trained": "trained"}
_AGAIN = "run `longlora eval` again"
_ReadRow = TypeVar("_ReadRow")


class _Record(BaseModel):
    # Infinite and not-a-number values are refused: no table can show them honestly.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class PerplexityRow(_Record):
    """Loss of one document in windows of `context_length` tokens; losses are mean nats per scored token."""

    document: str
    context_length: int
    stride: int
    protocol: str
    tokens: int = Field(gt=0)
    loss: float
    tail_tokens: int = 0
    tail_loss: float | None = None

    @property
    def has_tail(self) -> bool:
        return self.tail_loss is not None and self.tail_tokens > 0


class PositionRow(_Record):
    """Mean loss in nats over positions ``start`` to ``stop - 1`` of one document."""

    document: str
    start: int
    stop: int
    tokens: int = Field(gt=0)
    loss: float


class PasskeyRow(_Record):
    """One hidden key: prompt length in tokens, depth from 0 to 1, log-probability of the key in nats."""

    length: int
    depth: float = Field(ge=0, le=1)
    trial: int
    document: str | None = None
    name: str
    correct: bool
    log_probability: float


class Evaluation(_Record):
    """All rows measured for one variant, and on what."""

    schema_version: Literal[1] = Field(alias="schema")
    variant: Literal["base", "rope_only", "trained"]
    model: str
    original_context_length: int = Field(gt=0)
    context_length: int = Field(gt=0)
    rope_parameters: dict[str, Any] | None = None
    attention: str
    dtype: str
    device: str
    versions: dict[str, str | None]
    commit: str | None = None
    date: str
    seconds: float
    seed: int
    perplexity: list[PerplexityRow] = Field(default_factory=list)
    positions: list[PositionRow] = Field(default_factory=list)
    passkey: list[PasskeyRow] = Field(default_factory=list)


@dataclass(frozen=True)
class TrainingRow:
    """One logged training step; `tokens` and `seconds` count from the start of training where they are logged."""

    step: int
    loss: float
    tokens: float | None = None
    seconds: float | None = None


def read_evaluations(run: RunFolder) -> dict[str, Evaluation]:
    """Every variant that was measured, in the order of `VARIANTS`.

    Raises:
        RunFolderError: no variant was measured, a file is damaged, or the files belong to different extensions.
    """
    found = {name: _read_evaluation(run.evaluation(name), name) for name in VARIANTS if run.evaluation(name).exists()}
    if not found:
        raise RunFolderError(f"{run.root / 'eval'} holds no evaluation: run `longlora eval` first")
    contexts = {(item.original_context_length, item.context_length) for item in found.values()}
    if len(contexts) > 1:
        shown = ", ".join(f"{old} -> {new}" for old, new in sorted(contexts))
        raise RunFolderError(f"{run.root / 'eval'} mixes extensions ({shown}): {_AGAIN} for all variants")
    return found


def _read_evaluation(path: Path, variant: str) -> Evaluation:
    value = read_json(path, _AGAIN)
    try:
        evaluation = Evaluation.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise RunFolderError(f"{path} is damaged ({where}: {first['msg']}): {_AGAIN}") from None
    if evaluation.variant != variant:
        raise RunFolderError(f"{path} holds variant {evaluation.variant!r}: {_AGAIN}")
    return evaluation


def read_training(run: RunFolder) -> list[TrainingRow]:
    """Logged steps with a finite loss in order of step; empty when ``metrics.jsonl`` is missing.

    A step that was repeated after a resume counts once, with its last loss.

    Raises:
        RunFolderError: a line other than an unfinished last one is not a JSON object.
    """
    try:
        lines = run.metrics.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{run.metrics} cannot be read ({error}): remove it or repeat the training") from None
    rows: dict[int, TrainingRow] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError:
            if number == len(lines):  # no newline after it: training was stopped while writing this line
                continue
            raise RunFolderError(f"{run.metrics} line {number} is not JSON: remove that line") from None
        if not isinstance(values, dict):
            raise RunFolderError(f"{run.metrics} line {number} is not a JSON object: remove that line")
        step, loss = _finite(values.get("step")), _finite(values.get("loss"))
        if step is not None and loss is not None:
            rows[int(step)] = TrainingRow(
                int(step), loss, _finite(values.get("tokens")), _finite(values.get("seconds"))
            )
    return [rows[step] for step in sorted(rows)]


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def shared(
    evaluations: Mapping[str, Evaluation],
    select: Callable[[Evaluation], Iterable[_ReadRow]],
    key: Callable[[_ReadRow], Hashable],
) -> dict[str, list[_ReadRow]]:
    """The selected rows that all variants with any selected row have in common, aligned: item i is the same item.

    A key that occurs several times in a variant is matched by order of occurrence. Variants without a selected row
    are left out; empty when nothing is common.
    """
    keyed: dict[str, dict[tuple[Hashable, int], _ReadRow]] = {}
    for variant, evaluation in evaluations.items():
        seen: Counter[Hashable] = Counter()
        rows: dict[tuple[Hashable, int], _ReadRow] = {}
        for row in select(evaluation):
            name = key(row)
            rows[name, seen[name]] = row
            seen[name] += 1
        if rows:
            keyed[variant] = rows
    if not keyed:
        return {}
    first, *others = keyed.values()
    common = [name for name in first if all(name in other for other in others)]
    return {variant: [rows[name] for name in common] for variant, rows in keyed.items()} if common else {}


def shared_perplexity(evaluations: Mapping[str, Evaluation], context_length: int) -> dict[str, list[PerplexityRow]]:
    """Aligned perplexity rows at `context_length`, one per document that all measured variants have."""
    return shared(
        evaluations,
        lambda item: [row for row in item.perplexity if row.context_length == context_length],
        _measured_alike,
    )


def shared_tails(evaluations: Mapping[str, Evaluation], context_length: int) -> dict[str, list[PerplexityRow]]:
    """Like `shared_perplexity`, only rows that have a tail loss."""
    return shared(
        evaluations,
        lambda item: [row for row in item.perplexity if row.context_length == context_length and row.has_tail],
        _measured_alike,
    )


def _measured_alike(row: PerplexityRow) -> tuple[str, int, int, str]:
    """Rows compare only where the same tokens were scored in the same way."""
    return row.document, row.tokens, row.stride, row.protocol


def shared_positions(evaluations: Mapping[str, Evaluation]) -> dict[str, list[PositionRow]]:
    """Aligned rows of loss by position, paired by document and range."""
    return shared(evaluations, lambda item: item.positions, lambda row: (row.document, row.start, row.stop))


def shared_passkey(
    evaluations: Mapping[str, Evaluation], wanted: Callable[[PasskeyRow], bool] = lambda _: True
) -> dict[str, list[PasskeyRow]]:
    """Aligned passkey rows for which `wanted` holds, paired by length, depth, trial, document and name."""
    return shared(
        evaluations,
        lambda item: [row for row in item.passkey if wanted(row)],
        lambda row: (row.length, row.depth, row.trial, row.document, row.name),
    )
