"""The recipe as a whole, and reading and writing it."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from longlora.config.evaluation import EvalConfig
from longlora.config.plain_yaml import MAX_CHARACTERS, read_yaml
from longlora.config.section import Section
from longlora.config.sections import (
    AdapterConfig,
    AttentionConfig,
    ContextConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
    even_above,
)
from longlora.errors import RecipeError, one_line
from longlora.hints import explain


class Recipe(Section):
    """A whole run. `run_dir` is where everything it makes is written."""

    run_dir: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]
    """Folder of the run; see artifacts.py for what is in it."""
    memory: Literal["check", "auto", "unchecked"] = "check"
    """What `longlora train` does before it loads weights: ``check`` refuses a run that does not fit into memory;
    ``auto`` picks the settings of `train` and `model` that save memory, only as many as it takes; ``unchecked`` does
    not plan."""
    model: ModelConfig
    context: ContextConfig
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)

    @model_validator(mode="after")
    def _ratio_leaves_a_group(self) -> Recipe:
        attention, length = self.attention, self.context.context_length
        ratio, group = attention.group_size_ratio, attention.resolve_group_size(length)
        least = even_above(attention.sink_tokens)
        if ratio is None or (group >= least and length * ratio >= 2):
            return self
        enough = math.ceil(1000 * least / length) / 1000
        raise ValueError(
            f"attention.group_size_ratio={ratio:g} of context.context_length={length} is a group of "
            f"{int(length * ratio) // 2 * 2} tokens, and one must hold more than "
            f"attention.sink_tokens={attention.sink_tokens}: "
            + (f"raise group_size_ratio to at least {enough:g}" if enough <= 1 else "lower sink_tokens")
        )

    @model_validator(mode="after")
    def _quantized_weights_stay_frozen(self) -> Recipe:
        quantization = self.model.quantization
        if quantization != "none" and self.adapter.method == "full":
            raise ValueError(
                f"model.quantization={quantization} keeps weights in 4 bits, which cannot be trained, and "
                "adapter.method=full trains them all: set adapter.method=lora (QLoRA) or model.quantization=none"
            )
        return self

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir)


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from YAML and apply dotted overrides such as ``train.steps=20``.

    Raises:
        RecipeError: the file is missing or not YAML, or a key or value is not understood.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist: give the path of a YAML file, see recipes/") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path with a null character
        raise RecipeError(f"recipe {path} cannot be read: {error}") from None
    try:
        values = read_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} holds {type(values).__name__}, not a mapping of settings")
    return build_recipe(values, overrides, source=str(path))


def build_recipe(values: dict[str, Any], overrides: Iterable[str] = (), source: str = "recipe") -> Recipe:
    """Validate nested `values`, which stay as they are, after applying dotted `overrides`.

    Raises:
        RecipeError: a key or value is not understood; the message names it and a remedy.
    """
    values = copy.deepcopy(values)
    for override in overrides:
        _apply_override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(explain(error, source, Recipe)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` of it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r} is not of the form section.key=value, for example train.steps=20")
    *sections, leaf = parts = key.split(".")
    try:
        value = read_yaml(raw)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r:.200}: the value is not valid YAML; quote it") from None
    if _is_text(parts):
        # A revision may have digits alone and a folder be called 2024-01-01: they are what was typed.
        value = value if value is None or isinstance(value, str) else raw.strip()
    elif isinstance(value, str):
        # YAML 1.1 reads 3e-4 as a string; numbers are what a person means here.
        with contextlib.suppress(ValueError):
            value = float(value)
    node = values
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise RecipeError(f"override {override!r}: {section} is a value, not a section")
        node = child
    node[leaf] = value


def _is_text(parts: Sequence[str]) -> bool:
    """Whether the setting of this dotted name is text, or text or null."""
    annotation: Any = Recipe
    for part in parts:
        field = getattr(annotation, "model_fields", {}).get(part)
        annotation = field.annotation if field else None
    return annotation is str or set(get_args(annotation)) == {str, NoneType}
