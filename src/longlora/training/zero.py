"""DeepSpeed's ZeRO-2 and ZeRO-3: optimizer states, gradients and, with ZeRO-3, weights divided among the processes.

Nothing of DeepSpeed is compiled: torch's AdamW updates what a process owns. Its bf16 mode would turn the trained
weights into bf16, so it is off; autocast (section ``torch_autocast``) computes in 16 bits on float32 weights, and
gradients travel and add up in float32, as in one process.

ZeRO-3 gathers the weights of a module before it is used, by hooks on modules. Three places use weights outside of the
modules that own them, or a number of times that differs among processes, which must all gather the same: the output
head within the loss, MLPs in tiles, and embeddings of which rows are trained. They get theirs gathered once, for as
long as they work.

Source: DeepSpeed 0.19.8 (runtime/engine.py, runtime/zero/). Tested on a CPU with gloo. UNVERIFIED ON HARDWARE: GPUs
with NCCL, which were only read about.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft.utils import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig

from longlora.config import Recipe
from longlora.errors import ModelError, one_line
from longlora.training.loss_model import LossModel

STAGES = {"zero2": 2, "zero3": 3}
"""`parallel.shard` -> the stage of ZeRO."""
_PACKAGE = "deepspeed"


def check_zero(recipe: Recipe) -> None:
    """Refuse what DeepSpeed cannot do, before any weights are read.

    Raises:
        ModelError: it is not installed or cannot be imported, or a setting of `recipe` does not go with it.
    """
    setting = f"parallel.shard={recipe.parallel.shard}"
    if importlib.util.find_spec(_PACKAGE) is None:
        raise ModelError(
            f"{setting} needs the package deepspeed, which is not installed: pip install 'longlora[deepspeed]', or set "
            "parallel.shard=fsdp2, which needs none"
        )
    if recipe.train.optimizer != "adamw":
        raise ModelError(
            f"train.optimizer={recipe.train.optimizer} knows no flat parts of weights, which {setting} makes: set "
            "train.optimizer=adamw, whose states are divided among the processes"
        )
    if recipe.train.compile_norms and recipe.parallel.shard == "zero3":
        raise ModelError(
            f"train.compile_norms=true compiles norms whose weights {setting} takes away after use: leave it out, or "
            "set parallel.shard=fsdp2"
        )
    try:
        importlib.import_module(_PACKAGE)
    except Exception as error:  # it looks for compilers and drivers, and fails in ways of its own
        reason = one_line(error, 160)
        raise ModelError(
            f"{setting} needs the package deepspeed, which cannot be imported here ({reason}): install one that fits "
            "with pip install 'longlora[deepspeed]', or set parallel.shard=fsdp2"
        ) from error


def join_zero(device: torch.device) -> dict[str, Any]:
    """Make DeepSpeed use the processes that have joined; returns what `TrainingArguments` must know of that."""
    deepspeed = _deepspeed()
    # DeepSpeed calls functions of torch by names that torch 2.13 has replaced.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cpu":
        # Its messages through shared memory would be compiled first; gloo needs nothing.
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
        # accelerate looks for DeepSpeed on accelerators only.
        PartialState(cpu=True).distributed_type = DistributedType.DEEPSPEED
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return {"accelerator_config": {"use_configured_state": True}} if device.type == "cpu" else {}


def zero_config(recipe: Recipe, config: PreTrainedConfig) -> dict[str, Any]:
    """DeepSpeed's config for `recipe` and a model of `config`; ``auto`` is filled in by transformers."""
    hidden = int(config.get_text_config(decoder=True).hidden_size)
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": STAGES[recipe.parallel.shard],
            # Numbers of elements, as transformers chooses them; by default buckets alone are 2 GB.
            "reduce_bucket_size": hidden * hidden,
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": 10 * hidden,
            # It would replace torch.nn.functional.linear for everyone, to save less than checkpointing does.
            "memory_efficient_linear": False,
        },
        "torch_autocast": {
            "enabled": recipe.model.dtype == "bfloat16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # of which gradients would travel in 16 bits
        },
    }


def shard_zero(model: LossModel, config: dict[str, Any], device: torch.device) -> None:
    """Leave each process its part of every weight, on `device`, one weight at a time; for stage 3, after `join_zero`.

    All processes get what the first one holds.

    Args:
        model: whole, anywhere.
        config: of `zero_config`.
        device: of this process.
    """
    deepspeed = _deepspeed()
    zero = deepspeed.zero
    # PEFT reads the weights of embeddings of which rows are trained where they lie.
    rows = [module for module in model.modules() if isinstance(module, TrainableTokensWrapper)]
    for user, owner in [(model.head_loss, model.head_loss.head), *((module, module) for module in rows)]:
        for parameter in owner.parameters():
            zero.register_external_parameter(user, parameter)
    for module in model.modules():
        if hasattr(module, "tile_tokens"):  # `tile_mlps`
            deepspeed.utils.set_z3_leaf_module(module, True)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    # Sizes of batches do not matter here, and those for the trainer are not known yet.
    known = {name: value for name, value in config.items() if value != "auto"}
    zero.Init(module=model, config_dict_or_path={**known, "train_micro_batch_size_per_gpu": 1})


def is_zero_part(parameter: Tensor) -> bool:
    """Whether `shard_zero` was applied to it."""
    return hasattr(parameter, "ds_id")


def whole_parameter(parameter: Tensor, *, keep: bool) -> Tensor:
    """All of a parameter of which this process has a part, on the CPU; all processes must call.

    Args:
        parameter: of `shard_zero`.
        keep: false where only others need it: it is empty then.
    """
    with _deepspeed().zero.GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True).contiguous() if keep else torch.empty(0)


def zero_states(engine: Any, parameters: Iterable[nn.Parameter], *, keep: bool) -> dict[int, dict[str, Tensor]]:
    """AdamW's states as one process would have them, by the number of the parameter, on the CPU; all must call.

    Args:
        engine: DeepSpeed's, after at least one step.
        parameters: what is trained, in the order of the optimizer's groups.
        keep: as in `whole_parameter`.
    """
    get = _deepspeed().utils.safe_get_full_optimizer_state
    _link_states(engine)
    step = next(iter(engine.optimizer.optimizer.state.values()))["step"].to("cpu", torch.float32)
    found = {}
    for index, parameter in enumerate(parameters):
        moments = {name: get(parameter, name) for name in ("exp_avg", "exp_avg_sq")}
        if keep:
            found[index] = {"step": step.clone(), **{name: value.cpu().clone() for name, value in moments.items()}}
    return found


def put_states(engine: Any, parameters: Iterable[nn.Parameter], states: dict[int, dict[str, Tensor]]) -> None:
    """Give each process its part of `zero_states`, whatever the number of processes was."""
    utils, zero = _deepspeed().utils, engine.optimizer
    stage3 = zero_stage(engine) == 3
    # They would be made in the first step; of AdamW there is nothing else to know.
    for flat in zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups:
        moments = {name: torch.zeros_like(flat) for name in ("exp_avg", "exp_avg_sq")}
        step = torch.tensor(float(states[0]["step"]), device=flat.device if zero.optimizer.defaults["fused"] else "cpu")
        zero.optimizer.state[flat] = {"step": step, **moments}
    _link_states(engine)
    for index, parameter in enumerate(parameters):
        for name in ("exp_avg", "exp_avg_sq"):
            value = states[index][name].to(parameter.device)
            if not stage3:
                utils.safe_set_full_optimizer_state(parameter, value, name)
                continue
            part: Any = parameter
            size, rank = part.ds_tensor.ds_numel, part.ds_zero_partition_rank
            padded = nn.functional.pad(value.flatten(), (0, size * part.ds_zero_partition_world_size - value.numel()))
            utils.safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size], name)


def _link_states(engine: Any) -> None:
    """Let ZeRO-2's parameters find their states; by itself it links those of the first group of the optimizer alone."""
    if zero_stage(engine) == 2:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def zero_stage(engine: Any) -> int:
    """2 or 3."""
    return int(engine.zero_optimization_stage())


def _deepspeed() -> Any:
    # It looks for an accelerator when it is imported, and says what it found.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    return importlib.import_module(_PACKAGE)
