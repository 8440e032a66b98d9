"""Right answers by prompt length and depth as a coloured table, one for each model.

In: `Comparison`. Out: `Table` whose cells have a shade.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from longlora.evaluation.report.compare import Column, Comparison
from longlora.evaluation.report.records import RetrievalRow
from longlora.evaluation.report.shared import kind_of
from longlora.evaluation.report.tables import NOT_MEASURED, Cell, Row, Table, log_probability_cell, share_cell

_MAX_DEPTHS = 8
_QUARTERS = ("0-25 %", "25-50 %", "50-75 %", "75-100 %")


def retrieval_maps(comparison: Comparison, task: str, kind: str) -> tuple[Table, ...]:
    """A map for each model with answers of this kind of `task`.

    A cell shows ``correct/prompts``, Wilson interval and mean log-probability (nats).
    Depths fall into quarters when there are many of them or not every depth was asked at every length, as with keys
    hidden in documents. The axes cover the rows of all models, so that maps can be compared.
    """
    rows = {
        column: [r for r in column.evaluation.of_task(task) if kind_of(r) == kind and r.depth is not None]
        for column in comparison.columns
    }
    everything = [row for items in rows.values() for row in items]
    lengths = sorted({row.length for row in everything})
    depths = sorted({row.depth or 0.0 for row in everything})
    grid = {(row.length, row.depth) for row in everything}
    in_quarters = len(depths) > _MAX_DEPTHS or len(grid) < len(lengths) * len(depths)
    names = _QUARTERS if in_quarters else tuple(f"{depth * 100:g} %" for depth in depths)

    def line(row: RetrievalRow) -> int:
        depth = row.depth or 0.0
        return min(int(depth * 4), 3) if in_quarters else depths.index(depth)

    return tuple(
        _map(column, items, lengths, names, [line(row) for row in items]) for column, items in rows.items() if items
    )


def _map(
    column: Column, rows: Sequence[RetrievalRow], lengths: Sequence[int], names: Sequence[str], lines: Sequence[int]
) -> Table:
    cells: dict[tuple[int, int], list[RetrievalRow]] = {}
    for row, line in zip(rows, lines, strict=True):
        cells.setdefault((line, row.length), []).append(row)
    made = tuple(
        Row(name, tuple(_cell(cells.get((line, length), []), column.mark(length)) for length in lengths))
        for line, name in enumerate(names)
    )
    return Table(("depth", *map(str, lengths)), made, title=column.label)


def _cell(rows: Sequence[RetrievalRow], mark: str) -> Cell:
    if not rows:
        return NOT_MEASURED
    cell = share_cell(sum(row.correct for row in rows), len(rows), mark)
    likely = [row.log_probability for row in rows if row.log_probability is not None]
    if len(likely) < len(rows):
        return replace(cell, shade=cell.value)
    return replace(cell, shade=cell.value, below=(replace(log_probability_cell(likely), detail=""),))
