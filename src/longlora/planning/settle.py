"""Before a run loads weights: does it fit into this machine's memory, and with which settings?

In: a recipe and the model's config. Out: the recipe to train, with the levers that `memory: auto` picked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from longlora.config import Recipe
from longlora.errors import LongLoraError, PlanError
from longlora.planning.levers import Lever, levers, with_settings, written
from longlora.planning.longest import does_not_fit, longest_context
from longlora.planning.machines import Machine
from longlora.planning.memory import Memory, peak_memory
from longlora.planning.outline import outline


@dataclass(frozen=True)
class Settled:
    """The recipe to train, and what it will take; `memory` is None where nothing was planned."""

    recipe: Recipe
    memory: Memory | None
    line: str
    """For a person; empty where there is nothing to say."""


def settle_memory(recipe: Recipe, config: PreTrainedConfig, machine: Machine) -> Settled:
    """Plan the memory of `recipe` as its field ``memory`` says; once levers were picked it says ``check``.

    A model that cannot be planned is trained without a plan, and `line` says so.

    Raises:
        PlanError: the run does not fit into the memory of `machine`.
    """
    if recipe.memory == "unchecked":
        return Settled(recipe, None, "")
    try:
        if recipe.memory == "auto":
            return _cheapest(recipe, config, machine)
        memory = _peak(recipe, config, machine)
    except PlanError:
        raise
    except LongLoraError as error:
        return Settled(recipe, None, f"memory is not planned: {error}")
    if memory.peak > machine.memory_bytes:
        raise PlanError(_refusal(recipe, config, machine, memory))
    return Settled(recipe, memory, _summary(memory, machine))


def adopt_levers(recipe: Recipe, saved: Recipe) -> Recipe:
    """`recipe` with the levers that an earlier ``memory: auto`` picked for `saved`, which a resumed run must keep."""
    if recipe.memory != "auto":
        return recipe
    keys = {key for lever in levers(_bare(recipe), cuda=True) if lever.automatic for key in lever.settings}
    picked = {key: getattr(getattr(saved, section), name) for key in sorted(keys) for section, name in [key.split(".")]}
    return with_settings(recipe, picked | {"memory": "check"})


def _cheapest(recipe: Recipe, config: PreTrainedConfig, machine: Machine) -> Settled:
    """The first levers that suffice, from none on, without those that later ones made needless."""
    bare = _bare(recipe)
    pulled: list[Lever] = []
    memory = _peak(bare, config, machine)
    for lever in (lever for lever in levers(bare, cuda=machine.cuda) if lever.automatic):
        if memory.peak <= machine.memory_bytes:
            break
        try:
            memory = _peak(_with(bare, [*pulled, lever]), config, machine)
        except LongLoraError:  # a lever that this model does not have
            continue
        pulled.append(lever)
    if memory.peak > machine.memory_bytes:
        raise PlanError(_refusal(with_settings(recipe, {"memory": "check"}), config, machine, memory))
    for lever in pulled[:-1]:
        fewer = [other for other in pulled if other is not lever]
        without = _peak(_with(bare, fewer), config, machine)
        if without.peak <= machine.memory_bytes:
            pulled, memory = fewer, without
    settled = _with(bare, pulled)
    chosen = _changed(bare, settled)
    return Settled(settled, memory, f"memory=auto picked {written(chosen) or 'no lever'}; {_summary(memory, machine)}")


def _bare(recipe: Recipe) -> Recipe:
    """`recipe` without the lever that is on by default."""
    none: dict[str, Any] = {"train.activation_checkpointing": False, "train.activation_checkpointing_every": 1}
    return with_settings(recipe, none | {"memory": "check", "train.activation_offload": False})


def _with(recipe: Recipe, pulled: list[Lever]) -> Recipe:
    settings: dict[str, Any] = {}
    for lever in pulled:
        settings |= lever.settings
    return with_settings(recipe, settings)


def _changed(before: Recipe, after: Recipe) -> dict[str, Any]:
    """Dotted settings of `train` and `model` in which two recipes differ."""
    return {
        f"{section}.{name}": value
        for section in ("train", "model")
        for name, value in getattr(after, section).model_dump().items()
        if value != getattr(getattr(before, section), name)
    }


def _refusal(recipe: Recipe, config: PreTrainedConfig, machine: Machine, memory: Memory) -> str:
    fit = longest_context(recipe, config, machine)
    line = does_not_fit(recipe.context.context_length, memory, machine.name, machine.memory_bytes, fit)
    return f"{line}; memory=unchecked trains without this plan"


def _summary(memory: Memory, machine: Machine) -> str:
    return f"planned peak memory {memory.peak / 1e9:.2f} GB of {machine.memory_bytes / 1e9:.1f} GB ({machine.name})"


def _peak(recipe: Recipe, config: PreTrainedConfig, machine: Machine) -> Memory:
    return peak_memory(config, recipe, outline(config, recipe), machine)
