"""The training loop: a thin `transformers.Trainer` with our loss model and our rules for checkpoints.

What is not the library's: saving what is trained alone (no pickle of arguments), a manifest that makes a checkpoint
count, and stopping at the first loss that is not a number.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from longlora.config import Recipe
from longlora.errors import ModelError, RunFolderError
from longlora.model.levers import OPTIMIZERS
from longlora.model.trainable import load_trained, save_trained
from longlora.planning.out_of_memory import is_out_of_memory
from longlora.training.checkpoint import complete_checkpoint
from longlora.training.loss_model import weight_of_batches


class LongContextTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with our loss model and our rules for checkpoints."""

    checkpoints_kept = 2

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise ModelError(
                f"loss is {loss.item()} in step {self.state.global_step + 1}: lower train.learning_rate "
                f"(now {self.args.learning_rate:g}) and resume; nothing was saved from this step"
            )
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # Where examples weigh the same, their weights take the place of the number of labels.
        weight = weight_of_batches(batch_samples)
        if weight is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        weight = weight.to(device)
        return self.accelerator.gather(weight).sum() if self.args.world_size > 1 else weight

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # Clipping comes right before the optimizer's step: the last moment at which the weights are still good.
        norm = super()._clip_grad_norm(model)
        if not torch.isfinite(torch.as_tensor(norm)):
            raise ModelError(
                f"gradient norm is {float(norm)} in step {self.state.global_step + 1}: lower train.learning_rate "
                f"(now {self.args.learning_rate:g}) and resume; nothing was saved from this step"
            )
        return norm

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_trained(self.accelerator.unwrap_model(self.model).model, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                complete_checkpoint(folder, keep=self.checkpoints_kept)
        except (OSError, RuntimeError, SafetensorError) as error:  # each library's own way to say that a disk is full
            shutil.rmtree(folder, ignore_errors=True)
            if is_out_of_memory(error):
                raise
            free = shutil.disk_usage(self.args.output_dir).free
            raise RunFolderError(
                f"{folder.name} cannot be written to {self.args.output_dir} ({free / 2**30:.2f} GiB free): {error}; "
                "free space and resume, earlier checkpoints are whole"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.accelerator.unwrap_model(model or self.model).model, Path(resume_from_checkpoint))


def training_arguments(recipe: Recipe, folder: Path, device: torch.device) -> TrainingArguments:
    """The `train` section in the words of transformers; checkpoints go to `folder`."""
    train = recipe.train
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=train.steps,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.grad_accum_steps,
        optim=OPTIMIZERS[train.optimizer],
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        bf16=recipe.model.dtype == "bfloat16",
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=train.logging_steps,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        save_steps=train.save_steps,
        save_total_limit=None,  # complete_checkpoint removes old ones, and only after the new one is whole
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        report_to=[],
    )
