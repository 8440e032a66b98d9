"""Sequence parallelism in training: loss and gradients of a step of several processes are those of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sequence_cases
from halo_cases import run_ranks
from launch_cases import assert_close, launch, prepared_run, trained

from longlora.artifacts import RunFolder
from longlora.config import Recipe

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=[(2, 2), (4, 4), (4, 2)], ids=["2 ranks", "4 ranks", "data 2 x sequence 2"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    world, sequence = request.param
    return run_ranks(world, sequence_cases.everything, tmp_path_factory.mktemp("ranks"), sequence, seconds=400)


def test_a_step_is_that_of_one_process(ranks: list[dict[str, Any]]) -> None:
    """float32, through DDP: the loss, every gradient, and the loss that is measured with full attention."""
    errors = {
        (rank, case, what): error
        for rank, found in enumerate(ranks)
        for case, parts in found.items()
        for what, error in parts.items()
    }
    assert len(errors) >= 3 * 10 * len(ranks)
    assert not {place: error for place, error in errors.items() if not error < 1e-5}


# Over the end of an epoch, with a phase of full attention.
SETTINGS = {
    "attention__full_attention_final_fraction": 0.25, "train__micro_batch_size": 2, "train__validation_steps": 2,
    "train__steps": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Recipe:
    """A finished run of one process."""
    recipe = prepared_run(tmp_path_factory.mktemp("alone"), tiny_model_folder, **SETTINGS)
    done = launch(recipe, processes=1, launcher="none", seconds=400)
    assert done.returncode == 0, done.stderr
    return recipe


@pytest.mark.parametrize("shard", ["none", "fsdp2", "zero3"])
def test_a_run_on_two_sequence_ranks_is_that_of_one_process(
    alone: Recipe, tmp_path: Path, tiny_model_folder: Path, shard: str
) -> None:
    """`longlora train` with a cut sequence, and with weights that are divided as well."""
    if shard.startswith("zero"):
        pytest.importorskip("deepspeed")
    changes = {"parallel__sequence": 2, "parallel__shard": shard, "memory": "check"}
    shared = prepared_run(tmp_path, tiny_model_folder, "shared", **SETTINGS | changes)
    done = launch(shared, processes=2, seconds=400, launcher="torchrun" if shard == "none" else "forked")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("training ") == 1, "one process speaks"
    found, wanted = (metrics(recipe) for recipe in (shared, alone))
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for row, truth in zip(found, wanted, strict=True):
        assert row.get("tokens") == truth.get("tokens"), "each real token counts once"
        for name in {"loss", "grad_norm", "validation_loss"} & row.keys():
            assert row[name] == pytest.approx(truth[name], rel=1e-5), (row["step"], name)
    # The optimizer divides by gradients: rounding of small ones shows in the weights of a few steps.
    assert_close(trained(shared), trained(alone), part=1e-3)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"attention__group_size": 96}, "stretches of 64, shorter than group_size=96"),
        ({"parallel__sequence": 3}, "does not divide"),
    ],
    ids=["stretch shorter than a group", "ranks that do not divide"],
)
def test_what_cannot_be_cut_is_refused_before_the_first_step(
    tmp_path: Path, tiny_model_folder: Path, change: dict[str, Any], part: str
) -> None:
    """On every process, with one message."""
    recipe = prepared_run(tmp_path, tiny_model_folder, **{"parallel__sequence": 2, **change})
    done = launch(recipe, processes=2, seconds=300, launcher="forked")
    assert done.returncode != 0
    (line,) = done.ours
    assert part in line
    assert "longlora: rank" not in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("change", [{"train__validation_steps": 2}, {"attention__full_attention_final_fraction": 0.5}])
def test_full_attention_without_a_library_for_it_is_refused_before_the_first_step(
    tmp_path: Path, tiny_model_folder: Path, change: dict[str, Any]
) -> None:
    """On every process, with one message."""
    recipe = prepared_run(tmp_path, tiny_model_folder, parallel__sequence=2, **change)
    done = launch(recipe, processes=2, trouble="no deepspeed:every:0", seconds=300, launcher="forked")
    assert done.returncode != 0
    (line,) = done.ours
    assert line.startswith("longlora: full attention on 2 sequence ranks takes DeepSpeed, and there is no deepspeed")
    assert line.endswith("here: pip install 'longlora[deepspeed]'")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    lines = RunFolder(recipe.run_path).metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
