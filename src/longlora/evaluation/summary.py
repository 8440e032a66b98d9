"""From measured rows to the table and the verdict that the report and the command line show.

In: `Evaluation` by variant. Out: `Summary`, made of plain frozen rows; HTML, Markdown and terminal show the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longlora.evaluation.records import (
    LABELS,
    VARIANTS,
    Evaluation,
    PasskeyRow,
    PerplexityRow,
    shared_passkey,
    shared_perplexity,
    shared_tails,
)
from longlora.evaluation.statistics import MeanInterval, mean_interval, token_weighted_mean, wilson_interval
from longlora.evaluation.verdict import Verdict, judge


@dataclass(frozen=True)
class Cell:
    """One shown value: `text` as printed, `detail` (an interval, say) beside or below it, `value` unrounded."""

    text: str
    detail: str = ""
    value: float | None = None

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".rstrip()


NOT_MEASURED = Cell("-")


@dataclass(frozen=True)
class Row:
    """One line of a table. `group` changes where a rule is drawn; `detail` says what the row rests on."""

    label: str
    cells: tuple[Cell, ...]
    detail: str = ""
    group: str = ""


@dataclass(frozen=True)
class Table:
    """`columns` names the label column and then one column for each cell of a row."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    numeric: bool = True

    def strings(self) -> list[list[str]]:
        """The rows as plain text, one string a column: what a terminal table needs."""
        return [[row.label, *(str(cell) for cell in row.cells)] for row in self.rows]


@dataclass(frozen=True)
class Summary:
    """What one run folder shows. Context lengths are in tokens."""

    model: str
    original_context_length: int
    context_length: int
    measured: tuple[str, ...]
    missing: tuple[str, ...]
    table: Table
    verdicts: tuple[Verdict, ...]


def summarize(evaluations: Mapping[str, Evaluation]) -> Summary:
    """The main table (base, RoPE only, trained) and the verdict of `evaluations`, which has at least one variant.

    Losses are token-weighted means in nats over the documents that all measured variants share.
    """
    any_one = next(iter(evaluations.values()))
    old, new = any_one.original_context_length, any_one.context_length
    lengths = sorted({row.context_length for item in evaluations.values() for row in item.perplexity})
    rows = [_loss_row(evaluations, length) for length in lengths]
    rows += _tail_row(evaluations, new)
    for length in sorted({row.length for item in evaluations.values() for row in item.passkey}):
        rows += _passkey_rows(evaluations, length)
    return Summary(
        model=Path(any_one.model).name if Path(any_one.model).is_absolute() else any_one.model,
        original_context_length=old,
        context_length=new,
        measured=tuple(evaluations),
        missing=tuple(name for name in VARIANTS if name not in evaluations),
        table=Table(("measure", *LABELS.values()), tuple(rows)),
        verdicts=judge(evaluations, old, new),
    )


def window_name(rows: Sequence[PerplexityRow], context_length: int) -> str:
    """How the scored tokens of perplexity `rows` lie in their documents, in words."""
    if all(row.tokens <= context_length for row in rows):
        return f"first {context_length} tokens"
    return f"windows of {context_length} tokens"


def interval_text(interval: tuple[float, float] | MeanInterval, digits: int = 2, sign: str = "") -> str:
    """``[low, high]``, or an empty string where there is no interval."""
    low, high = interval[-2], interval[-1]
    if low is None or high is None:
        return ""
    return f"[{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _cells(texts: Mapping[str, Cell]) -> tuple[Cell, ...]:
    return tuple(texts.get(variant, NOT_MEASURED) for variant in VARIANTS)


def _loss_row(evaluations: Mapping[str, Evaluation], length: int) -> Row:
    rows = shared_perplexity(evaluations, length)
    everything = [row for item in rows.values() for row in item]
    cells = {variant: _loss_cell([r.loss for r in item], [r.tokens for r in item]) for variant, item in rows.items()}
    label = f"loss, {window_name(everything, length)} (nats/token)"
    return Row(label, _cells(cells), _documents(rows, sum(row.tokens for row in _first(rows))), "loss")


def _tail_row(evaluations: Mapping[str, Evaluation], length: int) -> list[Row]:
    rows = shared_tails(evaluations, length)
    if not rows:
        return []
    cells = {
        variant: _loss_cell([row.tail_loss or 0.0 for row in item], [row.tail_tokens for row in item])
        for variant, item in rows.items()
    }
    tail = max(row.tail_tokens for row in _first(rows))
    label = f"loss, last {tail} of {length} tokens (nats/token)"
    return [Row(label, _cells(cells), _documents(rows, sum(row.tail_tokens for row in _first(rows))), "loss")]


def _first(rows: Mapping[str, list[PerplexityRow]]) -> list[PerplexityRow]:
    return next(iter(rows.values()), [])


def _documents(rows: Mapping[str, list[PerplexityRow]], tokens: int) -> str:
    count = len(_first(rows))
    if not count:
        return "no document was measured for all variants"
    return f"{count} document{'s' * (count != 1)}, {tokens} tokens scored"


def _loss_cell(losses: Sequence[float], tokens: Sequence[int]) -> Cell:
    value = token_weighted_mean(losses, tokens)
    return Cell(f"{value:.3f}", "", value)


def _passkey_rows(evaluations: Mapping[str, Evaluation], length: int) -> list[Row]:
    rows = shared_passkey(evaluations, lambda row: row.length == length)
    keys = len(next(iter(rows.values()), []))
    detail = f"{keys} key{'s' * (keys != 1)}" if keys else "no key was asked for by all variants"
    correct = {variant: _correct_cell(item) for variant, item in rows.items()}
    confidence = {variant: _log_probability_cell(item) for variant, item in rows.items()}
    return [
        Row(f"passkey, {length} tokens: correct", _cells(correct), detail, f"passkey {length}"),
        Row(f"passkey, {length} tokens: log-probability (nats)", _cells(confidence), "", f"passkey {length}"),
    ]


def _correct_cell(rows: Sequence[PasskeyRow]) -> Cell:
    correct = sum(row.correct for row in rows)
    return Cell(f"{correct}/{len(rows)}", interval_text(wilson_interval(correct, len(rows))), correct / len(rows))


def _log_probability_cell(rows: Sequence[PasskeyRow]) -> Cell:
    interval = mean_interval([row.log_probability for row in rows])
    return Cell(f"{interval.mean:.2f}", interval_text(interval), interval.mean)
