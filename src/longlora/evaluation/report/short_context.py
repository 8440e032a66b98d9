"""What a change cost at the original context: losses and standard benchmarks against the model as it came.

In: `Comparison`. Out: a `Table` with a value, a difference and its interval in each cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from longlora.evaluation.report.benchmarks import benchmark_rows
from longlora.evaluation.report.compare import Column, Comparison
from longlora.evaluation.report.shared import shared_perplexity
from longlora.evaluation.report.statistics import NORMAL_QUANTILE, loss_difference, normal_interval
from longlora.evaluation.report.tables import NOT_MEASURED, Cell, Row, Table, count_text, interval_cell


def short_context_table(comparison: Comparison) -> Table | None:
    """One column for each model that another one was made from the base of; None where nothing compares."""
    changed = {column: base for column in comparison.columns if (base := comparison.base_of(column)) is not None}
    if not changed:
        return None
    rows = _loss_rows(changed) + _benchmark_rows(comparison, changed)
    columns = ("measure", *(column.label for column in changed))
    return Table(columns, tuple(rows), title="Difference to base") if rows else None


def _loss_rows(changed: Mapping[Column, Column]) -> list[Row]:
    rows = []
    for length in sorted({base.evaluation.original_context_length for base in changed.values()}):
        cells, documents = [], 0
        for column, base in changed.items():
            found = shared_perplexity((base, column), length).rows
            if len(found) < 2 or base.evaluation.original_context_length != length:
                cells.append(NOT_MEASURED)
                continue
            own, before = found[column], found[base]
            documents = max(documents, len(own))
            cells.append(interval_cell(loss_difference(own, before), len(own), 3, "+", column.mark(length)))
        if any(cell is not NOT_MEASURED for cell in cells):
            detail = count_text(documents, "document")
            rows.append(Row(f"loss at {length} tokens (nats/token)", tuple(cells), detail, "loss", f"loss/{length}"))
    return rows


def _benchmark_rows(comparison: Comparison, changed: Mapping[Column, Column]) -> list[Row]:
    rows = []
    for row in benchmark_rows(comparison):
        at = dict(zip(comparison.columns, row.cells, strict=True))
        cells = tuple(_difference(at[column], at[base]) for column, base in changed.items())
        if any(cell is not NOT_MEASURED for cell in cells):
            rows.append(replace(row, cells=cells))
    return rows


def _difference(own: Cell, before: Cell) -> Cell:
    """Of two shares over the same samples. They are taken as independent, which makes the interval rather too wide."""
    if own.value is None or before.value is None:
        return NOT_MEASURED
    errors = [_standard_error(own), _standard_error(before)]
    error = math.hypot(*(e for e in errors if e is not None)) if None not in errors else None
    return interval_cell(normal_interval(own.value - before.value, error), own.n, 3, "+")


def _standard_error(cell: Cell) -> float | None:
    return None if cell.low is None or cell.high is None else (cell.high - cell.low) / (2 * NORMAL_QUANTILE)
