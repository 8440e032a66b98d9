"""From measured rows to the main table and the verdict that the report and the command line show.

In: `Comparison`. Out: `Summary`, made of plain frozen rows; HTML, Markdown, terminal and JSON show the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longlora.evaluation.report.compare import Column, Comparison
from longlora.evaluation.report.records import LABELS, HarnessRow, LongPPLRow, PerplexityRow, RetrievalRow
from longlora.evaluation.report.ruler_scores import average, effective_cell, ruler_scores, thresholds
from longlora.evaluation.report.shared import Shared, lengths_of, shared_longppl, shared_perplexity, shared_retrieval
from longlora.evaluation.report.statistics import MeanInterval, normal_interval, weighted_mean_interval
from longlora.evaluation.report.tables import (
    BEYOND,
    NOT_MEASURED,
    Cell,
    Row,
    Table,
    count_text,
    interval_cell,
    mean_cell,
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
        for length in lengths_of(columns, task):
            rows += _retrieval_rows(comparison, task, length)
    rows += _ruler_rows(comparison)
    rows += harness_rows(comparison)
    table = Table(("measure", *comparison.labels), tuple(rows), title="Results")
    several = len(comparison.runs) > 1
    missing = tuple(
        f"{LABELS[variant]} ({run.name + '/' if several else ''}eval/{variant}.json)"
        for run in comparison.runs
        for variant in run.missing
    )
    verdicts = tuple(verdict for run in comparison.runs for verdict in judge(run))
    return Summary(*_titles(comparison), missing, _notes(comparison, table), table, verdicts)


def _titles(comparison: Comparison) -> tuple[str, str]:
    models = list(dict.fromkeys(_model_name(column) for column in comparison.columns))
    if len(comparison.runs) > 1:
        names = ", ".join(run.name for run in comparison.runs)
        return " and ".join(models), f"{len(comparison.runs)} runs compared: {names}."
    run = comparison.runs[0]
    old, new = run.original_context_length, run.context_length
    what = f"Context extended from {old} to {new} tokens" if new != old else f"Context of {old} tokens"
    return " and ".join(models), f"{what}. Measured: {', '.join(comparison.labels)}."


def _model_name(column: Column) -> str:
    name = column.evaluation.model
    return Path(name).name if Path(name).is_absolute() else name


def _notes(comparison: Comparison, table: Table) -> tuple[str, ...]:
    notes = []
    if not comparison.one_tokenizer:
        notes.append(
            "The models have different tokenizers: losses per token are not comparable between them, bits per byte "
            "are. The same number of tokens is also not the same length of text."
        )
    if any(cell.mark == BEYOND for cell in table.cells()):
        marked = [c for i, c in enumerate(comparison.columns) if any(row.cells[i].mark for row in table.rows)]
        covered = "; ".join(f"{column.label}: {column.evaluation.covered_context_length} tokens" for column in marked)
        notes.append(f"{BEYOND} Measured at a length beyond what the model's RoPE covers ({covered}).")
    for run in comparison.runs:
        if run.borrowed:
            shown = " and ".join(run.columns[variant].label for variant in run.borrowed)
            notes.append(f"{run.name} did not measure {shown}: that of another run with the same model stands for it.")
    return tuple(notes)


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
        label = f"LongPPL, {length} tokens (perplexity of key tokens)"
        rows.append(Row(label, _cells(comparison, cells), detail, "longppl", f"longppl/{length}"))
    return rows


def perplexity(loss: float) -> float:
    """``exp(loss)``, bounded so that no axis of a figure overflows."""
    return math.exp(min(loss, 200.0))


def _retrieval_rows(comparison: Comparison, task: str, length: int) -> list[Row]:
    found = shared_retrieval(comparison.columns, task, lambda row: row.length == length)
    count = len(found.first)
    detail = count_text(count, RETRIEVAL[task]) if count else "no prompt was answered by all models"
    detail += _left_out(found.left_out) if count else ""
    name, group, key = f"{task}, {length} tokens", f"{task} {length}", f"{task}/{length}"
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
    return mean_cell(values, mark=mark) if len(values) == len(rows) else NOT_MEASURED


def _ruler_rows(comparison: Comparison) -> list[Row]:
    found = ruler_scores(comparison.columns)
    rows = []
    for length in lengths_of(comparison.columns, "ruler"):
        at = {column: scores[length] for column, scores in found.items() if length in scores}
        means = {column: average(scores) for column, scores in at.items()}
        one = next(iter(at.values()), {})
        count = sum(score.n for score in one.values())
        detail = f"{count_text(len(one), 'task')}, {count_text(count, 'prompt')}" if one else "nothing in common"
        cells = {column: score.cell(column.mark(length)) for column, score in means.items()}
        label = f"RULER, {length} tokens: average (0 to 100)"
        rows.append(Row(label, _cells(comparison, cells), detail, "ruler", f"ruler/{length}/average"))
    if found:
        cells = {column: effective_cell(column, scores) for column, scores in found.items()}
        detail = f"longest length with an average of at least {thresholds(list(found))}"
        label = "RULER: effective length (tokens)"
        rows.append(Row(label, _cells(comparison, cells), detail, "ruler", "ruler/effective_length"))
    return rows


def harness_rows(comparison: Comparison) -> list[Row]:
    """One row for each number of a standard benchmark, with the models that have it."""
    found = {
        column: {_harness_name(row): row for row in column.evaluation.harness if row.value is not None}
        for column in comparison.columns
    }
    rows = []
    for name in dict.fromkeys(name for items in found.values() for name in items):
        at = {column: items[name] for column, items in found.items() if name in items}
        cells = {column: _harness_cell(row) for column, row in at.items()}
        label, key = f"{name[0]}: {name[1]}", f"harness/{name[0]}/{name[1]}"
        rows.append(Row(label, _cells(comparison, cells), _harness_text(list(at.values())), "harness", key))
    return rows


def _harness_name(row: HarnessRow) -> tuple[str, str, int | None, str | int | float | None, int | None]:
    """Numbers compare only where the benchmark asked the same."""
    return row.task, row.metric, row.num_fewshot, row.version, row.samples


def _harness_text(rows: Sequence[HarnessRow]) -> str:
    """What the models' rows of one number rest on."""
    one = rows[0]
    parts = [f"{one.num_fewshot}-shot"] if one.num_fewshot is not None else []
    parts += [f"version {one.version}"] if one.version is not None else []
    parts += [count_text(one.samples, "sample")] if one.samples else []
    cut = max(rows, key=lambda row: row.truncated or 0)
    if cut.truncated:
        where = f" ({cut.truncation})" if cut.truncation else ""
        parts.append(f"{count_text(cut.truncated, 'prompt')} cut{where}")
    parts += ["lower is better"] if one.higher_is_better is False else []
    return ", ".join(parts)


def _harness_cell(row: HarnessRow) -> Cell:
    return interval_cell(normal_interval(row.value or 0.0, row.stderr), row.samples, 3)
