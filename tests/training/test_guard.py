"""Steps that must not reach the weights: which are left out, what is said of them, and that a run goes on as it should.

Rows are spoiled by their numbers, so that a run that is resumed meets the same.
"""

from __future__ import annotations

import io
import json
import math
import random
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_cases import assert_close, copied, launch, losses, prepared_run, trained
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from longlora.artifacts import RunFolder
from longlora.config import Recipe
from longlora.data.order import RowOrder
from longlora.data.packing import IGNORE_INDEX, PackedDataset, collate
from longlora.data.shards import open_shard
from longlora.data.stretches import StretchCollator
from longlora.errors import ModelError
from longlora.evaluation.report.training_log import read_training
from longlora.training import trainer
from longlora.training.distributed import Ranks
from longlora.training.guard import SpikeWatch, StepGuard
from longlora.training.loss_model import LossModel
from longlora.training.trainer import train

pytestmark = [pytest.mark.usefixtures("one_thread")]

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


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (nan_loss, "loss is nan, in {bad}"),
        (infinite_loss_alone, "loss is inf, in {bad}"),
        (bad_gradient, "gradient norm is nan, from {all}"),
    ],
)
def test_a_bad_step_is_left_out(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, how: Spoil, reason: str
) -> None:
    """With weight decay, a rate that still rises, and the bad micro batch before a good one of the same step."""
    recipe = prepared_run(
        tmp_path, tiny_model_folder, train__save_steps=1, train__weight_decay=0.1, train__warmup_steps=4,
        train__save_total_limit=4,
    )  # fmt: skip
    rows = rows_of_step(recipe, 3)
    spoil(monkeypatch, rows[:1], how)
    (warning,) = spoken(recipe)
    named = reason.format(bad=documents_of(recipe, rows[:1]), all=documents_of(recipe, rows))
    assert warning == (
        f"WARNING: step 3 is left out: {named}; weights and optimizer stay as they were "
        "(1 of train.max_skipped_steps=3)"
    )
    assert_equal(saved_weights(recipe, 3), saved_weights(recipe, 2))
    before, after = optimizer_states(recipe, 2), optimizer_states(recipe, 3)
    assert before.keys() == after.keys()
    for index, state in before.items():
        assert_equal(after[index], state)
    assert all(tensor.isfinite().all() for tensor in trained(recipe).values())

    found = logged(recipe)
    assert [row["skipped_steps"] for row in found] == [0, 0, 1, 0]
    assert found[2]["loss"] is None
    assert all(row["loss"] > 1 for row in (found[0], found[1], found[3])), "the sum for the log is mended"
    assert (found[2]["grad_norm"] is None) == (how is not infinite_loss_alone)
    assert [row["learning_rate"] for row in found] == pytest.approx([0, 0.003 / 4, 0.003 / 2, 0.003 * 3 / 4])
    history = json.loads((checkpoint(recipe, 4) / "trainer_state.json").read_text())["log_history"]
    assert [row["loss"] for row in history] == [row["loss"] for row in found]
    assert [row.step for row in read_training(RunFolder(recipe.run_path))] == [1, 2, 4]


def test_gradients_that_are_not_clipped_are_seen_as_well(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder)
    original = trainer.training_arguments

    def unclipped(*args: Any, **options: Any) -> Any:
        arguments = original(*args, **options)
        arguments.max_grad_norm = 0
        return arguments

    monkeypatch.setattr(trainer, "training_arguments", unclipped)
    spoil(monkeypatch, rows_of_step(recipe, 2)[1:], bad_gradient)
    (warning,) = spoken(recipe)
    assert "step 2 is left out: gradient norm is nan" in warning
    assert all(tensor.isfinite().all() for tensor in trained(recipe).values())


def test_more_bad_steps_than_are_borne_stop_the_run(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a resume comes in between; and a higher limit goes on."""
    recipe = prepared_run(tmp_path, tiny_model_folder, train__max_skipped_steps=1)
    spoil(monkeypatch, [rows_of_step(recipe, 2)[0], rows_of_step(recipe, 3)[1]], nan_loss)
    last = checkpoint(recipe, 2)
    named = documents_of(recipe, rows_of_step(recipe, 3)[1:])
    with pytest.raises(ModelError) as stopped:
        train(recipe, Console(quiet=True))
    assert str(stopped.value) == (
        f"step 3: loss is nan, in {named}; it was not taken; steps left out before: 1, train.max_skipped_steps=1; "
        f"the last whole checkpoint is {last}; train without these documents or with a lower train.learning_rate "
        "(now 0.003) in another run_dir, or resume with a higher train.max_skipped_steps"
    )
    assert all(tensor.isfinite().all() for tensor in saved_weights(recipe, 2).values())
    with pytest.raises(ModelError, match="left out before: 1"):
        train(recipe, Console(quiet=True), resume=True)
    more = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_skipped_steps": 2})})
    assert "(2 of train.max_skipped_steps=2)" in spoken(more, resume=True)[0]


def test_zero_stops_at_the_first(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder, train__max_skipped_steps=0)
    spoil(monkeypatch, rows_of_step(recipe, 1), nan_loss)
    with pytest.raises(ModelError, match=r"step 1: loss is nan, .* before: 0, .* there is no whole checkpoint"):
        train(recipe, Console(quiet=True))
    assert not RunFolder(recipe.run_path).adapter.exists()


def test_a_run_resumed_after_bad_steps_is_the_uninterrupted_one(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is bad, so that the first checkpoint has no states; rows of the log are means of three steps."""
    changes = {
        "train__steps": 6, "train__save_steps": 1, "train__save_total_limit": 9, "train__logging_steps": 3,
        "train__warmup_steps": 5,
    }  # fmt: skip
    whole = prepared_run(tmp_path, tiny_model_folder, "whole", **changes)
    spoil(monkeypatch, [rows_of_step(whole, 1)[0], rows_of_step(whole, 5)[1]], nan_loss)
    train(whole, Console(quiet=True))
    assert optimizer_states(whole, 1) == {}
    counted = ("step", "loss", "grad_norm", "learning_rate", "tokens", "skipped_steps")
    wanted = [[row[name] for name in counted] for row in logged(whole)]
    assert [row[-1] for row in wanted] == [1, 1]
    for step in (1, 5):
        again = copied(whole, tmp_path / f"from {step}", keep_step=step)
        train(again, Console(quiet=True), resume=True)
        assert_equal(trained(again), trained(whole))
        assert [[row[name] for name in counted] for row in logged(again)] == wanted


def test_a_row_of_the_log_is_the_mean_of_the_steps_that_were_taken(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = prepared_run(tmp_path, tiny_model_folder, "each")
    pairs = prepared_run(tmp_path, tiny_model_folder, "pairs", train__logging_steps=2)
    spoil(monkeypatch, rows_of_step(each, 3)[1:], nan_loss)
    train(each, Console(quiet=True))
    train(pairs, Console(quiet=True))
    single = [row["loss"] for row in logged(each)]
    assert [row["loss"] for row in logged(pairs)] == pytest.approx([(single[0] + single[1]) / 2, single[3]], rel=1e-6)
    assert [row["skipped_steps"] for row in logged(pairs)] == [0, 1]


def ignore_labels(patch: pytest.MonkeyPatch, rows: Collection[int]) -> None:
    """As an example whose answer is empty."""
    get = PackedDataset.__getitem__

    def emptied(self: PackedDataset, index: int) -> dict[str, Tensor]:
        item = get(self, index)
        return item | {"labels": torch.full_like(item["labels"], IGNORE_INDEX)} if index in rows else item

    patch.setattr(PackedDataset, "__getitem__", emptied)


def test_micro_batches_without_labels_are_counted_and_said_once(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder)
    empty = [rows_of_step(recipe, 2)[0], rows_of_step(recipe, 4)[1]]
    ignore_labels(monkeypatch, empty)
    (warning,) = spoken(recipe)
    assert warning == (
        f"WARNING: step 2 predicts nothing in 1 of 2 micro batches, of {documents_of(recipe, empty[:1])}; they teach "
        "nothing; metrics.jsonl counts such in unlabelled_batches, and this is said once"
    )
    assert [row["unlabelled_batches"] for row in logged(recipe)] == [0, 1, 0, 1]
    assert [row["skipped_steps"] for row in logged(recipe)] == [0, 0, 0, 0]
    assert all(row["loss"] > 1 for row in logged(recipe)), "mean over the labels there are"


def test_a_step_without_labels_is_left_out_and_is_not_bad(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam would go on with its momentum, and weights would decay."""
    recipe = prepared_run(
        tmp_path, tiny_model_folder, train__save_steps=1, train__max_skipped_steps=0, train__weight_decay=0.1,
        train__save_total_limit=4,
    )  # fmt: skip
    ignore_labels(monkeypatch, rows_of_step(recipe, 2))
    (warning,) = spoken(recipe)
    assert "step 2 predicts nothing in 2 of 2 micro batches" in warning
    assert "the step is left out" in warning
    assert_equal(saved_weights(recipe, 2), saved_weights(recipe, 1))
    found = logged(recipe)
    assert [(row["skipped_steps"], row["unlabelled_batches"]) for row in found] == [(0, 0), (1, 2), (0, 0), (0, 0)]
    assert [row["loss"] is None for row in found] == [False, True, False, False]


def spikes(values: list[float]) -> list[int]:
    """Which of `values` are said to be spikes."""
    watch = SpikeWatch()
    return [index for index, value in enumerate(values) if watch.above(value) is not None]


def test_a_spike_is_said_once_and_a_smooth_curve_has_none() -> None:
    noise = random.Random(3)
    print("seed 3")
    smooth = [2 + 2 * math.exp(-step / 40) + noise.gauss(0, 0.05) for step in range(400)]
    assert spikes(smooth) == []
    assert spikes([3.0] * 100) == []
    assert spikes([3.0 - 0.001 * step for step in range(100)]) == []
    one = [*smooth[:200], 7.0, 6.0, 5.0, *smooth[200:]]
    assert spikes(one) == [200]
    assert spikes([*one, 9.0]) == [200, 403]
    assert spikes([3.0] * 7 + [9.0]) == [], "too few to compare with"
    assert spikes([3.0] * 8 + [9.0]) == [8]
    assert spikes([3.0] * 20 + [3.2]) == [], "a deviation is no less than a part of the median"
    assert spikes([3.0] * 20 + [9.0] * 60 + [18.0]) == [20, 80], "a new level is a level"


def test_a_spike_is_told_with_what_to_do(tmp_path: Path, tiny_model_folder: Path) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder)
    dataset = PackedDataset(open_shard(RunFolder(recipe.run_path).train_shard, None), 128)
    out = io.StringIO()
    guard = StepGuard(dataset, Ranks(), Console(file=out, width=400), recipe)
    for step in range(1, 12):
        guard.logged({"loss": 2.0 if step < 10 else 8.0, "grad_norm": 1.0}, step)
    (line,) = out.getvalue().splitlines()
    assert line == (
        "WARNING: loss spike in step 10: 8.0000, and 2.0000 is the median of the last steps; if it does not come back, "
        "train in another run_dir with a lower train.learning_rate (now 0.003) or more train.warmup_steps (now 0)"
    )


def test_batches_know_their_documents(tmp_path: Path, tiny_model_folder: Path) -> None:
    """A piece of a document is named with its tokens; padding rows have no number."""
    recipe = prepared_run(tmp_path, tiny_model_folder)
    dataset = PackedDataset(open_shard(RunFolder(recipe.run_path).train_shard, None), 400)
    assert dataset.documents(0) == ["0 (document 0, tokens 0-399)"]
    rest = [name for row in range(len(dataset)) for name in dataset.documents(row) if name.startswith("3 ")]
    length = len(dataset.shard.document(3))
    assert sorted(rest) == ["3 (document 3, tokens 0-399)", f"3 (document 3, tokens 400-{length - 1})"]
    whole = PackedDataset(dataset.shard, 1000)
    assert whole.documents(1) == ["2 (document 2)", "3 (document 3)"]

    rows = [dataset[3], dataset[1]]
    assert "row" not in collate(rows, 0)
    for rank in range(2):
        assert StretchCollator(0, rank, 2, weighted=False)(rows)["stretch"].rows == (3, 1)
    assert StretchCollator(0, 0, 2, weighted=False)([])["stretch"].rows == ()


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shard", ["none", "fsdp2", "zero2", "zero3"])
def test_a_bad_loss_on_one_process_leaves_the_step_out_on_all(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    """The first step, so that there are no states yet; then as one process does with the same rows, also resumed."""
    if shard.startswith("zero"):
        pytest.importorskip("deepspeed")
    changes = {"train__steps": 3, "train__save_steps": 1, "train__save_total_limit": 9, "train__warmup_steps": 3}
    two = prepared_run(tmp_path, tiny_model_folder, "two", parallel__shard=shard, **changes)
    launched = launch(two, trouble="nan:1:1")
    assert launched.returncode == 0, launched.stderr
    one = prepared_run(tmp_path, tiny_model_folder, "one", train__grad_accum_steps=4, **changes)
    bad = rows_of_step(one, 1)[1::2]
    (line,) = [line for line in launched.stdout.splitlines() if line.startswith("WARNING: step")]
    assert line.startswith(f"WARNING: step 1 is left out: loss is nan on rank 1, in {documents_of(one, bad)}; ")

    spoil(monkeypatch, bad, nan_loss)
    train(one, Console(quiet=True))
    found, wanted = logged(two), logged(one)
    assert [row["loss"] is None for row in found] == [True, False, False]
    assert [row["loss"] for row in found[1:]] == pytest.approx([row["loss"] for row in wanted[1:]], rel=1e-5)
    assert [row["learning_rate"] for row in found] == [row["learning_rate"] for row in wanted]
    assert_close(trained(two), trained(one), 1e-4)

    again = copied(two, tmp_path / "again", keep_step=1)
    resumed = launch(again, verb="resume")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(again) == losses(two)
    assert_equal(trained(again), trained(two))


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_ranks_that_share_a_row_leave_it_out_together(tmp_path: Path, tiny_model_folder: Path) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder, parallel__sequence=2)
    launched = launch(recipe, trouble="nan:1:2")
    assert launched.returncode == 0, launched.stderr
    (line,) = [line for line in launched.stdout.splitlines() if line.startswith("WARNING: step")]
    named = documents_of(recipe, rows_of_step(recipe, 2))
    assert line.startswith(f"WARNING: step 2 is left out: loss is nan on rank 1, in {named}; ")
    assert [row["loss"] is None for row in logged(recipe)] == [False, True, False, False]
    assert [row["unlabelled_batches"] for row in logged(recipe)] == [0, 0, 0, 0]
    shutil.rmtree(recipe.run_path)
