"""The devices of a run as a mesh of data x sequence, what they divide among themselves, and the links between them.

In: a recipe and a machine. Out: a `Mesh`, which the memory, the times and the traffic of a run are planned with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longlora.attention.halo_plan import stretch_length
from longlora.attention.pattern import S2Pattern
from longlora.config import Recipe
from longlora.errors import PlanError
from longlora.planning.machines import Machine

Shard = Literal["none", "fsdp2", "zero2", "zero3"]


@dataclass(frozen=True)
class Mesh:
    """How many devices share a row, and how many have rows of their own."""

    data: int
    sequence: int
    shard: Shard
    """As in the recipe; ``none`` where there is one device, which has nobody to share with."""
    per_node: int
    """Devices of one machine, which are joined by faster links."""

    @property
    def devices(self) -> int:
        return self.data * self.sequence

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.per_node)

    @property
    def weight_shares(self) -> int:
        """Into how many parts weights are divided."""
        return self.devices if self.shard in ("fsdp2", "zero3") else 1

    @property
    def state_shares(self) -> int:
        """Into how many parts gradients and optimizer states are divided."""
        return 1 if self.shard == "none" else self.devices


def mesh_of(recipe: Recipe, machine: Machine) -> Mesh:
    """The mesh of `recipe` on all devices of `machine`.

    The machine that plans may have been asked about as one process: then as many are planned as share a row.

    Raises:
        PlanError: `parallel.sequence` does not divide the devices.
    """
    sequence = recipe.parallel.sequence
    devices = sequence if machine.present and machine.count == 1 else machine.count
    if devices % sequence:
        fitting = [number for number in range(1, devices + 1) if devices % number == 0]
        raise PlanError(
            f"parallel.sequence={sequence} does not divide the {devices} device{'s' if devices > 1 else ''} of the "
            f"plan: set it to one of {', '.join(map(str, fitting))}, or plan for a multiple of {sequence} with --gpus"
        )
    shard: Shard = recipe.parallel.shard if devices > 1 else "none"
    return Mesh(devices // sequence, sequence, shard, machine.links.devices)


def on_one_device(recipe: Recipe) -> Recipe:
    """`recipe` with the stretch of a row that one device holds as its context, in the same groups; nothing checked."""
    sequence = recipe.parallel.sequence
    if sequence == 1:
        return recipe
    context = recipe.context.model_copy(
        update={"context_length": -(-recipe.context.context_length // sequence), "rope_factor": None}
    )
    ratio = recipe.attention.group_size_ratio
    attention = recipe.attention.model_copy(
        update={"group_size_ratio": None if ratio is None else min(1.0, ratio * sequence)}
    )
    parallel = recipe.parallel.model_copy(update={"sequence": 1})
    return recipe.model_copy(update={"context": context, "attention": attention, "parallel": parallel})


def require_whole_groups(recipe: Recipe) -> None:
    """Raise `ModelError` where a stretch of sparse attention would be shorter than a group."""
    if recipe.attention.pattern == "s2":
        tokens = recipe.context.context_length
        pattern = S2Pattern(recipe.attention.resolve_group_size(tokens), recipe.attention.sink_tokens)
        stretch_length(tokens, recipe.parallel.sequence, pattern)
