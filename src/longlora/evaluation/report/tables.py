"""Tables as plain frozen rows: the terminal, HTML, Markdown and ``results.json`` show the same ones.

In: numbers. Out: `Table`, made of `Row` and `Cell`. Text in them is untrusted; whoever renders it escapes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longlora.evaluation.report.statistics import MeanInterval, log_probability_interval, wilson_interval

BEYOND = "\N{DAGGER}"
"""Mark of a number measured at a length that the model's RoPE does not cover."""


@dataclass(frozen=True)
class Cell:
    """One shown value: `text` as printed, `detail` (an interval, say) and `below` (further values) under it.

    `value`, `low` and `high` are unrounded, `n` is how many items they rest on. `shade`, from 0 to 1, colours the cell
    of a map; `mark` stands behind the text.
    """

    text: str
    detail: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    mark: str = ""
    shade: float | None = None
    below: tuple[Cell, ...] = ()

    def __str__(self) -> str:
        return " ".join(part for part in (self.text + self.mark, self.detail, *map(str, self.below)) if part)

    def plain(self) -> dict[str, Any]:
        """The cell as JSON values."""
        facts: dict[str, Any] = {"text": self.text + self.mark, "value": self.value, "low": self.low}
        facts |= {"high": self.high, "n": self.n, "beyond_coverage": self.mark == BEYOND}
        return facts | ({"below": [cell.plain() for cell in self.below]} if self.below else {})


NOT_MEASURED = Cell("-")


@dataclass(frozen=True)
class Row:
    """One line of a table. `group` changes where a rule is drawn; `detail` says what the row rests on.

    `key` is the name of the row for programs, the same in every report.
    """

    label: str
    cells: tuple[Cell, ...]
    detail: str = ""
    group: str = ""
    key: str = ""


@dataclass(frozen=True)
class Table:
    """`columns` names the label column and then one column for each cell of a row."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    numeric: bool = True
    title: str = ""

    def strings(self) -> list[list[str]]:
        """The rows as plain text, one string a column: what a terminal table needs."""
        return [[row.label, *(str(cell) for cell in row.cells)] for row in self.rows]

    def cells(self) -> Iterator[Cell]:
        """Every cell, row by row, each before those below it."""
        for row in self.rows:
            for cell in row.cells:
                yield cell
                yield from cell.below

    def plain(self) -> dict[str, Any]:
        """The table as JSON values."""
        rows = [
            {"key": row.key or None, "label": row.label, "detail": row.detail or None}
            | {"cells": [cell.plain() for cell in row.cells]}
            for row in self.rows
        ]
        return {"title": self.title or None, "columns": list(self.columns), "rows": rows}


def number(value: float, digits: int, sign: str = "") -> str:
    """`value` with `digits` decimals and no minus sign before zero; `sign` may be ``+``."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def interval_text(low: float | None, high: float | None, digits: int = 2, sign: str = "") -> str:
    """``[low, high]``, or an empty string where there is no interval."""
    if low is None or high is None:
        return ""
    return f"[{number(low, digits, sign)}, {number(high, digits, sign)}]"


def share_cell(correct: int, trials: int, mark: str = "") -> Cell:
    """``correct/trials`` with the Wilson interval of the share."""
    low, high = wilson_interval(correct, trials)
    text = f"{correct}/{trials}"
    return Cell(text, interval_text(low, high), correct / trials, low, high, trials, mark)


def log_probability_cell(values: Sequence[float], mark: str = "") -> Cell:
    """Mean log-probability in nats with its t interval."""
    return interval_cell(log_probability_interval(values), len(values), mark=mark)


def interval_cell(interval: MeanInterval, n: int | None, digits: int = 2, sign: str = "", mark: str = "") -> Cell:
    """A mean with its interval, as text of `digits` digits."""
    detail = interval_text(interval.low, interval.high, digits, sign)
    return Cell(number(interval.mean, digits, sign), detail, interval.mean, interval.low, interval.high, n, mark)


def count_text(number: int, noun: str) -> str:
    """``1 key``, ``2 keys``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Without control characters and lone surrogates, which neither HTML nor UTF-8 can hold."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
