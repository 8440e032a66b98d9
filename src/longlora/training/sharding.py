"""FSDP2: every process holds a part of each weight, and has the whole of one layer at a time while it computes.

What is a unit, gathered and freed together: each decoder layer, and the rest (embeddings, last norm, output head),
which stays whole through a step because the loss needs the head between the forward and the backward pass. A unit may
mix frozen weights of 16 bits and trained ones of 32: each travels in its own type, and gradients add up in float32.

The frozen originals that PEFT keeps beside trained norms are sharded with their layer, and those of embeddings are
freed before (`free_frozen_embeddings`). Weights in 4 bits stay whole on every process.

What is saved is what one process would have saved: names, shapes and types do not tell how many there were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from longlora.config import Recipe
from longlora.errors import ModelError
from longlora.model.trainable import TrainedModel, base_of
from longlora.training.distributed import Ranks
from longlora.training.loss_model import LossModel
from longlora.training.zero import is_zero_part, whole_parameter


def check_sharding(recipe: Recipe) -> None:
    """Refuse what FSDP2 cannot do, before any weights are read.

    Raises:
        ModelError: the optimizer knows no sharded weights, or transformers is too old.
    """
    if recipe.train.optimizer != "adamw":
        raise ModelError(
            f"train.optimizer={recipe.train.optimizer} knows no sharded weights, which parallel.shard=fsdp2 makes: set "
            "train.optimizer=adamw, whose states are divided among the processes"
        )
    if not hasattr(Trainer, "_sync_replicated_trainable_parameters"):
        raise ModelError("parallel.shard=fsdp2 needs transformers>=5.23: upgrade it or set parallel.shard=none")


def shard_model(model: LossModel, ranks: Ranks, device: torch.device) -> None:
    """Leave each process its part of `model`, on `device`; every process must hold the same weights before.

    Raises:
        ModelError: the architecture does not say what its layers are.
    """
    mesh = init_device_mesh(device.type, (ranks.world,))
    # fully_shard has no parts of a weight that is packed into bytes.
    whole = {parameter for parameter in model.parameters() if not parameter.is_floating_point()}
    for layer in _layers(base_of(model.model)):
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(model, "measure")


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` was applied, or `shard_zero`."""
    return any(isinstance(parameter, DTensor) or is_zero_part(parameter) for parameter in model.parameters())


def free_gathered(model: nn.Module) -> None:
    """Leave each process its part again, after a forward pass that no backward pass followed; else nothing."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole_weights(model: TrainedModel, *, keep: bool) -> dict[str, Tensor]:
    """The trained weights of a sharded model by their names in memory, whole and on the CPU; all processes must call.

    Of a fully fine-tuned model every parameter, a tied one once; of an adapter what is trained, under all its names.

    Args:
        model: sharded.
        keep: false where only others need the result: it is empty then, and takes no memory.
    """
    adapter = isinstance(model, PeftModel)
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=not adapter):
        if adapter and not parameter.requires_grad:
            continue
        if id(parameter) not in seen:
            whole = whole_parameter if is_zero_part(parameter) else _whole
            seen[id(parameter)] = whole(parameter, keep=keep)
        if keep:
            found[name] = seen[id(parameter)]
    return found


def whole_states(states: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """``optimizer.state_dict()`` of a sharded model as one process would have it; arguments as in `whole_weights`."""
    gathered = {
        index: {name: _whole(value, keep=keep) if isinstance(value, Tensor) else value for name, value in state.items()}
        for index, state in states["state"].items()
    }
    return {**states, "state": gathered if keep else {}}


def own_states(states: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This process's part of what `whole_states` gave, on any number of processes."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        **states,
        "state": {
            index: {name: _part(value, parameters[index]) for name, value in state.items()}
            for index, state in states["state"].items()
        },
    }


def _layers(base: PreTrainedModel) -> list[nn.Module]:
    names = set(base._no_split_modules or ())
    layers = [module for module in base.modules() if type(module).__name__ in names]
    layers = layers or [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(base).__name__} does not say what its decoder layers are, which parallel.shard=fsdp2 shards: set "
            "parallel.shard=none"
        )
    return layers


def _whole(tensor: Tensor, *, keep: bool) -> Tensor:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()  # all processes take part, whoever keeps it
    return tensor.cpu().contiguous() if keep else torch.empty(0)


def _part(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value  # the count of steps
    # Every process has read the whole: nothing is sent.
    on_device = value.to(parameter.device)
    return distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)
