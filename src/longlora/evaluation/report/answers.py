"""Questions about documents: exact match and F1 by length, by task and by document, and their difference to base.

In: `Comparison`. Out: rows of the main table, and tables of a section of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from longlora.evaluation.report.compare import Column, Comparison
from longlora.evaluation.report.records import RetrievalRow
from longlora.evaluation.report.shared import lengths_of, shared_retrieval
from longlora.evaluation.report.statistics import MeanInterval, mean_interval, paired_difference
from longlora.evaluation.report.tables import NOT_MEASURED, Cell, Row, Table, count_text, interval_cell, share_cell

TASK = "questions"


def answer_rows(comparison: Comparison) -> list[Row]:
    """Exact match and F1 at each length, over the questions that all models were asked."""
    rows = []
    for length in lengths_of(comparison.columns, TASK):
        label = f"questions, {length} tokens"
        rows += _pair_of_rows(comparison, lambda row, at=length: row.length == at, label, length)  # type: ignore[misc]
    return rows


def answer_tables(comparison: Comparison) -> tuple[Table, ...]:
    """By task, by document, and what training changed; empty where no question was asked."""
    if not lengths_of(comparison.columns, TASK):
        return ()
    tables = [_by("task", comparison, lambda row: row.name), _by("document", comparison, lambda row: row.document)]
    changed = {column: base for column in comparison.columns if (base := comparison.base_of(column)) is not None}
    if changed:
        tables.insert(0, _differences(comparison, changed))
    return tuple(tables)


def f1_differences(columns: Sequence[Column], a: str, b: str) -> dict[int, tuple[MeanInterval, int, int]]:
    """By length, F1 of variant `a` less that of `b` over the same questions, with its t interval over them; how many
    questions these are, and about how many documents."""
    found = {}
    for length in lengths_of(columns, TASK):
        shared = shared_retrieval(columns, TASK, lambda row, at=length: row.length == at).rows  # type: ignore[misc]
        rows = {column.variant: items for column, items in shared.items()}
        if a in rows and b in rows:
            documents = len({row.document for row in rows[a]})
            found[length] = (_difference(rows[a], rows[b], _f1), len(rows[a]), documents)
    return found


def _pair_of_rows(
    comparison: Comparison, wanted: Callable[[RetrievalRow], bool], label: str, length: int | None
) -> list[Row]:
    found = shared_retrieval(comparison.columns, TASK, wanted)
    count = len(found.first)
    detail = count_text(count, "question") if count else "no question was answered by all models"
    detail += f"; {found.left_out} left out, not measured for all" if count and found.left_out else ""
    exact, f1 = {}, {}
    for column, items in found.rows.items():
        mark = column.mark(length) if length else ""
        exact[column] = share_cell(sum(row.correct for row in items), len(items), mark)
        f1[column] = interval_cell(mean_interval([row.score for row in items]), len(items), 3, mark=mark)
    key = f"{TASK}/{length}" if length else ""
    return [
        Row(f"{label}: {name}", tuple(cells.get(column, NOT_MEASURED) for column in comparison.columns), detail,
            label, f"{key}/{name.lower().replace(' ', '_')}" if key else "")
        for name, cells in (("exact match", exact), ("F1", f1))
    ]  # fmt: skip


def _by(what: str, comparison: Comparison, value: Callable[[RetrievalRow], str | None]) -> Table:
    rows = (row for column in comparison.columns for row in column.evaluation.of_task(TASK))
    made: list[Row] = []
    for name in sorted({value(row) or "-" for row in rows}):
        made += _pair_of_rows(comparison, lambda row, at=name: (value(row) or "-") == at, name, None)  # type: ignore[misc]
    return Table((what, *comparison.labels), tuple(made), title=f"By {what}")


def _differences(comparison: Comparison, changed: dict[Column, Column]) -> Table:
    rows = []
    for length in [None, *lengths_of(comparison.columns, TASK)]:
        label = f"{length} tokens" if length else "all lengths"
        for name, value in (("exact match", _exact), ("F1", _f1)):
            cells, count = [], 0
            for column, base in changed.items():
                cell, questions = _difference_cell(column, base, length, value)
                cells.append(cell)
                count = max(count, questions)
            rows.append(Row(f"{label}: {name}", tuple(cells), count_text(count, "question"), label))
    columns = ("measure", *(column.label for column in changed))
    return Table(columns, tuple(rows), title="Difference to base")


def _difference_cell(
    column: Column, base: Column, length: int | None, value: Callable[[RetrievalRow], float]
) -> tuple[Cell, int]:
    found = shared_retrieval((base, column), TASK, lambda row: length is None or row.length == length).rows
    if len(found) < 2:
        return NOT_MEASURED, 0
    difference = _difference(found[column], found[base], value)
    mark = column.mark(length) if length else ""
    return interval_cell(difference, len(found[column]), 3, "+", mark), len(found[column])


def _difference(
    a: Sequence[RetrievalRow], b: Sequence[RetrievalRow], value: Callable[[RetrievalRow], float]
) -> MeanInterval:
    return paired_difference([value(row) for row in a], [value(row) for row in b])


def _f1(row: RetrievalRow) -> float:
    return row.score


def _exact(row: RetrievalRow) -> float:
    return float(row.correct)
