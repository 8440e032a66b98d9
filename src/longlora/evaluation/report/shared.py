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
_MOST_LENGTHS = 16


@dataclass(frozen=True)
class Shared(Generic[_Row]):
    """Item i of every column is the same item. `left_out`: items that some column has and another lacks."""

    rows: Mapping[Column, list[_Row]]
    left_out: int

    @property
    def first(self) -> list[_Row]:
        """The rows of any one column; empty when nothing is common."""
        return next(iter(self.rows.values()), [])


def shared(
    columns: Iterable[Column],
    select: Callable[[Evaluation], Iterable[_Row]],
    what: Callable[[_Row], Hashable],
    how: Callable[[_Row], Hashable] = lambda _: None,
) -> Shared[_Row]:
    """The selected rows that all columns with any selected row have in common.

    `what` names the item of a row, `how` the way in which it was measured; rows pair where both agree. What occurs
    several times in a column is matched by order of occurrence. Columns without a selected row are left out; there are
    no columns when nothing is common.
    """
    keyed: dict[Column, dict[Hashable, _Row]] = {}
    items: Counter[Hashable] = Counter()
    for column in columns:
        seen: Counter[Hashable] = Counter()
        rows: dict[Hashable, _Row] = {}
        for row in select(column.evaluation):
            name = (what(row), how(row))
            rows[name, seen[name]] = row
            seen[name] += 1
        if rows:
            keyed[column] = rows
            items |= Counter(what(row) for row in rows.values())
    if not keyed:
        return Shared({}, 0)
    first, *others = keyed.values()
    common = [name for name in first if all(name in other for other in others)]
    aligned = {column: [rows[name] for name in common] for column, rows in keyed.items()} if common else {}
    return Shared(aligned, items.total() - len(common))


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
        lambda row: row.document,
        lambda row: (row.stride, row.protocol, *((row.tokens, row.text_bytes) if same_tokens else ())),
    )


def shared_longppl(columns: Sequence[Column], context_length: int) -> Shared[LongPPLRow]:
    """LongPPL rows at `context_length` that have key tokens, paired by document and by how key tokens were chosen."""
    same_tokens = one_tokenizer(columns)
    return shared(
        columns,
        lambda item: (
            row
            for row in item.longppl
            if row.context_length == context_length and row.key_tokens and row.loss is not None
        ),
        lambda row: row.document,
        lambda row: (
            *(row.short_context, row.evaluator, row.alpha, row.beta),
            *((row.tokens, row.key_tokens) if same_tokens else ()),
        ),
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
    return shared(
        columns,
        lambda item: (row for row in item.of_task(task) if wanted(row)),
        lambda row: (row.name, row.length, row.depth, row.trial, row.document, row.seed),
        lambda row: row.prompt_sha256 if same_tokens else None,
    )


@dataclass(frozen=True)
class Group:
    """Prompts that make one number: of one kind, empty for a task of a single kind, and of `low` to `high` tokens."""

    kind: str
    low: int
    high: int

    def holds(self, row: RetrievalRow) -> bool:
        return kind_of(row) == self.kind and self.low <= row.length <= self.high

    @property
    def tokens(self) -> str:
        return f"{self.low} tokens" if self.low == self.high else f"{self.low} to {self.high} tokens"


def kind_of(row: RetrievalRow) -> str:
    """What must not be averaged with others of the same task: a chain of needles is harder than a single one."""
    return row.name if row.task == "needle" else ""


def kinds_of(columns: Iterable[Column], task: str) -> list[str]:
    """Kinds of `task` that any of the models answered."""
    return list(dict.fromkeys(kind_of(row) for column in columns for row in column.evaluation.of_task(task)))


def groups_of(columns: Iterable[Column], task: str, kind: str) -> list[Group]:
    """A group for each length; one for each doubling where prompts have many lengths of their own."""
    rows = (row for column in columns for row in column.evaluation.of_task(task) if kind_of(row) == kind)
    lengths = sorted({row.length for row in rows})
    many = len(lengths) > _MOST_LENGTHS
    parts: dict[int, list[int]] = {}
    for length in lengths:
        parts.setdefault((length - 1).bit_length() if many else length, []).append(length)
    return [Group(kind, part[0], part[-1]) for part in parts.values()]


def lengths_of(columns: Iterable[Column], task: str) -> list[int]:
    """Prompt lengths at which any of the models answered prompts of `task`."""
    return sorted({row.length for column in columns for row in column.evaluation.of_task(task)})
