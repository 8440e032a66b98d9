"""Rows of benchmarks/results, and tables of them in Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks" / "results"

Row = dict[str, str]


def every(name: str) -> list[Row]:
    """All rows of a file; none without it."""
    path = ROWS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def newest(name: str, *keys: str) -> list[Row]:
    """The newest row of each combination of `keys`, on the device of the last row; none without a file."""
    rows = every(name)
    return list({tuple(row[key] for key in keys): row for row in rows if row["device"] == rows[-1]["device"]}.values())


def origin(rows: Iterable[Row]) -> str:
    found = sorted({f"{row['device']}, torch {row['torch']}, commit {row['commit']}, {row['date']}" for row in rows})
    return "; ".join(found)


def table(head: list[str], lines: Iterable[list[str]], texts: int = 1) -> str:
    """Markdown, with the first `texts` columns to the left and numbers to the right."""
    marks = [*["---"] * texts, *["---:"] * (len(head) - texts)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, marks, *lines])
