"""The longest context that a machine holds, with the levers of the recipe and with all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from longlora.config import Recipe
from longlora.errors import LongLoraError
from longlora.model.build import device_for_run
from longlora.model.levers import check_levers
from longlora.planning.levers import (
    Lever,
    across_devices,
    levers,
    settings_of_levers,
    with_levers,
    with_settings,
    written,
)
from longlora.planning.machines import Machine
from longlora.planning.memory import Memory, fits, peak_memory
from longlora.planning.mesh import on_one_device
from longlora.planning.outline import Outline, outline
from longlora.planning.rehearsal import Rehearsal, at_context, rehearse_line

# Levers that memory.py counts, so that a step need not be rehearsed with them.
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
    """Settings to change: as few as the recipe's context takes; all that help if it fits with none or not at all."""
    across: int = 0
    """With `parallel` as well; 0 where that was not looked for: levers are enough, or there is one device."""
    parallel: dict[str, Any] = field(default_factory=dict)
    """Settings of the section `parallel`."""


def longest_context(recipe: Recipe, config: PreTrainedConfig, machine: Machine) -> Fit:
    """The longest context of `recipe` that fits on `machine`, with one document in a row, cut as the recipe says.

    Raises:
        ModelError: the model cannot be built or rehearsed without weights.
    """
    search = _Search(config, machine)
    as_it_is = search.longest(recipe)
    wanted = recipe.context.context_length
    if as_it_is >= wanted:
        wanted = _LONGEST  # more than any machine holds: every lever
    pulled = cheapest_levers(recipe, machine, lambda tried: search.longest(tried) >= wanted)
    longest = search.longest(with_levers(recipe, pulled))
    if longest < wanted:  # all levers: name those that do something
        pulled = [
            lever
            for lever in pulled
            if search.longest(with_levers(recipe, [other for other in pulled if other is not lever])) < longest
        ]
    settings = settings_of_levers(pulled)
    if longest >= wanted or as_it_is >= recipe.context.context_length:
        return Fit(as_it_is, longest, settings)
    across, parallel = _across(with_levers(recipe, pulled), machine, search, longest)
    return Fit(as_it_is, longest, settings, across, parallel)


def _across(recipe: Recipe, machine: Machine, search: _Search, before: int) -> tuple[int, dict[str, Any]]:
    """What dividing weights or rows among the devices adds: the first settings with which `recipe` fits, or the best.

    Args:
        before: the longest context without them.

    Returns:
        Tokens and settings; 0 and none where nothing helps.
    """
    best: tuple[int, dict[str, Any]] = (0, {})
    for settings in across_devices(recipe, machine.count):
        if settings.get("parallel.shard") and recipe.train.optimizer != "adamw":  # states in 8 bits are not divided
            settings = settings | {"train.optimizer": "adamw"}
        try:
            tokens = search.longest(with_settings(recipe, settings))
        except LongLoraError:  # more ranks than heads
            continue
        if tokens > max(before, best[0]):
            best = (tokens, settings)
        if tokens >= recipe.context.context_length:
            break
    return best


def cheapest_levers(recipe: Recipe, machine: Machine, enough: Callable[[Recipe], bool]) -> list[Lever]:
    """The first levers of the list with which `recipe` is `enough`, without those that later ones made needless.

    All that the model and the machine have, if it never is.
    """
    pulled: list[Lever] = []
    reached = enough(recipe)
    for lever in (lever for lever in levers(recipe, cuda=machine.cuda) if lever.automatic):
        if reached:
            break
        tried = with_levers(recipe, [*pulled, lever])
        try:
            if machine.present:
                check_levers(tried, device_for_run())
            reached = enough(tried)
        except LongLoraError:  # a lever that this model or machine does not have
            continue
        pulled.append(lever)
    for lever in pulled[:-1] if reached else []:
        fewer = [other for other in pulled if other is not lever]
        with contextlib.suppress(LongLoraError):  # a later lever stands on this one
            if enough(with_levers(recipe, fewer)):
                pulled = fewer
    return pulled


def does_not_fit(
    context_length: int, memory: Memory, machine: str, available: int, host_bytes: int, fit: Fit | None
) -> str:
    """One line for a context that needs more than the `available` bytes of a device, or more than the `host_bytes` of
    main memory for what is kept there: by how much, the largest part, what to do."""
    if memory.peak <= available:
        return (
            f"context.context_length={context_length} keeps {memory.offloaded / 1e9:.1f} GB of activations in main "
            f"memory, and {host_bytes / 1e9:.1f} GB are there for a process: free main memory, or set "
            "train.activation_offload=false"
        )
    problem = (
        f"context.context_length={context_length} needs {memory.peak / 1e9:.1f} GB and {machine} has "
        f"{available / 1e9:.1f} GB (most: {memory.largest}, {max(memory.parts.values()) / 1e9:.1f} GB)"
    )
    return f"{problem}: {_remedy(context_length, fit)}"


def _remedy(context_length: int, fit: Fit | None) -> str:
    if fit is not None and fit.across >= context_length:
        changes = written(fit.levers | fit.parallel)
        return f"set {changes}, with which {fit.across} tokens fit (as it is: {fit.as_it_is})"
    if fit is not None and fit.across:
        changes = written(fit.levers | fit.parallel)
        return f"at most {fit.as_it_is} tokens fit as it is, {fit.across} with {changes}: take more devices"
    if fit is None or not fit.with_levers:
        return "not even the shortest context fits: take a machine with more memory or a smaller model"
    if fit.with_levers >= context_length:
        return f"set {written(fit.levers)}, with which {fit.with_levers} tokens fit (as it is: {fit.as_it_is})"
    if not fit.levers:
        return f"at most {fit.as_it_is} tokens fit and no setting that is left helps: take more memory"
    return f"at most {fit.as_it_is} tokens fit as it is, {fit.with_levers} with {written(fit.levers)}"


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
        stretch = found // recipe.parallel.sequence
        if _UNIT <= stretch < rehearsal.contexts[0]:
            found = self._crossing(recipe, model, self._rehearsal(recipe, max(_UNIT, stretch // 2)))
        return found

    def _rehearsal(self, recipe: Recipe, anchor: int | None) -> Rehearsal:
        here = with_settings(on_one_device(recipe), _COUNTED)
        if here.attention.group_size_ratio is None:  # then its context does not matter, nor how it is cut
            here = at_context(here, _LONGEST)
        key = (here.model_dump_json(), anchor)
        if key not in self._made:
            self._made[key] = rehearse_line(self._config, here, anchor)
        return self._made[key]

    def _crossing(self, recipe: Recipe, model: Outline, rehearsal: Rehearsal) -> int:
        """The largest context that fits, in multiples of `_UNIT` tokens on each device."""
        unit = _UNIT * recipe.parallel.sequence
        longest, too_long = 0, _LONGEST // _UNIT + 1
        while too_long - longest > 1:
            units = (longest + too_long) // 2
            there = at_context(recipe, units * unit)
            if fits(peak_memory(self._config, there, model, self._machine, rehearsal), self._machine):
                longest = units
            else:
                too_long = units
        return longest * unit
