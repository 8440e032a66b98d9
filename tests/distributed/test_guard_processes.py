"""Steps that are left out by several processes together, because one of them met a number that is none."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from guard_jobs import (
    assert_equal,
    documents_of,
    logged,
    nan_loss,
    rows_of_step,
    spoil,
)
from launch_cases import assert_close, copied, launch, losses, prepared_run, trained
from rich.console import Console

from longlora.training.trainer import train

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.mark.parametrize("shard", ["none", "fsdp2", "zero2", "zero3"])
def test_a_bad_loss_on_one_process_leaves_the_step_out_on_all(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    """The first step, so that there are no states yet; then as one process does with the same rows, also resumed."""
    if shard.startswith("zero"):
        pytest.importorskip("deepspeed")
    changes = {"train__steps": 3, "train__save_steps": 1, "train__save_total_limit": 9, "train__warmup_steps": 3}
    two = prepared_run(tmp_path, tiny_model_folder, "two", parallel__shard=shard, **changes)
    launched = launch(two, trouble="nan:1:1", launcher="forked")
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
    resumed = launch(again, verb="resume", launcher="forked")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(again) == losses(two)
    assert_equal(trained(again), trained(two))


@pytest.mark.parametrize("shard", ["zero2", "zero3"])
def test_an_infinite_gradient_of_a_good_loss_is_seen_under_zero(
    tmp_path: Path, tiny_model_folder: Path, shard: str
) -> None:
    """DeepSpeed clips by itself, and says the norm afterwards."""
    pytest.importorskip("deepspeed")
    recipe = prepared_run(tmp_path, tiny_model_folder, parallel__shard=shard, train__steps=2, train__save_steps=1)
    launched = launch(recipe, trouble="gradient:1:1", launcher="forked")
    assert launched.returncode == 0, launched.stderr
    (line,) = [line for line in launched.stdout.splitlines() if line.startswith("WARNING: step")]
    assert re.match(r"WARNING: step 1 is left out: gradient norm is (inf|nan), from ", line)
    assert [(row["loss"] is None, row["skipped_steps"]) for row in logged(recipe)] == [(True, 1), (False, 0)]
    assert all(tensor.isfinite().all() for tensor in trained(recipe).values())


def test_ranks_that_share_a_row_leave_it_out_together(tmp_path: Path, tiny_model_folder: Path) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder, parallel__sequence=2)
    launched = launch(recipe, trouble="nan:1:2", launcher="forked")
    assert launched.returncode == 0, launched.stderr
    (line,) = [line for line in launched.stdout.splitlines() if line.startswith("WARNING: step")]
    named = documents_of(recipe, rows_of_step(recipe, 2))
    assert line.startswith(f"WARNING: step 2 is left out: loss is nan on rank 1, in {named}; ")
    assert [row["loss"] is None for row in logged(recipe)] == [False, True, False, False]
    assert [row["unlabelled_batches"] for row in logged(recipe)] == [0, 0, 0, 0]
    shutil.rmtree(recipe.run_path)
