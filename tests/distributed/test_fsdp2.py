"""FSDP2 on two processes: adapters and whole models, what they save, and going on on another number of processes."""

from __future__ import annotations

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
from tiny import save_tiny_model

from longlora.artifacts import RunFolder
from longlora.config import Recipe
from longlora.training.trainer import train

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]

QUIET = Console(quiet=True)
TWO = {"train__grad_accum_steps": 1, "parallel__shard": "fsdp2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def one(folder: Path, tiny_model_folder: Path) -> Recipe:
    recipe = prepared_run(folder, tiny_model_folder, "one", train__validation_steps=4)
    train(recipe, QUIET)
    return recipe


@pytest.fixture(scope="module")
def sharded(folder: Path, tiny_model_folder: Path) -> tuple[Recipe, Launched]:
    """As accelerate launches it; the recipe itself says nothing of FSDP."""
    recipe = prepared_run(folder, tiny_model_folder, "sharded", train__grad_accum_steps=1, train__validation_steps=4)
    return recipe, launch(recipe, launcher="accelerate", options=("--use_fsdp", "--fsdp_version", "2"))


def test_adapter_of_one_process(one: Recipe, sharded: tuple[Recipe, Launched]) -> None:
    """LoRA, tied embeddings and norms: losses, values, names, types and files."""
    recipe, launched = sharded
    assert launched.returncode == 0, launched.stderr
    assert "parallel.shard=fsdp2, as accelerate launch asks" in launched.stdout
    assert "2 processes that share the model (fsdp2)" in launched.stdout
    assert losses(recipe) == pytest.approx(losses(one), rel=1e-5)
    assert_close(trained(recipe), trained(one), 1e-5)
    folders = [RunFolder(run.run_path).adapter for run in (one, recipe)]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert settings(folders[0] / "adapter_config.json") == settings(folders[1] / "adapter_config.json")
    own = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    assert checkpoint_files(one, 4).keys() - own == checkpoint_files(recipe, 4).keys() - own
    states = [
        torch.load(RunFolder(run.run_path).checkpoints / "checkpoint-4" / "optimizer.pt", weights_only=True)
        for run in (one, recipe)
    ]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[0]["state"].items():
        torch.testing.assert_close(states[1]["state"][index]["exp_avg"], state["exp_avg"], rtol=1e-4, atol=1e-6)


def test_resuming_gives_the_same(folder: Path, sharded: tuple[Recipe, Launched]) -> None:
    recipe = copied(sharded[0], folder / "again", keep_step=2)
    resumed = launch(recipe, "parallel.shard=fsdp2", verb="resume", launcher="forked")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(recipe) == losses(sharded[0])
    wanted = trained(sharded[0])
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in trained(recipe).items())


def test_a_whole_model_goes_on_from_one_process(folder: Path, tiny_model_folder: Path) -> None:
    """Full fine-tuning: from a checkpoint of one process on to the end on two, written and verified by the first."""
    whole = prepared_run(folder, tiny_model_folder, "whole", adapter__method="full")
    train(whole, QUIET)
    recipe = copied(whole, folder / "whole2", keep_step=2)
    resumed = launch(recipe, "parallel.shard=fsdp2", verb="resume", launcher="forked")
    assert resumed.returncode == 0, resumed.stderr
    assert "on 2 instead of 1 processes with rows of their own: 1 instead of 2 micro batches" in resumed.stdout
    assert resumed.stdout.count("the whole model was written and verified") == 1
    assert losses(recipe) == pytest.approx(losses(whole), rel=1e-5)
    assert_close(trained(recipe), trained(whole), 1e-4)


def test_frozen_weights_of_16_bits_beside_trained_ones_of_32(folder: Path) -> None:
    """An untied, frozen head, activation checkpointing and tiled MLPs; two micro batches on each process."""
    model = save_tiny_model(folder / "untied", tie_word_embeddings=False)
    changes = {"model__dtype": "bfloat16", "train__mlp_tile_tokens": 40, "train__steps": 2}
    one = prepared_run(folder, model, "bf16", train__grad_accum_steps=4, **changes)
    train(one, QUIET)
    recipe = prepared_run(folder, model, "bf16 sharded", **{**TWO, "train__grad_accum_steps": 2}, **changes)
    launched = launch(recipe, launcher="forked")
    assert launched.returncode == 0, launched.stderr
    assert losses(recipe) == pytest.approx(losses(one), rel=2e-3)
    assert_close(trained(recipe), trained(one), 0.05)
