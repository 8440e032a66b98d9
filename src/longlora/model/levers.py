"""The memory levers of a recipe, applied to a model: what docs/method.md lists under "Memory levers".

In: a recipe. Out: `check_levers` says before any weights are read what this machine cannot do; `apply_memory_levers`
changes the model. No lever changes what is computed, beyond rounding, except where its recipe field says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from longlora.config import Recipe
from longlora.errors import ModelError, one_line
from longlora.memory.embeddings import free_frozen_embeddings
from longlora.memory.tiled_mlp import tile_mlps
from longlora.model.adapters import norms
from longlora.model.head import mixed_precision
from longlora.model.trainable import TrainedModel, base_of

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
"""Names of `train.optimizer` -> those of transformers."""


def check_levers(recipe: Recipe, device: torch.device) -> None:
    """Refuse what `device` or the installed packages cannot do, before any weights are read.

    Raises:
        ModelError: a lever needs CUDA, a package or a newer transformers.
    """
    train = recipe.train
    if train.activation_offload:
        _need_cuda("train.activation_offload=true", device, "activations are in main memory already")
    if train.optimizer != "adamw":
        setting = f"train.optimizer={train.optimizer}"
        _need_cuda(setting, device, "bitsandbytes has no 8-bit optimizer here")
        _need_package(setting, "bitsandbytes", "longlora[qlora]")
    if train.liger_kernels:
        _need_cuda("train.liger_kernels=true", device, "they are Triton kernels")
        _need_package("train.liger_kernels=true", "liger_kernel", "liger-kernel")
    if recipe.model.quantization != "none":
        _need_package(f"model.quantization={recipe.model.quantization}", "bitsandbytes", "longlora[qlora]")
    if train.compile_norms and device.type == "cpu":
        _need_compiler()
    _checkpointing_arguments(recipe)


def apply_memory_levers(model: TrainedModel, recipe: Recipe, *, probe: bool = True) -> None:
    """Apply every lever that acts on the model.

    Args:
        model: the model as it is trained.
        recipe: says which levers.
        probe: try out on a few tokens what cannot be read from the code; false for tensors without values.

    Raises:
        ModelError: the architecture cannot do what the recipe asks for.
    """
    base = base_of(model)
    if isinstance(model, PeftModel):
        free_frozen_embeddings(model)
    if recipe.train.liger_kernels:
        _use_liger_kernels(base)
    if recipe.train.mlp_tile_tokens is not None:
        with mixed_precision(model, getattr(torch, recipe.model.dtype)):
            tile_mlps(base, recipe.train.mlp_tile_tokens, probe=probe)
    if recipe.train.compile_norms:
        for module in norms(base):
            module.compile(dynamic=True)
    if recipe.train.activation_checkpointing:
        _checkpoint_activations(base, recipe)


def _need_cuda(setting: str, device: torch.device, reason: str) -> None:
    if device.type != "cuda":
        raise ModelError(f"{setting} needs a CUDA device, this run is on {device.type} ({reason}): leave it out")


def _need_package(setting: str, module: str, requirement: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModelError(f"{setting} needs the package {module}, which is not installed: pip install '{requirement}'")
    try:
        importlib.import_module(module)
    except Exception as error:  # packages with binaries for certain machines fail in ways of their own
        reason = one_line(error, 160)
        raise ModelError(
            f"{setting} needs the package {module}, which cannot be imported here ({reason}): install one that fits "
            f"with pip install '{requirement}', or leave {setting.partition('=')[0]} out"
        ) from error


def _need_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # heavy

    try:
        get_cpp_compiler()
    except RuntimeError as error:  # InvalidCxxCompiler
        raise ModelError(
            f"train.compile_norms=true needs a C++ compiler ({one_line(error, 120)}): install g++ or leave it out"
        ) from error


def _checkpointing_arguments(recipe: Recipe) -> dict[str, int | bool]:
    """What transformers' activation checkpointing is asked for beyond its defaults."""
    every, offload = recipe.train.activation_checkpointing_every, recipe.train.activation_offload
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", None)
    known = inspect.signature(enable).parameters if enable is not None else {}
    wanted: dict[str, tuple[int | bool, int | bool]] = {"every_n_layers": (every, 1), "offload": (offload, False)}
    missing = [name for name, (value, default) in wanted.items() if value != default and name not in known]
    if missing:
        raise ModelError(
            f"train.activation_checkpointing_every={every}, train.activation_offload={str(offload).lower()}: the "
            f"installed transformers has no {' and '.join(missing)}: upgrade to transformers>=5.23 or leave them out"
        )
    return {name: value for name, (value, default) in wanted.items() if value != default}


def _checkpoint_activations(base: PreTrainedModel, recipe: Recipe) -> None:
    arguments = _checkpointing_arguments(recipe)
    every = recipe.train.activation_checkpointing_every
    if not base.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(base).__name__} does not support activation checkpointing: set train.activation_checkpointing=false"
        )
    if every > 1 and not any(isinstance(module, GradientCheckpointingLayer) for module in base.modules()):
        raise ModelError(
            f"train.activation_checkpointing_every={every}: {type(base).__name__} can only checkpoint all of its "
            "layers: set it to 1"
        )
    # The second name is that of transformers before 5.23.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False}, **arguments)


def _use_liger_kernels(base: PreTrainedModel) -> None:
    liger = importlib.import_module("liger_kernel.transformers.monkey_patch")
    kind = base.config.model_type
    if kind not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(f"train.liger_kernels=true: liger-kernel has none for the model type {kind}: leave it out")
    # The loss is made in chunks by ours.
    liger._apply_liger_kernel_to_instance(model=base, cross_entropy=False, fused_linear_cross_entropy=False)
