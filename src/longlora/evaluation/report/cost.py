"""What the measurements cost: seconds, tokens read, and tokens that a shared prefix saved, by task and model.

In: `Comparison`. Out: a `Table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from longlora.evaluation.report.compare import Comparison
from longlora.evaluation.report.records import CostRow
from longlora.evaluation.report.tables import NOT_MEASURED, Cell, Row, Table


def cost_table(comparison: Comparison) -> Table:
    """A row for each task whose cost was recorded, then all tasks, wall time and peak memory."""
    tasks = list(dict.fromkeys(row.task for column in comparison.columns for row in column.evaluation.cost))
    rows = [_row(comparison, task, [task]) for task in tasks]
    if len(tasks) > 1:
        rows.append(_row(comparison, "all tasks", tasks))
    evaluations = [column.evaluation for column in comparison.columns]
    walls = tuple(_time(item.seconds) for item in evaluations)
    rows.append(Row("wall time of the last call", walls, key="seconds"))
    peaks = tuple(_memory(item.peak_bytes) for item in evaluations)
    rows.append(Row("peak memory of the process or GPU", peaks, key="peak_bytes"))
    return Table(("task", *comparison.labels), tuple(rows), title="Cost")


def _row(comparison: Comparison, label: str, tasks: Sequence[str]) -> Row:
    cells = []
    for column in comparison.columns:
        rows = [row for row in column.evaluation.cost if row.task in tasks]
        cells.append(_cell(rows) if rows else NOT_MEASURED)
    return Row(label, tuple(cells), key=f"cost/{label}")


def _cell(rows: Sequence[CostRow]) -> Cell:
    seconds = sum(row.seconds for row in rows)
    read, reused = sum(row.tokens_read for row in rows), sum(row.tokens_reused for row in rows)
    prompts = sum(row.prompts for row in rows)
    below = [Cell(f"{_short(read)} read", value=read)]
    if reused:
        share = reused / (read + reused)
        below += [Cell(f"{_short(reused)} reused", value=reused), Cell(f"{share:.0%} saved", value=share)]
    return replace(_time(seconds), n=prompts or None, below=tuple(below))


def _time(seconds: float) -> Cell:
    text, _, longer = duration(seconds).partition(" (")
    return Cell(text, longer.rstrip(")"), seconds)


def _short(tokens: int) -> str:
    """A number of tokens in thousands or millions where it is large."""
    if tokens < 10_000:
        return f"{tokens:,}"
    return f"{tokens / 1e3:.0f}k" if tokens < 1e6 else f"{tokens / 1e6:.1f}M"


def duration(seconds: float) -> str:
    """Seconds, with minutes or hours where they read better."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{seconds:.0f} s ({minutes:.0f} min)" if minutes < 120 else f"{seconds:.0f} s ({minutes / 60:.1f} h)"


def _memory(size: int | None) -> Cell:
    return NOT_MEASURED if size is None else Cell(f"{size / 2**30:.2f} GiB", value=float(size))
