"""Checkpoints that count only when they are whole, and finding the newest of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from longlora.artifacts import MANIFEST, read_json, verify_manifest, write_manifest
from longlora.errors import RunFolderError
from longlora.storage import sync

_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Batches:
    """How the rows of a step are cut up: micro batches of `rows`, `steps` of them one after the other on each of
    `processes` that have rows of their own."""

    rows: int
    steps: int
    processes: int

    def on(self, processes: int) -> Batches:
        """The same rows in a step, on another number of processes.

        Raises:
            RunFolderError: they cannot be divided among these.
        """
        micro_batches = self.steps * self.processes
        if micro_batches % processes:
            fitting = [number for number in range(1, micro_batches + 1) if micro_batches % number == 0]
            raise RunFolderError(
                f"the run has {micro_batches} micro batches in a step ({self.steps} on each of {self.processes} "
                f"processes), which {processes} processes cannot share evenly: resume on one of "
                f"{', '.join(map(str, fitting))} processes with rows of their own, so that steps have the same rows"
            )
        return Batches(self.rows, micro_batches // processes, processes)


def complete_checkpoint(folder: Path, *, keep: int, batches: Batches | None = None) -> None:
    """Mark `folder` as whole by its manifest, then remove all others beside it but the newest `keep` - 1 whole ones.

    `batches` are said in the manifest: a run that goes on needs steps of as many rows.
    """
    facts = {} if batches is None else {"batches": asdict(batches)}
    write_manifest(folder, schema=1, step=checkpoint_step(folder), **facts)
    sync([folder.parent])  # before older ones are removed
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


def batches_of(folder: Path) -> Batches | None:
    """What a whole checkpoint says of the rows of its steps; None if it is of one process and from before they did."""
    found = read_json(folder / MANIFEST, "the checkpoint is damaged").get("batches")
    return None if found is None else Batches(**{name: int(found[name]) for name in ("rows", "steps", "processes")})


def has_whole_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint in `folder` that says it is whole."""
    return any((path / MANIFEST).exists() for path in _newest_first(folder))


def _newest_first(folder: Path) -> Iterator[Path]:
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and path.name[len(_PREFIX) :].isdigit()]
    yield from sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(folder: Path) -> int:
    """Optimizer steps done in a checkpoint, from its name."""
    return int(folder.name.removeprefix(_PREFIX))
