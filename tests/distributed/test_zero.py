"""DeepSpeed's ZeRO-2 and ZeRO-3: losses and files of one process, going on on another shard, what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from launch_cases import assert_close, checkpoint_files, copied, launch, losses, prepared_run, settings, trained
from rich.console import Console
from tiny import save_tiny_model

from longlora.artifacts import RunFolder
from longlora.config import Recipe
from longlora.errors import ModelError
from longlora.training.trainer import train
from longlora.training.zero import check_zero

QUIET = Console(quiet=True)
several = pytest.mark.distributed

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def one(folder: Path, tiny_model_folder: Path) -> Recipe:
    """One process, without DeepSpeed; it has all the rows that two have in half as many micro batches."""
    recipe = prepared_run(folder, tiny_model_folder, "one", train__grad_accum_steps=4)
    train(recipe, QUIET)
    return recipe


@pytest.fixture(scope="module")
def zero2(folder: Path, tiny_model_folder: Path) -> Recipe:
    recipe = prepared_run(folder, tiny_model_folder, "zero2", parallel__shard="zero2")
    launched = launch(recipe, launcher="forked")
    assert launched.returncode == 0, launched.stderr
    assert "2 processes that share the model (zero2)" in launched.stdout
    assert "Gradient accumulation steps mismatch" not in launched.stderr
    return recipe


def assert_same_run(found: Recipe, wanted: Recipe) -> None:
    """Losses, adapter, names of files, and the optimizer's states as one process would have them."""
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-5)
    assert_close(trained(found), trained(wanted), 1e-5)
    adapters = [RunFolder(run.run_path).adapter for run in (found, wanted)]
    names = [sorted(path.name for path in adapter.iterdir()) for adapter in adapters]
    assert names[0] == names[1]
    assert settings(adapters[0] / "adapter_config.json") == settings(adapters[1] / "adapter_config.json")
    own = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    assert checkpoint_files(found, 4).keys() - own == checkpoint_files(wanted, 4).keys() - own
    states = [
        torch.load(RunFolder(run.run_path).checkpoints / "checkpoint-4" / "optimizer.pt", weights_only=True)
        for run in (found, wanted)
    ]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, state in states[1]["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(states[0]["state"][index][name], value, rtol=1e-4, atol=1e-6)


@several
def test_zero2_is_one_process(one: Recipe, zero2: Recipe) -> None:
    """LoRA, tied embeddings and norms; two micro batches on each process."""
    assert_same_run(zero2, one)


@several
def test_zero2_resumes_the_same(folder: Path, zero2: Recipe) -> None:
    recipe = copied(zero2, folder / "again", keep_step=2)
    resumed = launch(recipe, verb="resume", launcher="forked")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(recipe) == losses(zero2)
    wanted = trained(zero2)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in trained(recipe).items())


@several
def test_zero3_goes_on_from_zero2_and_one_process_from_zero3(folder: Path, one: Recipe, zero2: Recipe) -> None:
    """A checkpoint does not tell how it was written."""
    recipe = copied(zero2, folder / "three", keep_step=2)
    resumed = launch(recipe, "parallel.shard=zero3", verb="resume", launcher="forked")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(recipe, one)
    longer = copied(recipe, folder / "alone", keep_step=4)
    train(longer.model_copy(update={"train": longer.train.model_copy(update={"steps": 5})}), QUIET, resume=True)
    plain = copied(one, folder / "plain", keep_step=4)
    train(plain.model_copy(update={"train": plain.train.model_copy(update={"steps": 5})}), QUIET, resume=True)
    assert losses(longer) == pytest.approx(losses(plain), rel=1e-5)


@several
def test_zero3_from_the_start_with_memory_levers(folder: Path) -> None:
    """An untied, frozen head, some rows of embeddings, tiled MLPs with LoRA in them, validation; resumed."""
    model = save_tiny_model(folder / "untied", tie_word_embeddings=False)
    changes = {
        "train__mlp_tile_tokens": 40, "adapter__target_modules": "all-linear", "adapter__embedding_rows": "occurring",
        "train__validation_steps": 2,
    }  # fmt: skip
    one = prepared_run(folder, model, "levers", train__grad_accum_steps=4, **changes)
    train(one, QUIET)
    recipe = prepared_run(folder, model, "levers zero3", parallel__shard="zero3", **changes)
    launched = launch(recipe, launcher="forked")
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.count("validation loss") == 3
    assert losses(recipe) == pytest.approx(losses(one), rel=1e-5)
    # Adam makes a step of a gradient that is next to nothing: one weight in LoRA's B is 1e-4 of the largest away.
    assert_close(trained(recipe), trained(one), 1e-3)
    again = copied(recipe, folder / "levers again", keep_step=2)
    assert launch(again, verb="resume", launcher="forked").returncode == 0
    assert losses(again) == losses(recipe)


@several
def test_zero3_trains_a_whole_model(folder: Path, tiny_model_folder: Path) -> None:
    """As accelerate launches it; the recipe itself says nothing of DeepSpeed."""
    one = prepared_run(folder, tiny_model_folder, "whole", adapter__method="full")
    train(one, QUIET)
    recipe = prepared_run(folder, tiny_model_folder, "whole zero3", adapter__method="full", train__grad_accum_steps=1)
    launched = launch(recipe, launcher="accelerate", options=("--use_deepspeed", "--zero_stage", "3"))
    assert launched.returncode == 0, launched.stderr
    assert "parallel.shard=zero3, as accelerate launch asks" in launched.stdout
    assert "2 processes that share the model (zero3)" in launched.stdout
    assert launched.stdout.count("the whole model was written and verified") == 1
    assert losses(recipe) == pytest.approx(losses(one), rel=1e-5)
    assert_close(trained(recipe), trained(one), 1e-4)


@several
def test_zero3_divides_weights_of_4_bits(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    model = save_tiny_model(folder / "wide", hidden_size=128, intermediate_size=256, **heads)
    changes = {"model__dtype": "bfloat16", "model__quantization": "nf4", "train__steps": 2}
    one = prepared_run(folder, model, "nf4", **changes)
    train(one, QUIET)
    recipe = prepared_run(folder, model, "nf4 zero3", train__grad_accum_steps=1, parallel__shard="zero3", **changes)
    launched = launch(recipe, launcher="forked")
    assert launched.returncode == 0, launched.stderr
    assert losses(recipe) == pytest.approx(losses(one), rel=2e-3)
    assert_close(trained(recipe), trained(one), 0.05)


def test_what_is_refused(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder, parallel__shard="zero3")
    eight_bit, norms = (
        recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
        for changes in ({"optimizer": "adamw_8bit"}, {"compile_norms": True})
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: find("json" if name == "deepspeed" else name))
    with pytest.raises(ModelError, match="train.optimizer=adamw_8bit knows no flat parts .* parallel.shard=zero3"):
        check_zero(eight_bit)
    with pytest.raises(ModelError, match="train.compile_norms=true .* parallel.shard=zero3"):
        check_zero(norms)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else find(name))
    with pytest.raises(ModelError, match=r"parallel.shard=zero3 needs the package deepspeed.*longlora\[deepspeed\]"):
        check_zero(recipe)
