"""What all benchmarks share: timing alternatives interleaved, and appending rows that say where they come from."""

from __future__ import annotations

import csv
import statistics
import subprocess
from collections.abc import Callable, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

from longlora.evaluation.variants import device_name
from longlora.planning.calibrate import seconds_of

RESULTS = Path(__file__).parent / "results"


def device_for_benchmark() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def interleaved(ways: Mapping[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each way, one of each in turn; a first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, call in ways.items():
            seconds[name].append(seconds_of(call, device))
    return {name: times[1:] for name, times in seconds.items()}


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return p20, statistics.median(times), p80


@cache
def _facts(device: torch.device) -> dict[str, str]:
    """What all rows of a run have in common; the commit is that at its beginning."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
    commit = _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return {
        "device": device_name(device), "torch": torch.__version__, "commit": commit, "date": date.today().isoformat()
    }  # fmt: skip


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, cwd=RESULTS.parent
    ).stdout.strip()


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of ``results/NAME.csv``; none without the file."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def append_rows(name: str, rows: list[dict[str, Any]], device: torch.device) -> Path:
    """Append to ``results/NAME.csv``, with device, versions, commit and date; a new file gets a header."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0] | _facts(device)))
        if handle.tell() == 0:
            writer.writeheader()
        writer.writerows(row | _facts(device) for row in rows)
    return path
