"""`torchrun -m longlora train`, data parallel on two processes: what it computes, says, saves, and how it fails."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path

import pytest
import torch
from launch_cases import (
    Launched,
    assert_close,
    checkpoint_files,
    copied,
    launch,
    losses,
    prepared_run,
    settings,
    trained,
)
from rich.console import Console

from longlora.artifacts import RunFolder
from longlora.config import Recipe
from longlora.training.trainer import train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

VALIDATED = {"train__validation_steps": 2, "train__validation_rows": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def one(folder: Path, tiny_model_folder: Path) -> Recipe:
    """One process, 4 steps of 2 micro batches; 14 rows, so that the first epoch is not over."""
    recipe = prepared_run(folder, tiny_model_folder, "one", **VALIDATED)
    train(recipe, Console(quiet=True))
    return recipe


@pytest.fixture(scope="module")
def two(folder: Path, tiny_model_folder: Path) -> tuple[Recipe, Launched]:
    """Two processes, 4 steps of 1 micro batch each."""
    recipe = prepared_run(folder, tiny_model_folder, "two", train__grad_accum_steps=1, **VALIDATED)
    return recipe, launch(recipe)


def validation_losses(recipe: Recipe) -> dict[int, float]:
    rows = map(json.loads, RunFolder(recipe.run_path).metrics.read_text().splitlines())
    return {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}


def test_two_processes_compute_what_one_does(one: Recipe, two: tuple[Recipe, Launched]) -> None:
    """Losses normalised by the labels of all, gradients, the optimizer, the validation loss and the count of tokens."""
    recipe, launched = two
    assert launched.returncode == 0, launched.stderr
    assert len(losses(recipe)) == 4
    assert losses(recipe) == pytest.approx(losses(one), rel=1e-5)
    assert validation_losses(recipe).keys() == {0, 2, 4}
    assert validation_losses(recipe) == pytest.approx(validation_losses(one), rel=1e-5)
    assert_close(trained(recipe), trained(one))
    tokens = [
        [json.loads(line).get("tokens") for line in RunFolder(run.run_path).metrics.read_text().splitlines()]
        for run in (one, recipe)
    ]
    assert tokens[0] == tokens[1]


def test_the_result_has_the_files_of_one_process(one: Recipe, two: tuple[Recipe, Launched]) -> None:
    folders = [RunFolder(run.run_path).adapter for run in (one, two[0])]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    for name in ("adapter_config.json", "longlora.json"):
        assert settings(folders[0] / name) == settings(folders[1] / name)
    files = checkpoint_files(two[0], 4)
    assert {"rng_state_0.pth", "rng_state_1.pth"} < files.keys()
    assert files.keys() - {"rng_state_0.pth", "rng_state_1.pth"} == checkpoint_files(one, 4).keys() - {"rng_state.pth"}


def test_one_process_speaks(two: tuple[Recipe, Launched]) -> None:
    out = two[1].stdout
    for line in (r"training [\d,]+ parameters", "attention in training", "step 3/4", "step 2: validation", "adapter: "):
        assert len(re.findall(line, out)) == 1, out
    assert "on cpu, 2 processes" in out
    assert two[1].stderr.count("S2-Attn backend: grouped (float32 on cpu)") == 1, two[1].stderr
    assert "Warning" not in two[1].stderr


def test_one_process_goes_on_where_two_stopped(folder: Path, two: tuple[Recipe, Launched]) -> None:
    """The same rows in the same order, the optimizer's states too."""
    recipe = copied(two[0], folder / "fewer", keep_step=2)
    out = io.StringIO()
    train(recipe, Console(file=out, width=400), resume=True)
    assert (
        "on 1 instead of 2 processes with rows of their own: 2 instead of 1 micro batches in a step on each, so that "
        "steps have the same rows in the same order" in out.getvalue()
    )
    assert losses(recipe) == pytest.approx(losses(two[0]), rel=1e-5)
    assert_close(trained(recipe), trained(two[0]))


def test_interrupted_killed_and_resumed_gives_the_same(
    folder: Path, tiny_model_folder: Path, two: tuple[Recipe, Launched]
) -> None:
    """A signal to one process stops all, with a checkpoint; one that is killed in a step ends the job."""
    recipe = prepared_run(folder, tiny_model_folder, "stopped", train__grad_accum_steps=1, **VALIDATED)

    interrupted = launch(recipe, trouble="signal:1:1")
    assert interrupted.returncode != 0
    assert interrupted.ours == ["longlora: interrupted by SIGTERM; step 1 is saved, `longlora resume` goes on from it"]
    assert "rng_state_1.pth" in checkpoint_files(recipe, 1)

    clock = folder / "killed at"
    killed = launch(recipe, verb="resume", trouble="killed:1:3", environment={"TROUBLE_CLOCK": str(clock)})
    assert time.time() - float(clock.read_text()) < 60
    assert killed.returncode != 0
    assert "going on from" in killed.stdout
    (ours,) = killed.ours
    assert ours.startswith("longlora: rank 0: lost contact with rank 1, which ended without a word (killed")
    assert re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9", killed.stderr), "the launcher names it too"
    assert "site-packages/torch/distributed/distributed_c10d" not in killed.stderr, "no traceback of the connection"
    assert {path.name for path in RunFolder(recipe.run_path).checkpoints.iterdir()} == {"checkpoint-1", "checkpoint-2"}

    resumed = launch(recipe, verb="resume")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(recipe) == losses(two[0])
    wanted = trained(two[0])
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in trained(recipe).items())


def test_processes_with_different_recipes_are_refused(folder: Path, tiny_model_folder: Path) -> None:
    recipe = prepared_run(folder, tiny_model_folder, "differ", train__grad_accum_steps=1)
    refused = launch(recipe, trouble="recipe:1:0")
    assert refused.ours == [
        "longlora: rank 1 would train something else than rank 0: train.learning_rate is 0.5 there and 0.003 on rank "
        "0; start all processes with the same recipe, data and base model"
    ]
    other_data = launch(recipe, trouble="data:1:0")
    (ours,) = other_data.ours
    assert "training data (manifest) is 000000000000 there and" in ours
    assert not RunFolder(recipe.run_path).metrics.exists()


@pytest.mark.parametrize("store_of", ["launcher", "rank 0"])
def test_the_first_error_comes_first(folder: Path, tiny_model_folder: Path, store_of: str) -> None:
    """And who only lost contact says nothing else before it, or after it more than a line."""
    recipe = prepared_run(folder, tiny_model_folder, f"failing, store of {store_of}", train__grad_accum_steps=1)
    environment = {} if store_of == "launcher" else {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    failed = launch(recipe, trouble="error:1:2", environment=environment)
    assert failed.returncode != 0
    assert failed.ours[0] == "longlora: rank 1: this process has an error of its own"
    assert all("lost contact with the others" in line for line in failed.ours[1:])
    assert len(failed.ours) <= 2
    assert failed.stderr.index("error of its own") < failed.stderr.index("ChildFailedError")
    assert "Traceback" not in failed.stderr[: failed.stderr.index("error of its own")]


def test_a_loss_that_is_no_number_on_one_process_stops_all(folder: Path, tiny_model_folder: Path) -> None:
    recipe = prepared_run(folder, tiny_model_folder, "nan", train__grad_accum_steps=1, train__max_skipped_steps=0)
    failed = launch(recipe, trouble="nan:1:1")
    (ours,) = failed.ours
    assert ours.startswith("longlora: step 1: loss is nan on rank 1, in ")
    assert "train.max_skipped_steps=0; there is no whole checkpoint yet; train without these documents" in ours
    assert not list(RunFolder(recipe.run_path).checkpoints.glob("*"))
