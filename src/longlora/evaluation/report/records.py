"""What the measuring half wrote into a run folder, read back as validated, frozen rows.

In: ``eval/VARIANT.json``, ``eval/VARIANT.harness.json`` and ``metrics.jsonl``. Out: `Evaluation` by variant,
`TrainingRow` by step. `compare.py` puts the variants of several folders side by side.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator

from longlora.artifacts import RunFolder, read_json
from longlora.errors import RunFolderError

SCHEMA = 2
"""Version of ``eval/VARIANT.json`` that this code reads."""
VARIANTS = ("base", "rope_only", "trained")
LABELS = {"base": "base", "rope_only": "RoPE only", "trained": "trained"}
_AGAIN = "run `longlora eval` again"
_HARNESS_AGAIN = "run `longlora eval harness` again"
_Value = TypeVar("_Value")
_Model = TypeVar("_Model", bound=BaseModel)


class _Record(BaseModel):
    # Infinite and not-a-number values are refused: no table can show them honestly.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class PerplexityRow(_Record):
    """Loss of one document in windows of `context_length` tokens; losses are mean nats per scored token."""

    document: str
    context_length: int = Field(gt=0)
    stride: int
    protocol: str
    tokens: int = Field(gt=0)
    loss: float
    text_bytes: int | None = Field(default=None, gt=0, alias="bytes")
    """UTF-8 bytes of the scored tokens, where they are known."""
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


class LongPPLRow(_Record):
    """Loss in nats over the key tokens of one document, and over all of its tokens; None where it has none."""

    document: str
    context_length: int = Field(gt=0)
    short_context: int
    tokens: int
    key_tokens: int
    loss: float | None
    all_loss: float | None
    evaluator: str
    alpha: float
    beta: float


class RetrievalRow(_Record):
    """One answered prompt: length in tokens, depth from 0 to 1, score from 0 to 1, log-probability in nats."""

    task: str
    name: str
    length: int = Field(gt=0)
    depth: float | None = Field(default=None, ge=0, le=1)
    trial: int
    document: str | None = None
    seed: int | str | None = None
    score: float = Field(ge=0, le=1)
    correct: bool
    log_probability: float | None = None
    prompt_sha256: str | None = None


class HarnessRow(_Record):
    """One number of a standard benchmark, None where it has none; `truncated` counts the prompts that were cut."""

    task: str
    metric: str
    value: float | None
    stderr: float | None = Field(default=None, ge=0)
    samples: int | None = None
    num_fewshot: int | None = None
    version: str | int | float | None = None
    truncated: int | None = None
    truncation: str | None = None
    """Where prompts are cut that are too long."""
    higher_is_better: bool | None = None


class CostRow(_Record):
    """What one task cost: tokens that went through the model, and tokens taken over from a shared prefix."""

    task: str
    seconds: float
    prompts: int = 0
    tokens_read: int = 0
    tokens_reused: int = 0
    tokens_generated: int = 0


class _RulerSettings(_Record):
    model_config = ConfigDict(extra="allow")
    threshold: float = 85.6


class Settings(_Record):
    """The section ``eval`` of the recipe: what the report asks of it, and everything else as it is."""

    model_config = ConfigDict(extra="allow")
    variants: list[str] = Field(default_factory=list)
    ruler: _RulerSettings = Field(default_factory=_RulerSettings)


class Evaluation(_Record):
    """All rows measured for one variant, and on what. Lengths are in tokens."""

    schema_version: Literal[2] = Field(alias="schema")
    variant: Literal["base", "rope_only", "trained"]
    model: str
    tokenizer_hash: str
    original_context_length: int = Field(gt=0)
    context_length: int = Field(gt=0)
    covered_context_length: int = Field(gt=0)
    """What the model's RoPE covers as evaluated; numbers at longer lengths are marked."""
    rope_parameters: dict[str, Any] | None = None
    attention: str
    dtype: str
    device: str
    versions: dict[str, str | None]
    commit: str | None = None
    date: str
    seed: int
    bos: bool
    seconds: float
    peak_bytes: int | None = None
    settings: Settings = Field(default_factory=Settings)
    perplexity: list[PerplexityRow] = Field(default_factory=list)
    positions: list[PositionRow] = Field(default_factory=list)
    longppl: list[LongPPLRow] = Field(default_factory=list)
    retrieval: list[RetrievalRow] = Field(default_factory=list)
    harness: list[HarnessRow] = Field(default_factory=list)
    cost: list[CostRow] = Field(default_factory=list)

    @field_validator("rope_parameters", "settings", mode="before")
    @classmethod
    def _finite_json(cls, value: _Value) -> _Value:
        json.dumps(value, allow_nan=False)  # a ValueError here becomes part of the message about the damaged file
        return value

    def of_task(self, task: str) -> list[RetrievalRow]:
        """Answered prompts of one task, such as ``passkey``."""
        return [row for row in self.retrieval if row.task == task]


class _HarnessFile(_Record):
    harness: list[HarnessRow] = Field(validation_alias=AliasChoices("harness", "rows"))


@dataclass(frozen=True)
class TrainingRow:
    """One logged training step; `tokens` and `seconds` count from the start of training where they are logged."""

    step: int
    loss: float
    tokens: float | None = None
    seconds: float | None = None


def read_evaluations(run: RunFolder) -> dict[str, Evaluation]:
    """Every variant that was measured, in the order of `VARIANTS`, with its rows of standard benchmarks.

    Raises:
        RunFolderError: no variant was measured, a file is damaged or of another schema, or the files belong to
            different extensions.
    """
    found = {name: _read_evaluation(run, name) for name in VARIANTS if run.evaluation(name).exists()}
    if not found:
        raise RunFolderError(f"{run.root / 'eval'} holds no evaluation: run `longlora eval` first")
    contexts = {(item.original_context_length, item.context_length) for item in found.values()}
    if len(contexts) > 1:
        shown = ", ".join(f"{old} -> {new}" for old, new in sorted(contexts))
        raise RunFolderError(f"{run.root / 'eval'} mixes extensions ({shown}): {_AGAIN} for all variants")
    return found


def _read_evaluation(run: RunFolder, variant: str) -> Evaluation:
    path = run.evaluation(variant)
    value = read_json(path, _AGAIN)
    if isinstance(value, dict) and value.get("schema") != SCHEMA:
        raise RunFolderError(f"{path} has schema {value.get('schema')!r}, this version reads {SCHEMA}: {_AGAIN}")
    evaluation = _validated(Evaluation, value, path, _AGAIN)
    if evaluation.variant != variant:
        raise RunFolderError(f"{path} holds variant {evaluation.variant!r}: {_AGAIN}")
    harness = run.harness(variant)
    if not harness.exists():
        return evaluation
    value = read_json(harness, _HARNESS_AGAIN)
    rows = _validated(_HarnessFile, {"harness": value} if isinstance(value, list) else value, harness, _HARNESS_AGAIN)
    return evaluation.model_copy(update={"harness": [*evaluation.harness, *rows.harness]})


def _validated(kind: type[_Model], value: Any, path: Path, remedy: str) -> _Model:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise RunFolderError(f"{path} is damaged ({where}: {first['msg']}): {remedy}") from None


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
