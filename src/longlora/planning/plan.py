"""Everything that can be said of a run before it: `plan_run`; and the longest context that fits: `longest_context`.

In: a recipe, a transformers config, a `Machine`. Out: a frozen `Plan`, which goes to JSON and back.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig

from longlora.config import Recipe, build_recipe
from longlora.data.reach import DocumentReach, documents_reaching
from longlora.errors import PlanError
from longlora.model.attention import full_attention_steps
from longlora.model.rope import rescale_for
from longlora.planning.communication import Transfer, transfers, waited_for
from longlora.planning.flops import Flops, StepFlops, forward_flops, step_flops
from longlora.planning.longest import Fit, does_not_fit, longest_context
from longlora.planning.machines import Machine
from longlora.planning.memory import Memory, fits, optimizer_bytes, peak_memory
from longlora.planning.mesh import Mesh, mesh_of, require_whole_groups
from longlora.planning.outline import Outline, outline
from longlora.planning.sharding import width_of

# Bytes that clipping and AdamW read and write for each trained parameter.
_OPTIMIZER_TRAFFIC = 40


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by part."""

    layers: float
    attention_scores: float
    head_and_loss: float
    optimizer: float
    communication: float = 0.0
    """Messages that are waited for while nothing is computed."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Disk:
    """Bytes that the run folder will hold."""

    checkpoints: int
    """Trained weights and optimizer states, for as many checkpoints as are kept and the one being written."""
    adapter: int
    """0 with full fine-tuning, which makes none."""
    merged: int


@dataclass(frozen=True)
class Plan:
    """What a run takes. FLOPs and times are those of one device; bytes as well."""

    model: str
    machine: str
    devices: int
    mesh: Mesh
    """The devices as data x sequence, and what is divided among them."""
    rates: str
    """Where the times come from."""
    original_context_length: int
    context_length: int
    rope_before: dict[str, Any]
    rope_after: dict[str, Any]
    parameters: int
    trained: int
    steps: int
    tokens_per_step: int
    """On all devices."""
    forward: Flops
    """One sequence, on all devices that share it."""
    step: StepFlops
    memory: Memory
    memory_available: int
    host_memory: int
    """Main memory beside a GPU's, as far as it is known."""
    host_needed: int
    """Main memory of a node while its processes read the whole model, each for itself; 0 where there is no other."""
    time: StepTime
    messages: tuple[Transfer, ...]
    """Of a step, to and from one device; with sparse attention, where only the last steps are full."""
    hours: float
    cost: float | None
    """Hours times devices times the price of a device's hour."""
    disk: Disk
    documents: DocumentReach | None
    documents_named: bool
    """Whether the recipe names training texts; `documents` is None for those that cannot be counted unprepared."""
    fit: Fit | None
    """The longest context that fits; there when it was asked for, and when this one does not fit."""

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.memory_available and self.memory.offloaded <= self.host_memory

    def to_json(self) -> str:
        """All fields, and the sums that a reader would have to make himself."""
        sums = {
            "memory_peak": self.memory.peak,
            "step_seconds": self.time.total,
            "step_flops": self.step.total,
            "forward_flops": self.forward.total,
            "bytes_sent": sum(each.bytes for each in self.messages),
            "fits": self.fits,
        }
        return json.dumps(asdict(self) | {"sums": sums}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        del values["sums"]
        step = values["step"]
        return cls(
            **values
            | {
                "forward": Flops(**values["forward"]),
                "step": StepFlops(**{name: Flops(**part) for name, part in step.items()}),
                "memory": Memory(**values["memory"]),
                "mesh": Mesh(**values["mesh"]),
                "time": StepTime(**values["time"]),
                "messages": tuple(Transfer(**each) for each in values["messages"]),
                "disk": Disk(**values["disk"]),
                "documents": values["documents"] and DocumentReach(**values["documents"]),
                "fit": values["fit"] and Fit(**values["fit"]),
            }
        )


def plan_run(
    recipe: Recipe,
    config: PreTrainedConfig,
    machine: Machine,
    *,
    price_per_hour: float | None = None,
    fit: bool = False,
) -> Plan:
    """Plan `recipe` on `machine` from the model's `config` alone; no weights are read.

    Args:
        price_per_hour: of one device, in any currency.
        fit: look for the longest context that fits, also when this one does.

    Raises:
        ModelError: the model cannot be built from its config, the context is not longer than its own, or a device's
            stretch of it is shorter than a group.
        PlanError: `parallel.sequence` does not divide the devices.
    """
    mesh = mesh_of(recipe, machine)
    require_whole_groups(recipe)
    config, change = rescale_for(recipe, config)  # which layers have windows depends on the context that it names
    model = outline(config, recipe)
    context, train = recipe.context.context_length, recipe.train
    sequences = train.micro_batch_size * train.grad_accum_steps
    flops = device_flops(model, recipe)
    messages = transfers(recipe, model, mesh, machine)
    memory = peak_memory(config, recipe, model, machine)
    hours = _hours(recipe, config, model, machine)
    wanted = fit or not fits(memory, machine)
    return Plan(
        model=recipe.model.name_or_path,
        machine=machine.name,
        devices=mesh.devices,
        mesh=mesh,
        rates=machine.basis,
        original_context_length=change.original_context_length,
        context_length=context,
        rope_before=change.before,
        rope_after=change.after,
        parameters=model.total,
        trained=model.trained,
        steps=train.steps,
        tokens_per_step=context * sequences * mesh.data,
        forward=forward_flops(model, context),
        step=flops,
        memory=memory,
        memory_available=machine.memory_bytes,
        host_memory=machine.host_bytes,
        host_needed=_read_bytes(recipe, model) * machine.processes if machine.cuda else 0,
        time=step_time(flops, model, machine, mesh, messages),
        messages=messages,
        hours=hours,
        cost=None if price_per_hour is None else hours * mesh.devices * price_per_hour,
        disk=_disk(recipe, model),
        documents=documents_reaching(recipe),
        documents_named=bool(recipe.data.train),
        fit=longest_context(recipe, config, machine) if wanted else None,
    )


def device_flops(model: Outline, recipe: Recipe) -> StepFlops:
    """Operations of a step on one device: of a row that is cut, its equal part.

    Halos' queries that are computed twice, at most a group for each layer, are left out.
    """
    step = step_flops(model, recipe.train, recipe.context.context_length)
    return step.times(1 / recipe.parallel.sequence)


def step_time(
    flops: StepFlops,
    model: Outline,
    machine: Machine,
    mesh: Mesh | None = None,
    messages: tuple[Transfer, ...] = (),
) -> StepTime:
    """Seconds of a step at the rates of `machine`."""
    parts = flops.by_part
    layers = (parts.attention_projections + parts.mlp + parts.lora) / machine.linear_flops
    scores = parts.attention_scores / machine.score_flops
    return StepTime(
        layers=layers,
        attention_scores=scores,
        head_and_loss=parts.output_head / machine.head_flops,
        optimizer=_OPTIMIZER_TRAFFIC * model.trained / machine.bandwidth / (mesh.state_shares if mesh else 1),
        communication=waited_for(messages, layers + scores),
    )


def require_fits(plan: Plan) -> None:
    """Raise `PlanError`, with the longest context that fits and the levers it takes, unless the plan fits."""
    if not plan.fits:
        line = does_not_fit(
            plan.context_length, plan.memory, plan.machine, plan.memory_available, plan.host_memory, plan.fit
        )
        raise PlanError(line)


def _hours(recipe: Recipe, config: PreTrainedConfig, model: Outline, machine: Machine) -> float:
    """Hours of all steps, the last part of them with full attention where the recipe says so."""
    train, mesh = recipe.train, mesh_of(recipe, machine)

    def seconds(each: Outline) -> float:
        return step_time(device_flops(each, recipe), each, machine, mesh, transfers(recipe, each, mesh, machine)).total

    full_steps = full_attention_steps(recipe)
    if recipe.attention.pattern == "full" or not full_steps:
        return train.steps * seconds(model) / 3600
    dense = build_recipe(recipe.model_dump(), ["attention.pattern=full"])
    sparse_seconds = (train.steps - full_steps) * seconds(model)
    return (sparse_seconds + full_steps * seconds(outline(config, dense))) / 3600


def _read_bytes(recipe: Recipe, model: Outline) -> int:
    """Of the model as it is read; for full fine-tuning in float32."""
    return model.total * (4 if recipe.adapter.method == "full" else width_of(recipe))


def run_disk(recipe: Recipe, config: PreTrainedConfig) -> Disk:
    """What the run folder will hold.

    Raises:
        ModelError: the model cannot be built from its config.
    """
    return _disk(recipe, outline(config, recipe))


def _disk(recipe: Recipe, model: Outline) -> Disk:
    train = recipe.train
    written = min(train.save_total_limit + 1, max(1, train.steps // train.save_steps))
    width = 2 if recipe.model.dtype == "bfloat16" else 4
    checkpoint = 4 * model.trained + optimizer_bytes(recipe, model)
    adapter = 0 if recipe.adapter.method == "full" else 4 * model.trained
    return Disk(checkpoints=checkpoint * written, adapter=adapter, merged=width * model.total)
