"""The training loop on DeepSpeed: the same checkpoints as without it, read by any number of processes and any shard.

DeepSpeed's own checkpoints are pickles for one number of processes. Here the first process writes what one process
alone would have written: the trained weights, and AdamW's states by parameter; nothing else is needed to go on.
"""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from longlora.errors import ModelError
from longlora.training.loop import LongContextTrainer
from longlora.training.saved import explained_states
from longlora.training.zero import put_states, zero_states


class ZeroTrainer(LongContextTrainer):
    """`LongContextTrainer` with what DeepSpeed does otherwise.

    DeepSpeed clips and takes the step within `training_step`, before anybody is asked. By itself it leaves out a step
    whose gradient is no number (ZeRO-2 and ZeRO-3 of 0.19.8, where the weights are float32). So a step that is to be
    left out gets such a gradient: one with a loss that is no number, or without labels.
    """

    _groups: list[dict[str, Any]]
    """Of the optimizer, before DeepSpeed put flat parts in place of the parameters."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            unset_hf_deepspeed_config()  # models that are loaded from now on are whole again

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            made = super().create_optimizer(model)
            self._groups = [{**group, "params": list(group["params"])} for group in made.param_groups]
        return self.optimizer  # type: ignore[no-any-return]

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # accelerate warns that DeepSpeed knows the number of micro batches, which transformers keeps from accelerate.
        log = logging.getLogger("accelerate.accelerator")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            # Not the library's way to go on, which reads DeepSpeed's own checkpoints.
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        finally:
            log.setLevel(level)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        left_out = ~loss.detach().isfinite() | self.guard.is_unlabelled
        return loss * torch.ones_like(loss).masked_fill(left_out, math.nan)

    def _leave_out(self) -> None:
        super()._leave_out()
        zero = self.model_wrapped.optimizer
        if not zero.overflow:
            raise ModelError(
                f"DeepSpeed took step {self.state.global_step + 1}, which was to be left out: the weights in memory "
                "are lost, resume from the last checkpoint with deepspeed==0.19.8, or with parallel.shard=fsdp2"
            )
        zero.overflow = False  # or the library would hold back the learning rate, unlike without DeepSpeed

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._save(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        begun = bool(self.model_wrapped.optimizer.optimizer.state)  # not while all steps were left out
        states = zero_states(self.model_wrapped, self._parameters(), keep=self.ranks.is_main) if begun else {}
        if not self.ranks.is_main:
            return
        # Those of torch's optimizer: DeepSpeed has dropped one without parameters. All have the same rate.
        rates = {name: self._live_groups()[0][name] for name in ("lr", "initial_lr")}
        numbers = itertools.count()
        groups = [{**group, **rates, "params": [next(numbers) for _ in group["params"]]} for group in self._groups]
        torch.save({"state": states, "param_groups": groups}, Path(output_dir) / OPTIMIZER_NAME)
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with explained_states(Path(checkpoint)):
            # Mapped, not read: each process needs its part alone. Only tensors and numbers are loaded.
            saved = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
            if saved["state"]:
                put_states(self.model_wrapped, self._parameters(), saved["state"])
            for group in self._live_groups():
                group.update({name: saved["param_groups"][0][name] for name in ("lr", "initial_lr")})
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._groups for parameter in group["params"]]

    def _live_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.model_wrapped.optimizer.optimizer.param_groups
        return groups
