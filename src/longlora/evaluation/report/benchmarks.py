"""Numbers of standard benchmarks, side by side where they were asked alike.

In: `Comparison`. Out: `Row`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longlora.evaluation.report.compare import Comparison
from longlora.evaluation.report.records import Benchmarks, HarnessRow
from longlora.evaluation.report.statistics import normal_interval
from longlora.evaluation.report.tables import NOT_MEASURED, Cell, Row, count_text, interval_cell


def benchmark_rows(comparison: Comparison) -> list[Row]:
    """One row for each number of a standard benchmark, with the models that have it."""
    found = {
        column: {_asked(row, item): row for row in item.rows if row.value is not None}
        for column in comparison.columns
        if (item := column.evaluation.benchmarks)
    }
    rows = []
    for name in dict.fromkeys(name for items in found.values() for name in items):
        at = {column: items[name] for column, items in found.items() if name in items}
        cells = {column: _cell(row) for column, row in at.items()}
        label, key = f"{name[0]}: {name[1]}", f"harness/{name[0]}/{name[1]}"
        shown = tuple(cells.get(column, NOT_MEASURED) for column in comparison.columns)
        detail = _detail(list(at.values()), next(iter(at)).evaluation.benchmarks)
        rows.append(Row(label, shown, detail, "harness", key))
    return rows


def _asked(row: HarnessRow, benchmarks: Benchmarks) -> tuple[Any, ...]:
    """Numbers compare only where the benchmark asked the same."""
    examples = benchmarks.settings.seed if row.num_fewshot else None
    asked = (row.num_fewshot, row.version, row.samples, benchmarks.settings.chat_template, examples)
    return (row.task, row.metric, *asked)


def _detail(rows: Sequence[HarnessRow], benchmarks: Benchmarks | None) -> str:
    """What the models' rows of one number rest on."""
    one = rows[0]
    parts = [f"{one.num_fewshot}-shot"] if one.num_fewshot is not None else []
    parts += ["chat format"] if benchmarks and benchmarks.settings.chat_template else []
    parts += [f"version {one.version}"] if one.version is not None else []
    parts += [count_text(one.samples, "sample")] if one.samples else []
    cut = max(rows, key=lambda row: row.truncated or 0)
    if cut.truncated:
        where = f" ({cut.truncation})" if cut.truncation else ""
        parts.append(f"{count_text(cut.truncated, 'prompt')} cut{where}")
    parts += ["lower is better"] if one.higher_is_better is False else []
    return ", ".join(parts)


def _cell(row: HarnessRow) -> Cell:
    return interval_cell(normal_interval(row.value or 0.0, row.stderr), row.samples, 3)
