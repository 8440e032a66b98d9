"""What a checkpoint says of the run that wrote it: the facts in its manifest, beside the names of its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import SafetensorError

from longlora.artifacts import MANIFEST, read_json
from longlora.errors import RunFolderError, one_line
from longlora.planning.out_of_memory import is_out_of_memory
from longlora.training.failures import is_lost_contact

SCHEMA = 1
CHECKSUM = "facts_sha256"
"""Of a manifest: the `checksum` of its other facts."""
_Count = Annotated[int, Field(gt=0)]
_MISFITS = (
    EOFError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, pickle.PickleError,
    SafetensorError,
)  # fmt: skip


@dataclass(frozen=True)
class Batches:
    """How the rows of a step are cut up: micro batches of `rows`, `steps` of them one after the other on each of
    `processes` that have rows of their own."""

    rows: _Count
    steps: _Count
    processes: _Count

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


class Unlogged(BaseModel):
    """Losses since the last row of metrics.jsonl, which the next row is the mean of."""

    model_config = ConfigDict(strict=True, frozen=True)

    since: Annotated[int, Field(ge=0)]
    """The step of that row; 0 before the first."""
    sums: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)]
    """Of each process, by rank."""

    @classmethod
    def of(cls, since: int, sums: Sequence[float]) -> Unlogged | None:
        """None if a sum is no number, which no JSON holds."""
        return cls(since=since, sums=tuple(sums)) if all(map(math.isfinite, sums)) else None

    def sum_of(self, rank: int, world: int) -> float:
        """Of one of `world` processes; the mean if there were not as many."""
        return self.sums[rank] if len(self.sums) == world else math.fsum(self.sums) / len(self.sums)


class Saved(BaseModel):
    """What the manifest of a checkpoint says beside its files."""

    model_config = ConfigDict(strict=True, frozen=True)

    schema_: Annotated[int, Field(alias="schema", ge=SCHEMA, le=SCHEMA)]
    step: Annotated[int, Field(ge=0)]
    """Optimizer steps done."""
    batches: Batches
    processes: _Count
    """All of the run, each with random numbers of its own."""
    source: dict[str, str]
    """What was trained on what, by name: hashes."""
    unlogged: Unlogged | None = None
    """None where a loss since then was no number."""


def saved_in(folder: Path, remedy: str = "the checkpoint is damaged") -> Saved:
    """What the manifest of a checkpoint says of the run.

    Raises:
        RunFolderError: it is damaged, or another version's; the message ends with `remedy`.
    """
    path = folder / MANIFEST
    manifest = read_json(path, remedy)
    facts = {name: value for name, value in manifest.items() if name != "files"} if isinstance(manifest, dict) else {}
    if facts.pop(CHECKSUM, None) != checksum(facts):
        raise RunFolderError(f"{path} does not match its own {CHECKSUM}: {remedy}")
    try:
        return Saved.model_validate_json(json.dumps(facts))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunFolderError(f"{path}: {where} is not right ({first['msg']}): {remedy}") from None


def checksum(facts: Mapping[str, Any]) -> str:
    """Hex SHA-256 of what a manifest says beside its files, which protect themselves: one flipped bit is found."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def require_source(folder: Path, source: Mapping[str, str]) -> None:
    """Refuse to go on from the checkpoint in `folder` where something else would be trained than before.

    Raises:
        RunFolderError: the message names what differs.
    """
    before = saved_in(folder).source
    differing = [name for name, value in source.items() if before.get(name, value) != value]
    if differing:
        raise RunFolderError(
            f"{folder} was saved with another {' and '.join(differing)} than there is now: put that back, or train in "
            "another run_dir"
        )


@contextlib.contextmanager
def explained_states(folder: Path) -> Iterator[None]:
    """Inside it, what the libraries raise about states that do not fit becomes a `RunFolderError` of one line.

    A checkpoint that is whole can hold such states all the same, for example one that was put together by hand.
    """
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{folder} cannot be read ({error.strerror or error}): check the disk and its permissions, then "
            "`longlora resume` again"
        ) from error
    except _MISFITS as error:
        if is_out_of_memory(error) or is_lost_contact(error):
            raise
        words = one_line(error, 200)
        raise RunFolderError(
            f"the states in {folder} do not fit the run ({words}): remove that folder; `longlora resume` goes on from "
            "the checkpoint before it, and where there is none `longlora train` starts again"
        ) from error
