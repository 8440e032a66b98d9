"""Checkpoints that count only when they are whole, and finding the newest of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from longlora.artifacts import MANIFEST, verify_manifest, write_manifest
from longlora.errors import RunFolderError

_PREFIX = "checkpoint-"


def complete_checkpoint(folder: Path, *, keep: int) -> None:
    """Mark `folder` as whole by its manifest, then remove all others beside it but the newest `keep` - 1 whole ones."""
    write_manifest(folder, schema=1, step=checkpoint_step(folder))
    others = [path for path in _newest_first(folder.parent) if path != folder]
    whole = [path for path in others if (path / MANIFEST).exists()]
    for old in others:
        if old not in whole[: keep - 1]:
            shutil.rmtree(old)


def newest_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint in `folder`, and one line for each newer one that was passed over.

    Raises:
        RunFolderError: there is none.
    """
    passed_over = []
    for candidate in _newest_first(folder):
        try:
            verify_manifest(candidate, "passed over")
        except RunFolderError as error:
            passed_over.append(str(error))
            continue
        return candidate, passed_over
    found = f" ({'; '.join(passed_over)})" if passed_over else ""
    raise RunFolderError(f"{folder} holds no whole checkpoint{found}: start again with `longlora train`")


def has_whole_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint in `folder` that says it is whole."""
    return any((path / MANIFEST).exists() for path in _newest_first(folder))


def _newest_first(folder: Path) -> Iterator[Path]:
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and path.name[len(_PREFIX) :].isdigit()]
    yield from sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(folder: Path) -> int:
    """Optimizer steps done in a checkpoint, from its name."""
    return int(folder.name.removeprefix(_PREFIX))
