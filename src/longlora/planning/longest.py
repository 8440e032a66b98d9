"""The longest context that a machine holds, with the levers of the recipe and with all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from longlora.config import Recipe, build_recipe
from longlora.errors import LongLoraError
from longlora.planning.machines import Machine
from longlora.planning.memory import peak_memory
from longlora.planning.outline import Outline, outline
from longlora.planning.rehearsal import Rehearsal, at_context, rehearse_line

# Settings that save memory, those that cost least time first; the last column: CUDA only.
_LEVERS: tuple[tuple[str, Any, bool], ...] = (
    ("train.loss_chunk_tokens", 256, False),
    ("train.micro_batch_size", 1, False),
    ("train.activation_checkpointing", True, False),
    ("train.activation_checkpointing_every", 1, False),
    ("train.mlp_tile_tokens", 2048, False),
    ("train.optimizer", "adamw_8bit", True),
    ("train.activation_offload", True, True),
    ("model.quantization", "nf4", True),
)
# Those of them that memory.py counts, so that a step need not be rehearsed with them.
_COUNTED = {"train.optimizer": "adamw", "train.activation_offload": False, "model.quantization": "none"}
_LONGEST = 2**24
_UNIT = 256


@dataclass(frozen=True)
class Fit:
    """Tokens that fit; 0 if not even the shortest context does."""

    as_it_is: int
    """With the settings of the recipe."""
    with_levers: int
    """With `levers` as well."""
    levers: dict[str, Any]
    """Settings to change: as few as the recipe's context takes, or all that help if it fits with none."""


def longest_context(recipe: Recipe, config: PreTrainedConfig, machine: Machine) -> Fit:
    """The longest context of `recipe` that fits on one device of `machine`, with one document in a row.

    Raises:
        ModelError: the model cannot be built or rehearsed without weights.
    """
    search = _Search(config, machine)
    as_it_is = best = search.longest(recipe)
    levers: dict[str, Any] = {}
    for key, value in _missing(recipe, machine):
        if best >= recipe.context.context_length:
            break
        try:
            tried = search.longest(with_settings(recipe, levers | {key: value}))
        except LongLoraError:  # a lever that this model does not have
            continue
        if tried > best:
            best, levers = tried, levers | {key: value}
    return Fit(as_it_is, best, levers)


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """`recipe` with dotted settings changed."""
    return build_recipe(recipe.model_dump(), [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def _missing(recipe: Recipe, machine: Machine) -> list[tuple[str, Any]]:
    """Levers that the recipe does not pull already."""
    values = recipe.model_dump()
    missing = []
    for key, value, needs_cuda in _LEVERS:
        if needs_cuda and not machine.cuda:
            continue
        section, name = key.split(".")
        now = values[section][name]
        pulled = now == value or (type(now) is type(value) is int and now < value)
        if not pulled and not (isinstance(now, str) and now not in ("none", "adamw")):
            missing.append((key, value))
    return missing


class _Search:
    """Longest contexts of one model under different levers; a rehearsal is kept for levers that do not change it."""

    def __init__(self, config: PreTrainedConfig, machine: Machine) -> None:
        self._config, self._machine = config, machine
        self._made: dict[tuple[str, int | None], Rehearsal] = {}

    def longest(self, recipe: Recipe) -> int:
        """Memory is convex in the context: found on the line through two rehearsals, closer ones if it is far below."""
        model = outline(self._config, recipe)
        rehearsal = self._rehearsal(recipe, None)
        found = self._crossing(recipe, model, rehearsal)
        if _UNIT <= found < rehearsal.contexts[0]:
            found = self._crossing(recipe, model, self._rehearsal(recipe, max(_UNIT, found // 2)))
        return found

    def _rehearsal(self, recipe: Recipe, anchor: int | None) -> Rehearsal:
        here = with_settings(recipe, _COUNTED)
        key = (here.model_dump_json(), anchor)
        if key not in self._made:
            self._made[key] = rehearse_line(self._config, here, anchor)
        return self._made[key]

    def _crossing(self, recipe: Recipe, model: Outline, rehearsal: Rehearsal) -> int:
        """The largest multiple of `_UNIT` that fits."""
        fits, too_long = 0, _LONGEST // _UNIT + 1
        while too_long - fits > 1:
            units = (fits + too_long) // 2
            there = at_context(recipe, units * _UNIT)
            if peak_memory(self._config, there, model, self._machine, rehearsal).peak <= self._machine.memory_bytes:
                fits = units
            else:
                too_long = units
        return fits * _UNIT
