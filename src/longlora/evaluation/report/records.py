"""What the measuring half wrote into a run folder, read back as validated, frozen rows.

In: ``eval/VARIANT.json`` and ``eval/VARIANT.harness.json``. Out: `Measured`, with an `Evaluation` by variant.
`compare.py` puts the variants of several folders side by side, `training_log.py` reads how they were trained.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from longlora.artifacts import RunFolder, read_json
from longlora.errors import RunFolderError

SCHEMA = 2
"""Version of ``eval/VARIANT.json`` that this code reads."""
VARIANTS = ("base", "rope_only", "trained")
LABELS = {"base": "base", "rope_only": "RoPE only", "trained": "trained"}
_AGAIN = "run `longlora eval` again"
_HARNESS_AGAIN = "run `longlora eval harness` again"
_SAME_MODEL = ("weights", "rope_parameters", "dtype")
"""Facts in which standard benchmarks agree with the evaluation that they are shown with."""
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


class _HarnessSettings(_Record):
    max_length: int | None = None
    """Tokens of prompt and answer at most."""
    chat_template: bool = False
    seed: int | None = None
    lm_eval: str | None = None


class Benchmarks(_Record):
    """Standard benchmarks of one model, and how they were asked."""

    weights: str
    rope_parameters: dict[str, Any] | None = None
    dtype: str
    settings: _HarnessSettings = Field(default_factory=_HarnessSettings)
    rows: list[HarnessRow] = Field(default_factory=list)

    def of_same_model(self, item: Evaluation) -> bool:
        """Whether this is the very model that `item` is the evaluation of."""
        return all(getattr(self, name) == getattr(item, name) for name in _SAME_MODEL)


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
    weights: str
    """Fingerprint of the weights as measured."""
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
    benchmarks: Benchmarks | None = None
    """From a file of their own: whatever stands here in ``VARIANT.json`` is not read."""
    cost: list[CostRow] = Field(default_factory=list)

    @field_validator("rope_parameters", "settings", mode="before")
    @classmethod
    def _finite_json(cls, value: _Value) -> _Value:
        json.dumps(value, allow_nan=False)  # a ValueError here becomes part of the message about the damaged file
        return value

    def of_task(self, task: str) -> list[RetrievalRow]:
        """Answered prompts of one task, such as ``passkey``."""
        return [row for row in self.retrieval if row.task == task]


@dataclass(frozen=True)
class Measured:
    """What one run folder holds: every variant that was measured, in the order of `VARIANTS`.

    `left_out` says in words which rows are not among them, and why.
    """

    evaluations: dict[str, Evaluation]
    left_out: tuple[str, ...]


def read_evaluations(run: RunFolder) -> Measured:
    """Every variant that was measured, with its rows of standard benchmarks where they are of the same model.

    Raises:
        RunFolderError: no variant was measured, a file is damaged or of another schema, or the files belong to
            different models or extensions.
    """
    found = {name: _read_evaluation(run, name) for name in VARIANTS if run.evaluation(name).exists()}
    if not found:
        raise RunFolderError(f"{run.root / 'eval'} holds no evaluation: run `longlora eval` first")
    _require_one(run, "extensions", {f"{e.original_context_length} -> {e.context_length}" for e in found.values()})
    _require_one(run, "models", {item.model for item in found.values()})
    _require_one(run, "tokenizers", {item.tokenizer_hash[:12] for item in found.values()})
    left_out = []
    for variant in VARIANTS:
        path = run.harness(variant)
        if not path.exists():
            continue
        value = read_json(path, _HARNESS_AGAIN)
        benchmarks = _validated(Benchmarks, value, path, _HARNESS_AGAIN)
        label = LABELS[variant]
        if variant not in found:
            left_out.append(f"eval/{path.name} is left out: {label} has no eval/{variant}.json")
        elif not benchmarks.of_same_model(found[variant]):
            left_out.append(
                f"eval/{path.name} is left out: it was measured on other weights, RoPE or dtype than "
                f"eval/{variant}.json; {_HARNESS_AGAIN}"
            )
        else:
            found[variant] = found[variant].model_copy(update={"benchmarks": benchmarks})
            if empty := sum(row.value is None for row in benchmarks.rows):
                left_out.append(f"Standard benchmarks of {label}: {empty} without a finite value are left out")
    return Measured(found, tuple(left_out))


def _require_one(run: RunFolder, what: str, found: set[str]) -> None:
    if len(found) > 1:
        shown = ", ".join(sorted(found))
        raise RunFolderError(f"{run.root / 'eval'} mixes {what} ({shown}): {_AGAIN} for all variants")


def _read_evaluation(run: RunFolder, variant: str) -> Evaluation:
    path = run.evaluation(variant)
    value = read_json(path, _AGAIN)
    if isinstance(value, dict):
        if value.get("schema") != SCHEMA:
            raise RunFolderError(f"{path} has schema {value.get('schema')!r}, this version reads {SCHEMA}: {_AGAIN}")
        value.pop("benchmarks", None)
    evaluation = _validated(Evaluation, value, path, _AGAIN)
    if evaluation.variant != variant:
        raise RunFolderError(f"{path} holds variant {evaluation.variant!r}: {_AGAIN}")
    return evaluation


def _validated(kind: type[_Model], value: Any, path: Path, remedy: str) -> _Model:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise RunFolderError(f"{path} is damaged ({where}: {first['msg']}): {remedy}") from None
