"""Checkpoints that are complete or absent, and finding the newest of them.

A checkpoint is written aside, into ``checkpoints/.saving/``. Its files are brought to the disk, then its manifest is
(names, sizes, sha256, and what the run was), then one rename gives it its name; only when that is on the disk too are
older ones removed. The manifest alone tells half a checkpoint from a whole one. The rename adds that other programs,
which know of no manifest, never see half of one; that a damaged one is replaced as a whole by a run that passed it over
and comes to its step again; and that nothing a killed save left, such as random states of more processes than there
are now, gets into the next one.

A run that cannot save stops: a disk that has no room for a checkpoint will have none for the result.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longlora.artifacts import MANIFEST, has_manifest_sizes, read_json, verify_manifest, write_manifest
from longlora.errors import RunFolderError
from longlora.storage import sync
from longlora.training.saved import CHECKSUM, SCHEMA, Batches, Unlogged, checksum, saved_in

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_SAVING = ".saving"
_STATE = "trainer_state.json"
_STATES = ("optimizer.pt", "scheduler.pt", _STATE)
"""Beside the weights and random states; without them the library goes on as if nothing were missing."""
_PASSED_OVER = "passed over"
_log = logging.getLogger("longlora")


def saving_folder(checkpoints: Path) -> Path:
    """Where checkpoints are written aside, each under the name it will have."""
    return checkpoints / _SAVING


def discard_unfinished(checkpoints: Path) -> None:
    """Remove what a save that did not come to its end left."""
    shutil.rmtree(checkpoints / _SAVING, ignore_errors=True)


def complete_checkpoint(
    folder: Path,
    *,
    weights: str,
    keep: int,
    batches: Batches,
    processes: int,
    source: Mapping[str, str],
    unlogged: Unlogged | None,
) -> None:
    """Mark `folder` as whole, give it its place, then remove all others but the newest `keep` - 1 whole older ones.

    Newer ones are removed too: the run passed them over, and goes another way now.

    Args:
        folder: lies in `saving_folder`.
        weights: the name of the file of weights.
        keep: whole checkpoints that are left, with this one.
        batches: a run that goes on needs steps of as many rows.
        processes: of the run.
        source: what a run that goes on must have in common with this one.
        unlogged: what the next row of metrics.jsonl will need.

    Raises:
        RunFolderError: it lacks a file that a run which goes on would need, or is not there as it was written.
    """
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "step": checkpoint_step(folder),
        "batches": asdict(batches),
        "processes": processes,
        "source": dict(source),
        "unlogged": unlogged and unlogged.model_dump(mode="json"),
    }
    if lacking := _lacking({path.name for path in folder.iterdir()}, processes, weights):
        raise RunFolderError(
            f"{folder} lacks {', '.join(lacking)} of {processes} processes: run_dir must be on a file system that all "
            "machines share"
        )
    write_manifest(folder, **facts, **{CHECKSUM: checksum(facts)})
    place = folder.parent.parent / folder.name
    _remove(place)
    folder.replace(place)
    discard_unfinished(place.parent)
    sync([place.parent])  # before others are removed
    if not has_manifest_sizes(place):
        raise RunFolderError(f"{place} is not as it was written: check the disk; earlier checkpoints were kept")
    for newer in _newest_first(place.parent):
        if checkpoint_step(newer) > checkpoint_step(place):
            _remove(newer)
    discard_older(place, keep)


def discard_older(newest: Path, keep: int) -> None:
    """Remove all older checkpoints than `newest` but `keep` - 1 whole ones, also what a killed removal left of one."""
    step = checkpoint_step(newest)
    older = [path for path in _newest_first(newest.parent) if checkpoint_step(path) < step]
    kept = [path for path in older if has_manifest_sizes(path)][: keep - 1]
    for old in older:
        if old not in kept:
            _remove(old)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that what is left by a process that is killed does not count."""
    if folder.is_symlink():
        folder.unlink()
    if not folder.exists():
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        _log.warning("%s cannot be removed as a whole, and is not used any more: remove it by hand", folder)


def newest_checkpoint(folder: Path, weights: str) -> tuple[Path, list[str]]:
    """The newest whole checkpoint in `folder`, and one line for each newer one that was passed over.

    Whole is one whose manifest is right about its files, that has all states a run needs to go on, and whose step is
    that of its name.

    Args:
        folder: of the checkpoints of a run.
        weights: the name of the file of weights.

    Raises:
        RunFolderError: there is none.
    """
    passed_over = []
    for candidate in _newest_first(folder):
        try:
            _verify(candidate, weights)
        except RunFolderError as error:
            passed_over.append(str(error))
            continue
        return candidate, passed_over
    found = f" ({'; '.join(passed_over)})" if passed_over else ""
    remedy = "remove it and start again" if passed_over else "start again"
    raise RunFolderError(f"{folder} holds no whole checkpoint{found}: {remedy} with `longlora train`")


def _verify(folder: Path, weights: str) -> None:
    files = verify_manifest(folder, _PASSED_OVER)["files"]
    saved, named = saved_in(folder, _PASSED_OVER), checkpoint_step(folder)
    if saved.step != named:
        raise RunFolderError(f"{folder / MANIFEST} is of step {saved.step}, not {named}: {_PASSED_OVER}")
    if lacking := _lacking(files, saved.processes, weights):
        raise RunFolderError(f"{folder} has no {', '.join(lacking)}: {_PASSED_OVER}")
    state = read_json(folder / _STATE, _PASSED_OVER)
    step = state.get("global_step") if isinstance(state, dict) else None
    if type(step) is not int or step != named:
        raise RunFolderError(f"{folder / _STATE} is of step {step!r:.40}, not {named}: {_PASSED_OVER}")


def _lacking(files: Collection[str], processes: int, weights: str) -> list[str]:
    """Names that are not in `files` and without which a run would go on otherwise than it did."""
    random = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    return [name for name in (weights, *_STATES, *random) if name not in files]


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint in `folder` that came to its end, be it damaged now: nothing starts over then."""
    return any((path / MANIFEST).exists() for path in _newest_first(folder))


def _newest_first(folder: Path) -> Iterator[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    yield from sorted(found, key=checkpoint_step, reverse=True)


def checkpoint_step(folder: Path) -> int:
    """Optimizer steps done in a checkpoint, from its name."""
    return int(folder.name.removeprefix("checkpoint-"))
