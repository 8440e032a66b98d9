"""Peak memory of a training run by part, in bytes, on one device.

Tensors come from the rehearsal of a step (`rehearsal.py`); weights, gradients and optimizer states are counted exactly
from the model without weights; what a process and its allocator need beside tensors was measured
(`benchmarks/bench_plan.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import get_args

from transformers import PreTrainedConfig

from longlora.config import Recipe
from longlora.planning.ledger import Bytes, Kind, Phase
from longlora.planning.machines import Machine
from longlora.planning.mesh import mesh_of, on_one_device
from longlora.planning.outline import Outline, experts_of
from longlora.planning.rehearsal import Rehearsal, rehearse
from longlora.planning.sharding import NF4_BYTES, divide, library_bytes, master_bytes, message_bytes, width_of

_ADAM_STATES = 8  # two float32 numbers for each trained parameter
_ADAM_8BIT_STATES = 2
# A product that oneDNN compiled for one number of rows, measured with what it splits off the heap (docs/log.md).
_KERNEL_BYTES = 0.7e6
_MOST_KERNELS = 1024  # that oneDNN keeps
_EXPERT_PRODUCTS = 4  # kinds of them: two in the forward and two in the backward pass
_NO_PARTS = ("moment", "offloaded")
_WEIGHTS: tuple[Kind, ...] = ("frozen", "copied", "trained")
_WHERE = {
    "forward": "the forward pass of a layer",
    "loss": "the loss of one chunk of tokens",
    "backward": "a layer computed again for its gradients",
}


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment at which most is in use; `peak` is their sum."""

    process: int
    """Interpreter and libraries; on a GPU the CUDA context."""
    frozen_weights: int
    frozen_copies: int
    """Originals of embeddings and norms that PEFT keeps beside the trained ones."""
    trained_weights: int
    """Float32."""
    optimizer: int
    """Adam's two moments of each trained weight."""
    gradients: int
    saved_activations: int
    """What the forward pass leaves for the backward pass: with checkpointing, the inputs of the layers."""
    temporary: int
    """What is made and dropped meanwhile; `moment` says where most."""
    allocator: int
    """Kernels' scratch memory, and what is free but cannot be used."""
    moment: str
    """When the peak is reached, in words."""
    gathered: int = 0
    """Weights of other devices while they are used, and gradients that are whole until each device has its part."""
    messages: int = 0
    """What attention across devices copies, and buckets of gradients."""
    offloaded: int = 0
    """In main memory instead, where activations are offloaded; not part of the peak."""

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part, in the order of the class."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _NO_PARTS}

    @property
    def largest(self) -> str:
        """The part that takes most, in words."""
        return max(self.parts, key=self.parts.__getitem__).replace("_", " ")


def peak_memory(
    config: PreTrainedConfig,
    recipe: Recipe,
    model: Outline,
    machine: Machine,
    rehearsal: Rehearsal | None = None,
) -> Memory:
    """Peak memory of a step of `recipe` on one device of `machine`.

    Args:
        rehearsal: of the stretch that one device holds (`on_one_device`) at other lengths, where there is one already.

    Raises:
        ModelError: the model cannot be built or rehearsed without weights.
        PlanError: `parallel.sequence` does not divide the devices.
    """
    mesh, local = mesh_of(recipe, machine), on_one_device(recipe)
    peaks = (rehearsal or rehearse(config, local)).at(local.context.context_length)
    phases: tuple[Phase, ...] = get_args(Phase)
    offloaded = _layer_inputs(local, config) if recipe.train.activation_offload else 0
    gathered: dict[Phase, float] = {}
    whole = [peaks["forward"][kind] for kind in _WEIGHTS]
    for each in phases:
        _quantize(peaks[each], recipe, model)
        _offload(peaks[each], each, offloaded)
        gathered[each] = divide(peaks[each], each, recipe, model, mesh)
    phase = max(phases, key=lambda each: sum(peaks[each].values()) + gathered[each])
    held = peaks[phase]
    optimizer = round(optimizer_bytes(recipe, model) / mesh.state_shares) + master_bytes(model, mesh)
    messages = message_bytes(recipe, model, mesh, config)
    tensors = sum(held.values()) + optimizer + gathered[phase] + messages
    memory = Memory(
        process=machine.process_bytes + library_bytes(mesh, machine),
        frozen_weights=round(held["frozen"]),
        frozen_copies=round(held["copied"]),
        trained_weights=round(held["trained"]),
        optimizer=optimizer,
        gradients=round(held["gradients"]),
        saved_activations=round(held["saved"]),
        temporary=round(held["temporary"]),
        allocator=round(machine.allocator_share * tensors) + _expert_kernels(config, local, machine),
        moment=_WHERE[phase],
        gathered=round(gathered[phase]),
        messages=messages,
        offloaded=offloaded,
    )
    # A GPU is given its part of the weights only; on a CPU they are all there before they are divided.
    reading = mesh.weight_shares > 1 and not machine.cuda
    return max(memory, _reading(whole, memory), key=lambda each: each.peak) if reading else memory


def _reading(whole: list[float], step: Memory) -> Memory:
    """While each process reads the whole model, before it has a part of it."""
    frozen, copied, trained = (round(size) for size in whole)
    return Memory(
        process=step.process,
        frozen_weights=frozen,
        frozen_copies=copied,
        trained_weights=trained,
        optimizer=0,
        gradients=0,
        saved_activations=0,
        temporary=0,
        allocator=0,
        moment="reading the model, which is divided afterwards",
    )


def fits(memory: Memory, machine: Machine) -> bool:
    """Whether a device of `machine`, and its part of the main memory beside it, hold what is planned."""
    return memory.peak <= machine.memory_bytes and memory.offloaded <= machine.host_bytes


def optimizer_bytes(recipe: Recipe, model: Outline) -> int:
    """States of the optimizer; those of whole embeddings (and of norms, which are small) stay in 32 bits."""
    small = model.trained_matrices if recipe.train.optimizer != "adamw" else 0
    return (model.trained - small) * _ADAM_STATES + small * _ADAM_8BIT_STATES


def _expert_kernels(config: PreTrainedConfig, recipe: Recipe, machine: Machine) -> int:
    """What a CPU keeps for products with as many rows as experts are given tokens, a number that hardly repeats.

    A balanced router gives an expert ``tokens * chosen / experts`` tokens, nearly always within two standard deviations
    (about the root of that); an unbalanced one reaches the most that is kept.
    """
    experts, chosen = experts_of(config)
    if machine.cuda or experts == 1:
        return 0
    tokens = recipe.context.context_length * recipe.train.micro_batch_size
    numbers = 4 * math.sqrt(tokens * chosen / experts)
    return round(min(_EXPERT_PRODUCTS * numbers, _MOST_KERNELS) * _KERNEL_BYTES)


def _quantize(held: Bytes, recipe: Recipe, model: Outline) -> None:
    """Frozen linear weights in 4 bits, and one of them expanded while it is used."""
    if recipe.model.quantization == "none":
        return
    width = width_of(recipe)
    held["frozen"] -= model.quantizable * (width - NF4_BYTES)
    held["temporary"] += model.largest_matrix * width


def _offload(held: Bytes, phase: Phase, offloaded: int) -> None:
    """Take the inputs of layers, which are in main memory, off what is held; forward they count as temporary too."""
    left = float(offloaded)
    for kind in ("saved", "temporary") if phase == "forward" else ("saved",):
        taken = min(left, held[kind])
        held[kind] -= taken
        left -= taken


def _layer_inputs(recipe: Recipe, config: PreTrainedConfig) -> int:
    """Bytes of the inputs of all checkpointed layers but the one at work."""
    text = config.get_text_config(decoder=True)
    tokens = recipe.context.context_length * recipe.train.micro_batch_size
    layers = max(0, text.num_hidden_layers // recipe.train.activation_checkpointing_every - 1)
    return int(layers * text.hidden_size * tokens * width_of(recipe))
