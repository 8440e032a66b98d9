"""A disk that is full while a checkpoint is written: one line, what was whole stays, and the run goes on from it.

RLIMIT_FSIZE stands for the disk (as in `test_full_disk.py`); where this process may mount, a small tmpfs is one.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_jobs import changed, metric_rows, on_a_full_disk, prepared, result, steps_saved, train_or_resume
from killing import run_whole
from rich.console import Console

from longlora.artifacts import RunFolder, write_atomic
from longlora.config import Recipe, dump_recipe
from longlora.errors import RunFolderError
from longlora.training.checkpoint import newest_checkpoint
from longlora.training.trainer import train

QUIET = Console(quiet=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Recipe:
    recipe = prepared(tmp_path_factory.mktemp("undisturbed"), tiny_model_folder)
    train(recipe, QUIET)
    return recipe


def copied(recipe: Recipe, folder: Path, *, keep_step: int | None) -> Recipe:
    """The run as it was after `keep_step`, or before its first step, in `folder`."""
    shutil.copytree(recipe.run_path, folder)
    run = RunFolder(folder)
    shutil.rmtree(run.adapter)
    for path in run.checkpoints.iterdir():
        if keep_step is None or path.name != f"checkpoint-{keep_step}":
            shutil.rmtree(path)
    moved = changed(recipe, f"run_dir={folder}")
    write_atomic(run.recipe, dump_recipe(moved))
    return moved


def assert_stopped(words: str, recipe: Recipe, left: list[str]) -> None:
    assert words.startswith("RunFolderError: checkpoint-"), words
    assert "cannot be written to" in words
    assert "\n" not in words
    assert steps_saved(recipe) == left


def assert_goes_on_as(recipe: Recipe, undisturbed: Recipe) -> None:
    assert train_or_resume(recipe.run_path) == "done"
    found, wanted = result(recipe), result(undisturbed)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert metric_rows(recipe) == metric_rows(undisturbed)


@pytest.mark.parametrize("part", ["weights", "optimizer", "random states"])
def test_files_that_cannot_grow(undisturbed: Recipe, tmp_path: Path, part: str) -> None:
    """Of the files of checkpoint 4 one is the first that does not fit."""
    recipe = copied(undisturbed, tmp_path / "run", keep_step=2)
    folder = RunFolder(undisturbed.run_path).checkpoints / "checkpoint-4"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    most = {
        "weights": sizes["adapter_model.safetensors"] // 2,
        "optimizer": (sizes["adapter_model.safetensors"] + sizes["optimizer.pt"]) // 2,
        "random states": sizes["rng_state.pth"] - 100,
    }[part]
    said = tmp_path / "said.txt"
    run_whole(on_a_full_disk, (recipe.run_path, most, said))
    assert_stopped(said.read_text(), recipe, ["checkpoint-2"])
    assert_goes_on_as(recipe, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 3 MiB, or none."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("keep_step", [None, 2])
def test_a_disk_that_is_really_full(undisturbed: Recipe, small_disk: Path, keep_step: int | None) -> None:
    """Filled but for half a checkpoint: before the first one, and beside one."""
    recipe = copied(undisturbed, small_disk / "run", keep_step=keep_step)
    folder = RunFolder(undisturbed.run_path).checkpoints / "checkpoint-4"
    half = sum(path.stat().st_size for path in folder.iterdir()) // 2
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - half))
    left = [] if keep_step is None else [f"checkpoint-{keep_step}"]
    assert_stopped(train_or_resume(recipe.run_path), recipe, left)
    if keep_step is None:
        with pytest.raises(RunFolderError, match="no whole checkpoint: start again"):
            newest_checkpoint(RunFolder(recipe.run_path).checkpoints, "adapter_model.safetensors")
    filler.unlink()
    assert_goes_on_as(recipe, undisturbed)
