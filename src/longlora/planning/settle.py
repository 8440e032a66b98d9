"""Before a run loads weights: does it fit into this machine's memory, and with which settings?

In: a recipe and the model's config. Out: the recipe to train, with the levers that `memory: auto` picked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from longlora.config import Recipe
from longlora.errors import LongLoraError, PlanError
from longlora.planning.levers import levers, settings_of_levers, with_levers, with_settings, written
from longlora.planning.longest import cheapest_levers, does_not_fit, longest_context
from longlora.planning.machines import Machine
from longlora.planning.memory import Memory, fits, peak_memory
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
    if not fits(memory, machine):
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
    """Levers from none on, as many as it takes."""
    bare = _bare(recipe)
    pulled = cheapest_levers(bare, machine, lambda tried: fits(_peak(tried, config, machine), machine))
    settled = with_levers(bare, pulled)
    memory = _peak(settled, config, machine)
    if not fits(memory, machine):
        raise PlanError(_refusal(settled, config, machine, memory))
    chosen = written(settings_of_levers(pulled)) or "no lever"
    return Settled(settled, memory, f"memory=auto picked {chosen}; {_summary(memory, machine)}")


def _bare(recipe: Recipe) -> Recipe:
    """`recipe` without the lever that is on by default."""
    none: dict[str, Any] = {"train.activation_checkpointing": False, "train.activation_checkpointing_every": 1}
    return with_settings(recipe, none | {"memory": "check", "train.activation_offload": False})


def _refusal(recipe: Recipe, config: PreTrainedConfig, machine: Machine, memory: Memory) -> str:
    fit = longest_context(recipe, config, machine)
    line = does_not_fit(
        recipe.context.context_length, memory, machine.name, machine.memory_bytes, machine.host_bytes, fit
    )
    return f"{line}; memory=unchecked trains without this plan"


def _summary(memory: Memory, machine: Machine) -> str:
    return f"planned peak memory {memory.peak / 1e9:.2f} GB of {machine.memory_bytes / 1e9:.1f} GB ({machine.name})"


def _peak(recipe: Recipe, config: PreTrainedConfig, machine: Machine) -> Memory:
    return peak_memory(config, recipe, outline(config, recipe), machine)
