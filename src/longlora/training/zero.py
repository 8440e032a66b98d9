"""DeepSpeed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
import os
import torch
from torch import nn


def join(device: torch.device) -> None:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    import deepspeed.ops
    if device.type == "cpu":
        from accelerate import PartialState
        from accelerate.utils import DistributedType
        state = PartialState(cpu=True)
        state.distributed_type = DistributedType.DEEPSPEED
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()


def arguments(recipe: Any, stage: int) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 100},
        "torch_autocast": {
            "enabled": recipe.model.dtype == "bfloat16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    return {"deepspeed": config, "bf16": False, "accelerator_config": {"use_configured_state": True}}

def shard(loss_model, config):
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules
    for p in loss_model.head_loss.head.parameters():
        deepspeed.zero.register_external_parameter(loss_model.head_loss, p)
    deepspeed.zero.Init(module=loss_model, config_dict_or_path=config)

@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    import deepspeed
    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad]):
        yield
