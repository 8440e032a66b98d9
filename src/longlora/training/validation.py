"""The loss on held-out rows while a run trains: full attention, no gradients, nothing about the run changes.

In: packed rows and the model under training. Out: lines ``{"step", "validation_loss"}`` in ``metrics.jsonl``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from longlora.artifacts import RunFolder
from longlora.config import Recipe
from longlora.data.packing import PackedDataset, collate
from longlora.data.shards import open_shard
from longlora.errors import DataError
from longlora.training.collectives import gathered
from longlora.training.distributed import Ranks
from longlora.training.loss_model import LossModel
from longlora.training.sharding import free_gathered


class Validation(TrainerCallback):  # type: ignore[misc]
    """Measures before the first step, every `every` steps and after the last one, the first `rows` of `dataset`.

    One row at a time, in evaluation mode, in which attention is full and documents are kept apart. No random number is
    drawn that the run would draw, so that it goes on as if nothing had been measured. Processes share the rows.
    """

    def __init__(
        self,
        model: LossModel,
        dataset: PackedDataset,
        rows: int,
        every: int,
        metrics: Path,
        console: Console,
        batches: RowBatches,
    ) -> None:
        self._model, self._dataset, self._every, self._batches = model, dataset, every, batches
        self._rows = min(rows, len(dataset))
        self._metrics, self._console = metrics, console

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._measure(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Before the checkpoint of the same step, so that a run resumed from that has the row already.
        if state.global_step % self._every == 0 or state.global_step >= state.max_steps:
            self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        loss = validation_loss(self._model, self._dataset, self._rows, self._batches)
        if not self._batches.ranks.is_main:
            return
        row = {"step": step, "validation_loss": loss if math.isfinite(loss) else None}
        with self._metrics.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row, allow_nan=False) + "\n")
        self._console.print(
            f"step {step}: validation loss {loss:.4f} ({self._rows} held-out rows, full attention)", highlight=False
        )


@dataclass(frozen=True)
class RowBatches:
    """How this process makes batches of its rows; alone, it makes them as `collate` does."""

    ranks: Ranks = field(default_factory=Ranks)
    collate: Callable[[list[dict[str, Tensor]]], dict[str, Any]] = field(
        default_factory=lambda: partial(collate, pad_token_id=0)
    )
    """Of no rows it makes padding, where there are several processes: all take part in each forward pass."""


def validation(
    recipe: Recipe,
    model: LossModel,
    tokenizer_sha256: str,
    *,
    weigh_documents: bool,
    console: Console,
    vocabulary: int | None = None,
    batches: RowBatches | None = None,
) -> Validation | None:
    """The callback that `recipe` asks for, or None; `vocabulary` is how many ids the model has.

    Raises:
        DataError: there is no held-out data, or it is damaged.
    """
    every = recipe.train.validation_steps
    if every is None:
        return None
    run = RunFolder(recipe.run_path)
    if not run.heldout_shard.exists():
        raise DataError(
            f"train.validation_steps={every} measures held-out data, and there is none: name some in data.heldout and "
            "run `longlora prepare`, or set train.validation_steps=null"
        )
    shard = open_shard(run.heldout_shard, tokenizer_sha256, vocabulary=vocabulary)
    rows = PackedDataset(shard, recipe.context.context_length, weigh_documents=weigh_documents)
    return Validation(model, rows, recipe.train.validation_rows, every, run.metrics, console, batches or RowBatches())


def validation_loss(model: LossModel, dataset: PackedDataset, rows: int, batches: RowBatches | None = None) -> float:
    """Mean loss, weighted as in training, over the first `rows` rows with full attention; `model` stays as it was.

    The same on all processes. NaN where nothing is predicted in them.
    """
    batches = batches or RowBatches()
    ranks, device = batches.ranks, model.model.device
    was_training = model.training
    model.eval()
    total = weight = 0.0
    try:
        # Evaluation draws no random numbers; a layer that does all the same must not change the run.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for first in range(0, rows, ranks.data_world):
                own = [dataset[index] for index in [first + ranks.data_rank] if index < rows]
                batch = batches.collate(own)
                batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
                summed, count = model.measure(**batch)
                total, weight = total + summed, weight + count
    finally:
        model.train(was_training)
        free_gathered(model)
    sums = gathered(ranks, (total, weight))
    weight = sum(weight for _, weight in sums)
    return sum(total for total, _ in sums) / weight if weight else math.nan
