"""Runs in which some steps are spoiled, and what came of them, for the tests of `longlora.training.guard`.

Rows are spoiled by their numbers, so that a run that is resumed meets the same.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from longlora.artifacts import RunFolder
from longlora.config import Recipe
from longlora.data.order import RowOrder
from longlora.data.packing import PackedDataset
from longlora.data.shards import open_shard
from longlora.training.loss_model import LossModel
from longlora.training.trainer import train

Spoil = Callable[[Tensor], Tensor]


class BadGradient(torch.autograd.Function):
    """The loss as it is, and a gradient that is infinite."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return upstream[0] * math.inf


def nan_loss(loss: Tensor) -> Tensor:
    return loss * math.nan


def bad_gradient(loss: Tensor) -> Tensor:
    return BadGradient.apply(loss)  # type: ignore[no-untyped-call, no-any-return]


def infinite_loss_alone(loss: Tensor) -> Tensor:
    """Its gradient is a number."""
    return loss + math.inf


def spoil(patch: pytest.MonkeyPatch, rows: Collection[int], how: Spoil) -> None:
    """Put `how` on the loss of the micro batches with one of `rows`."""
    forward = LossModel.forward

    def spoiled(self: LossModel, *args: Any, **inputs: Any) -> dict[str, Tensor]:
        outputs = forward(self, *args, **inputs)
        return {"loss": how(outputs["loss"])} if set(inputs["stretch"].rows) & set(rows) else outputs

    patch.setattr(LossModel, "forward", spoiled)


def rows_of_step(recipe: Recipe, step: int) -> list[int]:
    """Of one process, in a run whose first epoch is not over, with one row in a micro batch."""
    size = recipe.train.grad_accum_steps
    return [row for (row,) in RowOrder(14, 1, recipe.train.seed)][(step - 1) * size : step * size]


def documents_of(recipe: Recipe, rows: list[int]) -> str:
    """As a message names them."""
    dataset = PackedDataset(open_shard(RunFolder(recipe.run_path).train_shard, None), 128)
    assert len(dataset) == 14
    return ", ".join(dict.fromkeys(name for row in rows for name in dataset.documents(row)))


def logged(recipe: Recipe) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, which is to be JSON without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = RunFolder(recipe.run_path).metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def spoken(recipe: Recipe, **options: Any) -> list[str]:
    """Train; the warnings that were printed."""
    out = io.StringIO()
    train(recipe, Console(file=out, width=1000), **options)
    return [line for line in out.getvalue().splitlines() if line.startswith("WARNING")]


def checkpoint(recipe: Recipe, step: int) -> Path:
    return RunFolder(recipe.run_path).checkpoints / f"checkpoint-{step}"


def saved_weights(recipe: Recipe, step: int) -> dict[str, Tensor]:
    return load_file(checkpoint(recipe, step) / "adapter_model.safetensors")


def optimizer_states(recipe: Recipe, step: int) -> dict[int, dict[str, Tensor]]:
    states = torch.load(checkpoint(recipe, step) / "optimizer.pt", weights_only=True)["state"]
    assert isinstance(states, dict)
    return states


def assert_equal(found: dict[Any, Tensor], wanted: dict[Any, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
