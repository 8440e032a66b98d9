"""The training loop: a thin `transformers.Trainer` with our loss model and our rules for checkpoints.

What is not the library's: saving what is trained alone (no pickle of arguments), a manifest that makes a checkpoint
count, and stopping at the first loss that is not a number.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from longlora.config import Recipe
from longlora.data.order import RowOrder
from longlora.errors import ModelError, RunFolderError
from longlora.model.levers import OPTIMIZERS
from longlora.model.trainable import save_trained
from longlora.planning.out_of_memory import is_out_of_memory
from longlora.training.checkpoint import Batches, complete_checkpoint
from longlora.training.collectives import gathered, largest
from longlora.training.distributed import Ranks
from longlora.training.failures import is_lost_contact
from longlora.training.loss_model import weight_of_batches
from longlora.training.sharding import is_sharded, own_states, whole_states, whole_weights


class LongContextTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with our loss model and our rules for checkpoints."""

    checkpoints_kept = 2
    ranks = Ranks()
    """Which of the processes of the run this one is."""
    _bad_loss = ""
    """A loss of the step under way that is not a number, in words."""

    def take_sharded_model(self) -> None:
        """Leave wrapping and placing to `shard_model`, which has done it."""
        # Set only now: the library sees no way to resume such a model, which we have.
        self.is_distributed_loading_by_transformers = True

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager[None]:
        # Not deferred to the last micro batch: until then each process would hold the whole gradients.
        return contextlib.nullcontext()

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Not accelerate's own cut of the data: processes that share rows need the same ones, and a state of training
        # must say which rows come next, on any number of processes.
        order = RowOrder(
            len(self.train_dataset), self._train_batch_size, self.args.data_seed, self.ranks.data_rank,
            self.ranks.data_world,
        )  # fmt: skip
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=order,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        # For its device and its epochs; the rows are this process's own already.
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # Each token once, whoever shares its row, and no padding.
        tokens = torch.tensor(inputs["stretch"].own_tokens, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(tokens).sum())

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            self._bad_loss = f"loss is {loss.item()}"
            if self.ranks.world == 1:
                raise self._diverged(self._bad_loss)
        return loss

    def _diverged(self, what: str) -> ModelError:
        return ModelError(
            f"{what} in step {self.state.global_step + 1}: lower train.learning_rate "
            f"(now {self.args.learning_rate:g}) and resume; nothing was saved from this step"
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # Where examples weigh the same, their weights take the place of the number of labels.
        weight = weight_of_batches(batch_samples).to(device)
        return self.accelerator.gather(weight).sum() if self.args.world_size > 1 else weight

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # Clipping comes right before the optimizer's step: the last moment at which the weights are still good.
        norm = super()._clip_grad_norm(model)
        bad_norm = not torch.isfinite(torch.as_tensor(norm))
        # All processes come here, so that all stop, with the same words.
        if largest(self.ranks, float(bad_norm or self._bad_loss != "")):
            losses = [
                f"{words} on rank {rank}" for rank, words in enumerate(gathered(self.ranks, self._bad_loss)) if words
            ]
            raise self._diverged(losses[0] if losses else f"gradient norm is {float(norm)}")
        return norm

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model).model
        weights = whole_weights(model, keep=self.ranks.is_main) if is_sharded(model) else None
        if self.ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            save_trained(model, folder, weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        states = whole_states(self.optimizer.state_dict(), keep=self.ranks.is_main)
        if self.ranks.is_main:
            torch.save(states, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # Mapped, not read: each process needs its part alone. Only tensors and numbers are loaded.
        states = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        self.optimizer.load_state_dict(own_states(states, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            largest(self.ranks, 0)  # all have written what is theirs alone, the states of their random numbers
            if self.ranks.is_main:
                complete_checkpoint(folder, keep=self.checkpoints_kept, batches=self._batches())
        except (OSError, RuntimeError, SafetensorError) as error:  # each library's own way to say that a disk is full
            if is_lost_contact(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            if is_out_of_memory(error):
                raise
            free = shutil.disk_usage(self.args.output_dir).free
            raise RunFolderError(
                f"{folder.name} cannot be written to {self.args.output_dir} ({free / 2**30:.2f} GiB free): {error}; "
                "free space and resume, earlier checkpoints are whole"
            ) from error

    def _batches(self) -> Batches:
        return Batches(self._train_batch_size, self.args.gradient_accumulation_steps, self.ranks.data_world)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the weights are put into the model while every process holds it whole."""


class _Arguments(TrainingArguments):  # type: ignore[misc]
    place_model_on_device = False  # it is where it belongs


def training_arguments(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    *,
    grad_accum_steps: int | None = None,
    has_experts: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> TrainingArguments:
    """The `train` section in the words of transformers; checkpoints go to `folder`.

    Args:
        recipe: says how to train.
        folder: of the checkpoints.
        device: of this process.
        grad_accum_steps: in place of the recipe's.
        has_experts: whether some trained weights may be in no loss of a step.
        changes: in place of what follows from the others.
    """
    train = recipe.train
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": train.steps,
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps or train.grad_accum_steps,
        "optim": OPTIMIZERS[train.optimizer],
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "max_grad_norm": train.max_grad_norm,
        "bf16": recipe.model.dtype == "bfloat16",
        "seed": train.seed,
        "data_seed": train.seed,
        "logging_steps": train.logging_steps,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "all",
        "save_steps": train.save_steps,
        "save_total_limit": None,  # complete_checkpoint removes old ones, and only after the new one is whole
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
        "use_cpu": device.type == "cpu",
        "ddp_backend": "gloo" if dist.is_initialized() and device.type == "cpu" else None,
        # Every trained weight is part of every loss, but for experts that no token went to.
        "ddp_find_unused_parameters": has_experts,
        "ddp_broadcast_buffers": False,
        "average_tokens_across_devices": True,
        "disable_tqdm": True,
        "report_to": [],
    }
    arguments = _Arguments(**settings | dict(changes or {}))
    # One GPU to a process: torch's DataParallel would copy the model to the others in every step.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
