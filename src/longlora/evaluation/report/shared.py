"""Rows that models have in common: nothing is compared but what was measured alike.

In: `Column`. Out: `Shared`, aligned rows by column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from longlora.evaluation.report.compare import Column, one_tokenizer
from longlora.evaluation.report.records import Evaluation, LongPPLRow, PerplexityRow, PositionRow, RetrievalRow

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Shared(Generic[_Row]):
    """Item i of every column is the same item. `left_out`: rows of the best measured column that others lack."""

    rows: Mapping[Column, list[_Row]]
    left_out: int

    @property
    def first(self) -> list[_Row]:
        """The rows of any one column; empty when nothing is common."""
        return next(iter(self.rows.values()), [])


def shared(
    columns: Iterable[Column],
    select: Callable[[Evaluation], Iterable[_Row]],
    key: Callable[[_Row], Hashable],
) -> Shared[_Row]:
    """The selected rows that all columns with any selected row have in common.

    A key that occurs several times in a column is matched by order of occurrence. Columns without a selected row are
    left out; there are no columns when nothing is common.
    """
    keyed: dict[Column, dict[tuple[Hashable, int], _Row]] = {}
    for column in columns:
        seen: Counter[Hashable] = Counter()
        rows: dict[tuple[Hashable, int], _Row] = {}
        for row in select(column.evaluation):
            name = key(row)
            rows[name, seen[name]] = row
            seen[name] += 1
        if rows:
            keyed[column] = rows
    if not keyed:
        return Shared({}, 0)
    first, *others = keyed.values()
    common = [name for name in first if all(name in other for other in others)]
    most = max(len(rows) for rows in keyed.values())
    aligned = {column: [rows[name] for name in common] for column, rows in keyed.items()} if common else {}
    return Shared(aligned, most - len(common))


def shared_perplexity(
    columns: Sequence[Column], context_length: int, wanted: Callable[[PerplexityRow], bool] = lambda _: True
) -> Shared[PerplexityRow]:
    """Perplexity rows at `context_length` for which `wanted` holds, paired by document and way of scoring.

    With one tokenizer the same tokens were scored; with several, only the document is the same.
    """
    same_tokens = one_tokenizer(columns)
    return shared(
        columns,
        lambda item: (row for row in item.perplexity if row.context_length == context_length and wanted(row)),
        lambda row: (row.document, row.stride, row.protocol, row.tokens if same_tokens else 0),
    )


def shared_longppl(columns: Sequence[Column], context_length: int) -> Shared[LongPPLRow]:
    """LongPPL rows at `context_length` that have key tokens, paired by document and by how key tokens were chosen."""
    return shared(
        columns,
        lambda item: (
            row
            for row in item.longppl
            if row.context_length == context_length and row.key_tokens and row.loss is not None
        ),
        lambda row: (row.document, row.short_context, row.evaluator, row.alpha, row.beta),
    )


def shared_positions(columns: Sequence[Column]) -> Shared[PositionRow]:
    """Rows of loss by position, paired by document and range."""
    return shared(columns, lambda item: item.positions, lambda row: (row.document, row.start, row.stop))


def shared_retrieval(
    columns: Sequence[Column], task: str, wanted: Callable[[RetrievalRow], bool] = lambda _: True
) -> Shared[RetrievalRow]:
    """Answered prompts of `task` for which `wanted` holds, paired by what was asked and, with one tokenizer, by the
    very tokens of the prompt."""
    same_tokens = one_tokenizer(columns)

    def key(row: RetrievalRow) -> Hashable:
        asked = (row.name, row.length, row.depth, row.trial, row.document, row.seed)
        return (*asked, row.prompt_sha256) if same_tokens else asked

    return shared(columns, lambda item: (row for row in item.of_task(task) if wanted(row)), key)


def lengths_of(columns: Iterable[Column], task: str) -> list[int]:
    """Prompt lengths at which any of the models answered prompts of `task`."""
    return sorted({row.length for column in columns for row in column.evaluation.of_task(task)})
