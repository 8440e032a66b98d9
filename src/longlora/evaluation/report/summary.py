"""From measured rows to the main table and the verdict that the report and the command line show.

In: `Comparison`. Out: `Summary`, made of plain frozen rows; HTML, Markdown, terminal and JSON show the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longlora.evaluation.report.answers import answer_rows
from longlora.evaluation.report.benchmarks import benchmark_rows
from longlora.evaluation.report.compare import Column, Comparison
from longlora.evaluation.report.notes import notes, titles
from longlora.evaluation.report.records import LABELS, LongPPLRow, PerplexityRow, RetrievalRow
from longlora.evaluation.report.ruler_scores import average, effective_cell, ruler_scores, thresholds
from longlora.evaluation.report.shared import (
    Group,
    Shared,
    groups_of,
    kinds_of,
    lengths_of,
    shared_longppl,
    shared_perplexity,
    shared_retrieval,
)
from longlora.evaluation.report.statistics import MeanInterval, weighted_mean_interval
from longlora.evaluation.report.tables import (
    NOT_MEASURED,
    Cell,
    Row,
    Table,
    count_text,
    log_probability_cell,
    share_cell,
)
from longlora.evaluation.report.verdict import Verdict, judge

RETRIEVAL = {"passkey": "key", "needle": "needle", "lines": "line", "topics": "conversation"}
"""Tasks whose answers are right or wrong, and what one prompt of each asks for."""


@dataclass(frozen=True)
class Summary:
    """What a report begins with. `missing` names variants that were asked for and not measured, with their files;
    `notes` are sentences without which the table would mislead."""

    title: str
    subtitle: str
    missing: tuple[str, ...]
    notes: tuple[str, ...]
    table: Table
    verdicts: tuple[Verdict, ...]


def summarize(comparison: Comparison) -> Summary:
    """The main table of all models, one column each, and the verdict on each run.

    Losses are token-weighted means in nats over the documents that all measured models share.
    """
    columns = comparison.columns
    losses, per_byte = _loss_rows(comparison), _bits_rows(comparison)
    rows = [*losses, *per_byte] if comparison.one_tokenizer else [*per_byte, *losses]
    rows += _longppl_rows(comparison)
    for task in RETRIEVAL:
        for kind in kinds_of(columns, task):
            for group in groups_of(columns, task, kind):
                rows += _retrieval_rows(comparison, task, group)
    rows += answer_rows(comparison)
    rows += _ruler_rows(comparison)
    rows += benchmark_rows(comparison)
    table = Table(("measure", *comparison.labels), tuple(rows), title="Results")
    several = len(comparison.runs) > 1
    missing = tuple(
        f"{LABELS[variant]} ({run.name + '/' if several else ''}eval/{variant}.json)"
        for run in comparison.runs
        for variant in run.missing
    )
    verdicts = tuple(verdict for run in comparison.runs for verdict in judge(run))
    return Summary(*titles(comparison), missing, notes(comparison, table), table, verdicts)


def window_name(rows: Sequence[PerplexityRow], context_length: int) -> str:
    """How the scored tokens of perplexity `rows` lie in their documents, in words."""
    if all(row.tokens <= context_length for row in rows):
        return f"first {context_length} tokens"
    return f"windows of {context_length} tokens"


def perplexity_lengths(comparison: Comparison) -> list[int]:
    """Window sizes in tokens at which any model was measured."""
    return sorted({row.context_length for column in comparison.columns for row in column.evaluation.perplexity})


def bits_per_byte(row: PerplexityRow) -> float:
    """Bits that the model needs for a byte of the scored text; the row must know its bytes."""
    return row.loss * row.tokens / math.log(2) / (row.text_bytes or math.inf)


def _cells(comparison: Comparison, texts: Mapping[Column, Cell]) -> tuple[Cell, ...]:
    return tuple(texts.get(column, NOT_MEASURED) for column in comparison.columns)


def loss_interval(rows: Sequence[PerplexityRow]) -> MeanInterval:
    """Token-weighted mean loss with its interval over documents."""
    return weighted_mean_interval([row.loss for row in rows], [row.tokens for row in rows])


def _weighted_cell(interval: MeanInterval, n: int, mark: str) -> Cell:
    # The interval over documents says how documents differ, the same for all models: results.json only.
    return Cell(f"{interval.mean:.3f}", "", interval.mean, interval.low, interval.high, n, mark)


def _loss_rows(comparison: Comparison) -> list[Row]:
    rows = []
    unit = "nats/token" if comparison.one_tokenizer else "nats/token, not comparable"
    for length in perplexity_lengths(comparison):
        found = shared_perplexity(comparison.columns, length)
        everything = [row for item in found.rows.values() for row in item]
        cells = {c: _weighted_cell(loss_interval(item), len(item), c.mark(length)) for c, item in found.rows.items()}
        label = f"loss, {window_name(everything, length)} ({unit})"
        detail = documents_text(found, sum(row.tokens for row in found.first))
        rows.append(Row(label, _cells(comparison, cells), detail, "loss", f"loss/{length}"))
    for length in sorted({run.context_length for run in comparison.runs}):
        tails = shared_perplexity(comparison.columns, length, lambda row: row.has_tail)
        if tails.rows:
            rows.append(_tail_row(comparison, length, tails, unit))
    return rows


def _tail_row(comparison: Comparison, length: int, found: Shared[PerplexityRow], unit: str) -> Row:
    cells = {}
    for column, rows in found.rows.items():
        weights = [row.tail_tokens for row in rows]
        interval = weighted_mean_interval([row.tail_loss or 0.0 for row in rows], weights)
        cells[column] = _weighted_cell(interval, len(rows), column.mark(length))
    tail = max(row.tail_tokens for row in found.first)
    detail = documents_text(found, sum(row.tail_tokens for row in found.first))
    label = f"loss, last {tail} of {length} tokens ({unit})"
    return Row(label, _cells(comparison, cells), detail, "loss", f"tail_loss/{length}")


def _bits_rows(comparison: Comparison) -> list[Row]:
    rows = []
    for length in perplexity_lengths(comparison):
        found = shared_perplexity(comparison.columns, length, lambda row: row.text_bytes is not None)
        if not found.rows:
            continue
        cells = {}
        for column, items in found.rows.items():
            sizes = [row.text_bytes or 0 for row in items]
            interval = weighted_mean_interval([bits_per_byte(row) for row in items], sizes)
            cells[column] = _weighted_cell(interval, len(items), column.mark(length))
        everything = [row for items in found.rows.values() for row in items]
        label = f"bits per byte, {window_name(everything, length)}"
        read = sum(row.text_bytes or 0 for row in found.first)
        detail = f"{count_text(len(found.first), 'document')}, {read} bytes scored"
        detail += "" if comparison.one_tokenizer else " (of the first model)"
        if without := _without_bytes(comparison, length):
            detail += f"; {count_text(without, 'document')} of unknown bytes"
        rows.append(Row(label, _cells(comparison, cells), detail, "bits", f"bits_per_byte/{length}"))
    return rows


def documents_text(found: Shared[PerplexityRow] | Shared[LongPPLRow], tokens: int, what: str = "scored") -> str:
    """What a row of the table rests on: documents, tokens, and how many documents some model lacks."""
    count = len(found.first)
    if not count:
        return "no document was measured for all models"
    return f"{count_text(count, 'document')}, {tokens} tokens {what}{_left_out(found.left_out)}"


def _left_out(number: int) -> str:
    return f"; {number} left out, not measured for all" if number else ""


def _longppl_rows(comparison: Comparison) -> list[Row]:
    rows = []
    lengths = {row.context_length for column in comparison.columns for row in column.evaluation.longppl}
    for length in sorted(lengths):
        found = shared_longppl(comparison.columns, length)
        cells = {}
        for column, items in found.rows.items():
            interval = weighted_mean_interval([row.loss or 0.0 for row in items], [row.key_tokens for row in items])
            value, low, high = (None if loss is None else perplexity(loss) for loss in interval)
            cells[column] = Cell(f"{value:.2f}", "", value, low, high, len(items), column.mark(length))
        detail = documents_text(found, sum(row.key_tokens for row in found.first), "are key tokens")
        if without := _without_key_tokens(comparison, length):
            detail += f"; {count_text(without, 'document')} without key tokens"
        label = f"LongPPL, {length} tokens (perplexity of key tokens)"
        rows.append(Row(label, _cells(comparison, cells), detail, "longppl", f"longppl/{length}"))
    return rows


def _without_bytes(comparison: Comparison, length: int) -> int:
    rows = (
        row for column in comparison.columns for row in column.evaluation.perplexity if row.context_length == length
    )
    return len({row.document for row in rows if row.text_bytes is None})


def _without_key_tokens(comparison: Comparison, length: int) -> int:
    rows = (row for column in comparison.columns for row in column.evaluation.longppl if row.context_length == length)
    return len({row.document for row in rows if not row.key_tokens})


def perplexity(loss: float) -> float:
    """``exp(loss)``, bounded so that no axis of a figure overflows."""
    return math.exp(min(loss, 200.0))


def _retrieval_rows(comparison: Comparison, task: str, prompts: Group) -> list[Row]:
    found = shared_retrieval(comparison.columns, task, prompts.holds)
    count = len(found.first)
    detail = count_text(count, RETRIEVAL[task]) if count else "no prompt was answered by all models"
    detail += _left_out(found.left_out) if count else ""
    of_kind = f" {prompts.kind}" if len(kinds_of(comparison.columns, task)) > 1 else ""
    name, group = f"{task}{of_kind}, {prompts.tokens}", f"{task}{of_kind} {prompts.high}"
    key = "/".join([task, *of_kind.split(), str(prompts.high)])
    length = prompts.high
    correct = {
        c: share_cell(sum(row.correct for row in items), len(items), c.mark(length)) for c, items in found.rows.items()
    }
    rows = [Row(f"{name}: correct", _cells(comparison, correct), detail, group, f"{key}/correct")]
    likely = {column: _log_probability_cell(items, column.mark(length)) for column, items in found.rows.items()}
    if any(cell is not NOT_MEASURED for cell in likely.values()):
        label = f"{name}: log-probability (nats)"
        rows.append(Row(label, _cells(comparison, likely), "", group, f"{key}/log_probability"))
    return rows


def _log_probability_cell(rows: Sequence[RetrievalRow], mark: str) -> Cell:
    values = [row.log_probability for row in rows if row.log_probability is not None]
    return log_probability_cell(values, mark) if len(values) == len(rows) else NOT_MEASURED


def _ruler_rows(comparison: Comparison) -> list[Row]:
    found = ruler_scores(comparison.columns)
    rows = []
    for length in lengths_of(comparison.columns, "ruler"):
        at = {column: scores[length] for column, scores in found.items() if length in scores}
        means = {column: average(scores) for column, scores in at.items()}
        one = next(iter(at.values()), {})
        count = sum(score.n for score in one.values())
        detail = f"{count_text(len(one), 'task')}, {count_text(count, 'prompt')}" if one else "nothing in common"
        left_out = shared_retrieval(comparison.columns, "ruler", lambda row, at=length: row.length == at).left_out  # type: ignore[misc]
        detail += _left_out(left_out) if one else ""
        cells = {column: score.cell(column.mark(length)) for column, score in means.items()}
        label = f"RULER, {length} tokens: average (0 to 100)"
        rows.append(Row(label, _cells(comparison, cells), detail, "ruler", f"ruler/{length}/average"))
    if found:
        cells = {column: effective_cell(column, scores) for column, scores in found.items()}
        detail = f"longest length with an average of at least {thresholds(list(found))}"
        label = "RULER: effective length (tokens)"
        rows.append(Row(label, _cells(comparison, cells), detail, "ruler", "ruler/effective_length"))
    return rows
