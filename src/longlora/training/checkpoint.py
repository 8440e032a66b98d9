"""Checkpoints that count only when they are whole, and finding the newest of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from longlora.artifacts import verify_manifest, write_manifest
from longlora.errors import RunFolderError

_PREFIX = "checkpoint-"


def complete_checkpoint(folder: Path, *, keep: int) -> None:
    """Mark `folder` as whole by its manifest, then remove all but the newest `keep` checkpoints beside it."""
    write_manifest(folder, schema=1, step=_step(folder))
    for old in list(_newest_first(folder.parent))[keep:]:
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


def _newest_first(folder: Path) -> Iterator[Path]:
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and path.name[len(_PREFIX) :].isdigit()]
    yield from sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))
