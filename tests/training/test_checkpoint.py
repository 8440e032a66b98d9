"""When a checkpoint counts, and which older ones go: never the last whole one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from checkpoint_jobs import FILES, complete, made

from longlora.artifacts import MANIFEST, has_manifest_sizes
from longlora.errors import RunFolderError
from longlora.model.adapters import ADAPTER_WEIGHTS
from longlora.training import checkpoint as checkpoints
from longlora.training.checkpoint import newest_checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("damaged", [(), (2,), (4,), (2, 4), (6,)])
def test_whatever_is_damaged_a_whole_checkpoint_is_always_there(
    tmp_path: Path, keep: int, damaged: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each file operation of a save: killed there, a run finds a whole one, the newest if it is there."""
    for step in (2, 4, 6):
        complete(made(tmp_path, step), keep=3)
    for step in damaged:
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"1")
    last = newest_checkpoint(tmp_path, ADAPTER_WEIGHTS)[0]
    found = []
    remove = checkpoints._remove

    def watched(folder: Path) -> None:
        found.append(newest_checkpoint(tmp_path, ADAPTER_WEIGHTS)[0].name)
        remove(folder)
        found.append(newest_checkpoint(tmp_path, ADAPTER_WEIGHTS)[0].name)

    monkeypatch.setattr(checkpoints, "_remove", watched)
    step = 6 if 6 in damaged else 8  # the run that passed 6 over comes to it again
    complete(made(tmp_path, step), keep=keep)
    assert set(found) <= {last.name, f"checkpoint-{step}"}
    assert newest_checkpoint(tmp_path, ADAPTER_WEIGHTS) == (tmp_path / f"checkpoint-{step}", [])
    whole = [name for name in names(tmp_path) if has_manifest_sizes(tmp_path / name)]
    assert whole == names(tmp_path), "nothing damaged and nothing half is left"
    assert len(whole) == min(keep, 1 + len({2, 4, 6} - {*damaged, step}))


def test_newer_ones_that_were_passed_over_do_not_push_out_older_whole_ones(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        complete(made(tmp_path, step), keep=9)
    for step in (6, 8):
        path = tmp_path / f"checkpoint-{step}" / "optimizer.pt"
        path.write_bytes(b"54321")  # the size is right
    complete(made(tmp_path, 5), keep=2)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


def test_a_save_that_lacks_a_state_does_not_count_and_removes_nothing(tmp_path: Path) -> None:
    complete(made(tmp_path, 2), keep=1)
    with pytest.raises(RunFolderError, match=r"lacks rng_state_0.pth, rng_state_1.pth of 2 processes: run_dir must be"):
        complete(made(tmp_path, 4), keep=1, processes=2)
    with pytest.raises(RunFolderError, match=r"lacks model.safetensors of 1 processes"):
        complete(made(tmp_path, 6), weights="model.safetensors", keep=1)
    assert newest_checkpoint(tmp_path, ADAPTER_WEIGHTS) == (tmp_path / "checkpoint-2", [])


def test_nothing_is_removed_before_what_was_written_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file, then the manifest, then the name; then older ones go."""
    complete(made(tmp_path, 2), keep=1)
    order: list[str] = []
    fsync, rename, rmtree = os.fsync, Path.replace, shutil.rmtree

    def synced(descriptor: int) -> None:
        order.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().relative_to(tmp_path)}")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> Path:
        order.append(f"rename to {Path(target).relative_to(tmp_path)}")
        return rename(source, target)

    def removed(path: Path, **options: object) -> None:
        order.append(f"remove {Path(path).relative_to(tmp_path)}")
        rmtree(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    complete(made(tmp_path, 4), keep=1)
    aside = ".saving/checkpoint-4"
    marked = order.index(f"rename to {aside}/{MANIFEST}")
    assert {f"sync {aside}/{name}" for name in FILES} <= set(order[:marked])
    assert order[marked:] == [
        f"rename to {aside}/{MANIFEST}", f"sync {aside}", "rename to checkpoint-4", "remove .saving", "sync .",
        "remove checkpoint-2",
    ]  # fmt: skip


def test_one_that_cannot_be_removed_is_said_and_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    complete(made(tmp_path, 2), keep=1)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)
    complete(made(tmp_path, 4), keep=1)
    assert "checkpoint-2 cannot be removed as a whole" in caplog.text
    assert not (tmp_path / "checkpoint-2" / MANIFEST).exists()


def test_steps_are_numbers_and_not_names(tmp_path: Path) -> None:
    """As names, 10 comes before 8 and 9."""
    for step in (8, 9, 10):
        complete(made(tmp_path, step), keep=2)
        assert newest_checkpoint(tmp_path, ADAPTER_WEIGHTS) == (tmp_path / f"checkpoint-{step}", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    complete(made(tmp_path, 11), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]
