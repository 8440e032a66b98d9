"""Loss of each document by model, and the difference that training made, one table for each window size.

In: `Comparison`. Out: `Table`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from longlora.evaluation.report.compare import Column, Comparison
from longlora.evaluation.report.records import PerplexityRow
from longlora.evaluation.report.shared import shared_perplexity
from longlora.evaluation.report.summary import perplexity_lengths, window_name
from longlora.evaluation.report.tables import NOT_MEASURED, Cell, Row, Table, number

_Pair = tuple[Column, Column]


def document_tables(comparison: Comparison) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    """A table for each window size with documents that all models share, and in words what was left out."""
    tables, left_out = [], []
    pairs = _pairs(comparison)
    for length in perplexity_lengths(comparison):
        found = shared_perplexity(comparison.columns, length)
        if found.left_out:
            left_out.append(f"{found.left_out} at {length} tokens")
        if not found.rows:
            continue
        title = window_name([row for rows in found.rows.values() for row in rows], length)
        columns = ("document", "tokens", *comparison.labels, *(f"{a.label} - {b.label}" for a, b in pairs))
        rows = tuple(_row(comparison, found.rows, pairs, index, length) for index in range(len(found.first)))
        tables.append(Table(columns, rows, title=title[0].upper() + title[1:]))
    return tuple(tables), tuple(left_out)


def _pairs(comparison: Comparison) -> list[_Pair]:
    """Trained minus base and trained minus RoPE only; none with several runs, whose columns fill the page already."""
    if len(comparison.runs) > 1 or "trained" not in comparison.runs[0].columns:
        return []
    columns = comparison.runs[0].columns
    return [(columns["trained"], columns[other]) for other in ("base", "rope_only") if other in columns]


def _row(
    comparison: Comparison,
    rows: Mapping[Column, Sequence[PerplexityRow]],
    pairs: Sequence[_Pair],
    index: int,
    length: int,
) -> Row:
    at = {column: items[index] for column, items in rows.items()}
    one = next(iter(at.values()))
    tail = f"last {one.tail_tokens}" if one.has_tail else ""
    cells = [Cell(str(one.tokens), tail, one.tokens)]
    for column in comparison.columns:
        cells.append(_loss(at[column], column.mark(length)) if column in at else NOT_MEASURED)
    for a, b in pairs:
        cells.append(_difference(at[a], at[b]) if a in at and b in at else NOT_MEASURED)
    return Row(one.document, tuple(cells))


def _loss(row: PerplexityRow, mark: str) -> Cell:
    below = (Cell(f"{row.tail_loss:.3f}", value=row.tail_loss, n=row.tail_tokens),) if row.has_tail else ()
    return Cell(f"{row.loss:.3f}", value=row.loss, n=row.tokens, mark=mark, below=below)


def _difference(a: PerplexityRow, b: PerplexityRow) -> Cell:
    below: tuple[Cell, ...] = ()
    if a.has_tail and b.has_tail:
        tail = (a.tail_loss or 0.0) - (b.tail_loss or 0.0)
        below = (Cell(number(tail, 3, "+"), value=tail),)
    return Cell(number(a.loss - b.loss, 3, "+"), value=a.loss - b.loss, below=below)
