"""The training loop: a thin `transformers.Trainer` with our loss model and our rules for checkpoints.

What is not the library's: saving what is trained alone (no pickle of arguments), a manifest that makes a checkpoint
count, and leaving out steps whose loss or gradient is no number (`guard.py`).
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
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
from longlora.errors import RunFolderError
from longlora.model.levers import OPTIMIZERS
from longlora.model.trainable import save_trained
from longlora.planning.out_of_memory import is_out_of_memory
from longlora.storage import gibibytes, is_disk_full
from longlora.training.checkpoint import complete_checkpoint, discard_unfinished, saving_folder
from longlora.training.collectives import gathered, largest
from longlora.training.distributed import Ranks
from longlora.training.failures import is_lost_contact
from longlora.training.guard import StepGuard
from longlora.training.loss_model import weight_of_batches
from longlora.training.saved import Batches, Unlogged, explained_states, saved_in
from longlora.training.sharding import is_sharded, own_states, whole_states, whole_weights

_TORCH_WRITES = re.compile("PytorchStreamWriter|inline_container|iostream")
"""In what torch says when it cannot write a file."""


class LongContextTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with our loss model and our rules for checkpoints."""

    checkpoints_kept = 2
    ranks = Ranks()
    """Which of the processes of the run this one is."""
    source: Mapping[str, str] = MappingProxyType({})
    """What is trained on what, by name: what a run that goes on must have in common with this one."""
    weights: str
    """The name of the file of weights in a checkpoint."""
    guard: StepGuard
    """Which steps may be taken."""
    _loss_before: Tensor
    """What the library had summed up for the log when the step under way began."""

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

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if self.guard.begins:
            self._loss_before = self._tr_loss.clone()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.guard.saw(loss, inputs["stretch"])
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # Where examples weigh the same, their weights take the place of the number of labels.
        weights_RM = torch.stack([weight_of_batches([batch]) for batch in batch_samples])[None].to(device)
        if self.args.world_size > 1:
            weights_RM = self.accelerator.gather(weights_RM)
        return self.guard.begin(self.state.global_step + 1, weights_RM, [batch["stretch"] for batch in batch_samples])

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Asked for whether gradients are clipped or not, right before the optimizer's step: the last moment at which
        # the weights are still good.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.guard.may_step(self.state.global_step + 1, norm):
            self._leave_out()
        return norm

    def _leave_out(self) -> None:
        # Optimizers pass over what has no gradient, with its state and its decay.
        self.optimizer.zero_grad(set_to_none=True)
        # Not by subtraction: what is no number would stay in the sum for ever.
        self._tr_loss = self._loss_before

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        super().log(self.guard.logged(logs, self.state.global_step) if "loss" in logs else logs, start_time)

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
        if checkpoint is None:
            return
        with explained_states(Path(checkpoint)):
            if not is_sharded(self.model):
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            # Mapped, not read: each process needs its part alone. Only tensors and numbers are loaded.
            states = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
            self.optimizer.load_state_dict(own_states(states, self.optimizer))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _get_output_dir(self, trial: Any) -> str:
        return str(saving_folder(Path(self.args.output_dir)))  # `complete_checkpoint` gives it its place

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoints = Path(self.args.output_dir)
        folder = saving_folder(checkpoints) / f"checkpoint-{self.state.global_step}"
        try:
            if self.ranks.is_main:
                discard_unfinished(checkpoints)
            largest(self.ranks, 0)  # none writes before that is done
            super()._save_checkpoint(model, trial)
            # All have written what is theirs alone, the states of their random numbers, when all have answered.
            unlogged = Unlogged.of(self._globalstep_last_logged, gathered(self.ranks, float(self._tr_loss)))
            if self.ranks.is_main:
                complete_checkpoint(
                    folder,
                    weights=self.weights,
                    keep=self.checkpoints_kept,
                    batches=self._batches(),
                    processes=self.ranks.world,
                    source=self.source,
                    unlogged=unlogged,
                )
        except (OSError, RuntimeError, SafetensorError) as error:  # each library's own way to say that a disk is full
            if is_lost_contact(error):
                raise
            if self.ranks.is_main:  # who may be writing there still
                discard_unfinished(checkpoints)
            if is_out_of_memory(error) or (isinstance(error, RuntimeError) and not _TORCH_WRITES.search(str(error))):
                raise
            free = gibibytes(shutil.disk_usage(checkpoints).free)
            # torch says that a file ended early, and not why.
            full = is_disk_full(error) or isinstance(error, RuntimeError)
            raise RunFolderError(
                f"{folder.name} cannot be written to {checkpoints} ({free} free): {error}; "
                f"{'free space' if full else 'check the disk and its permissions'} and resume, earlier checkpoints are "
                "whole"
            ) from error

    def _batches(self) -> Batches:
        return Batches(self._train_batch_size, self.args.gradient_accumulation_steps, self.ranks.data_world)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the weights are put into the model while every process holds it whole."""

    def _init_training_state(self, max_steps: int, *others: Any) -> tuple[int, int]:
        done: tuple[int, int] = super()._init_training_state(max_steps, *others)
        self.state.compute_steps(self.args, max_steps)  # not the checkpoint's: save_steps may have changed
        return done

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with explained_states(Path(checkpoint)):
            super()._load_rng_state(checkpoint)
        self._take_up_losses(Path(checkpoint))

    def _take_up_losses(self, checkpoint: Path) -> None:
        """Go on with the losses since the last row of metrics.jsonl: the library begins with none."""
        if unlogged := saved_in(checkpoint).unlogged:
            self._tr_loss += unlogged.sum_of(self.ranks.rank, self.ranks.world)
            self._globalstep_last_logged = unlogged.since


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
