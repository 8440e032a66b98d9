"""What training wrote into ``metrics.jsonl``, read back.

In: a run folder. Out: `TrainingRow` by step, and how many steps were left out.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from longlora.artifacts import RunFolder
from longlora.errors import RunFolderError


@dataclass(frozen=True)
class TrainingRow:
    """One logged training step; `tokens` and `seconds` count from the start of training where they are logged."""

    step: int
    loss: float
    tokens: float | None = None
    seconds: float | None = None


def read_training(run: RunFolder) -> list[TrainingRow]:
    """Logged steps with a finite loss in order of step; empty when ``metrics.jsonl`` is missing.

    A step that was repeated after a resume counts once, with its last loss.

    Raises:
        RunFolderError: a line other than an unfinished last one is not a JSON object.
    """
    rows = {
        step: TrainingRow(step, loss, _finite(values.get("tokens")), _finite(values.get("seconds")))
        for step, values in _by_step(run).items()
        if (loss := _finite(values.get("loss"))) is not None
    }
    return [rows[step] for step in sorted(rows)]


def skipped_steps(run: RunFolder) -> int:
    """Steps that training left out, because a loss or gradient was no number or nothing was predicted.

    Raises:
        RunFolderError: as of `read_training`.
    """
    counts = ((step, values.get("skipped_steps")) for step, values in _by_step(run).items())
    return sum(count for step, count in counts if type(count) is int and 0 < count <= step)


def _by_step(run: RunFolder) -> dict[int, dict[str, Any]]:
    """What was logged last of each step, but for its validation."""
    try:
        lines = run.metrics.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{run.metrics} cannot be read ({error}): remove it or repeat the training") from None
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):  # no newline after it: training was stopped while writing this line
                continue
            raise RunFolderError(f"{run.metrics} line {number} is not JSON: remove that line") from None
        if not isinstance(values, dict):
            raise RunFolderError(f"{run.metrics} line {number} is not a JSON object: remove that line")
        step = _finite(values.get("step"))
        if step is not None and "loss" in values:
            rows[int(step)] = values
    return rows


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None
