"""Five questions about an extended model and one about a tuned one, each PASS, FAIL or not measured, with its numbers.

In: a `Run`. Out: a `Verdict` on each, or none for a folder without a trained model. The limits are module constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from longlora.evaluation.report.answers import f1_differences
from longlora.evaluation.report.compare import Column, Run
from longlora.evaluation.report.records import Evaluation, PerplexityRow, RetrievalRow
from longlora.evaluation.report.shared import Shared, shared, shared_perplexity, shared_retrieval
from longlora.evaluation.report.statistics import MeanInterval, loss_difference, paired_difference, token_weighted_mean
from longlora.evaluation.report.tables import count_text, interval_text

TAIL_LIMIT = 0.1
"""Nats that the tail of the new context may lie above the base model's loss at its own context."""
SHORT_LIMIT = 0.05
"""Nats that the loss at the original context may rise against base."""

_Row = TypeVar("_Row")
Status = Literal["PASS", "FAIL", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """`claim` is what was asked of the run called `run`, `numbers` what was found, one line for each item."""

    status: Status
    claim: str
    numbers: tuple[str, ...]
    run: str = ""


def judge(run: Run) -> tuple[Verdict, ...]:
    """The verdicts on `run`; none where no trained model was asked for."""
    if "trained" not in run.columns and "trained" not in run.missing:
        return ()
    original, new = run.original_context_length, run.context_length
    short, answers = _short_context_kept(run.columns, original), _answers_better(run.columns)
    if new == original:  # tuned within its own context
        return tuple(replace(verdict, run=run.name) for verdict in (short, *answers))
    made = (
        _tail_kept(run.columns, original, new),
        short,
        _better_than_rope_only(run.columns, (original, new)),
        _retrieves_beyond(run.columns, original),
        _retrieval_kept(run.columns),
        *answers,
    )
    return tuple(replace(verdict, run=run.name) for verdict in made)


def _pair(columns: Mapping[str, Column], *names: str) -> list[Column]:
    return [columns[name] for name in names if name in columns]


def _tail_kept(columns: Mapping[str, Column], original: int, new: int) -> Verdict:
    claim = (
        f"Trained, end of the {new}-token window: loss at most {TAIL_LIMIT} nats above the base model's own loss at "
        f"{original} tokens, on the same documents"
    )

    def select(item: Evaluation) -> list[PerplexityRow]:
        length = original if item.variant == "base" else new
        wanted = [row for row in item.perplexity if row.context_length == length]
        return wanted if item.variant == "base" else [row for row in wanted if row.has_tail]

    rows = _rows(shared(_pair(columns, "base", "trained"), select, lambda row: row.document))
    if len(rows) < 2:
        return Verdict("not measured", claim, (f"needs base at {original} and trained at {new} tokens",))
    base, trained = rows["base"], rows["trained"]
    own = _mean_loss(base)
    tail = token_weighted_mean([row.tail_loss or 0.0 for row in trained], [row.tail_tokens for row in trained])
    tokens = max(row.tail_tokens for row in trained)
    numbers = (
        f"trained, last {tokens} of {new} tokens {tail:.3f}; base at {original} tokens {own:.3f}; "
        f"difference {tail - own:+.3f} (limit {TAIL_LIMIT:+}); {count_text(len(base), 'document')}"
    )
    return Verdict(_status(_at_most(tail - own, TAIL_LIMIT)), claim, (numbers,))


def _short_context_kept(columns: Mapping[str, Column], original: int) -> Verdict:
    claim = f"Trained, {original} tokens: loss at most {SHORT_LIMIT} nats above base"
    rows = _rows(shared_perplexity(_pair(columns, "base", "trained"), original))
    if len(rows) < 2:
        return Verdict("not measured", claim, (f"needs base and trained at {original} tokens",))
    base, trained = _mean_loss(rows["base"]), _mean_loss(rows["trained"])
    numbers = (
        f"trained {trained:.3f}; base {base:.3f}; difference {trained - base:+.3f} (limit {SHORT_LIMIT:+}); "
        f"{count_text(len(rows['base']), 'document')}"
    )
    return Verdict(_status(_at_most(trained - base, SHORT_LIMIT)), claim, (numbers,))


def _better_than_rope_only(columns: Mapping[str, Column], lengths: tuple[int, int]) -> Verdict:
    claim = (
        f"Trained below RoPE only at {lengths[0]} and at {lengths[1]} tokens, in the mean and on more than one document"
    )
    numbers, better = [], []
    for length in lengths:
        rows = _rows(shared_perplexity(_pair(columns, "rope_only", "trained"), length))
        if len(rows) < 2:
            return Verdict("not measured", claim, (f"needs RoPE only and trained at {length} tokens",))
        trained, before = rows["trained"], rows["rope_only"]
        difference = loss_difference(trained, before)
        improved = sum(row.loss < other.loss for row, other in zip(trained, before, strict=True))
        better.append(difference.mean < 0 and improved > 1)
        numbers.append(
            f"{length} tokens: trained {_mean_loss(trained):.3f}; RoPE only {_mean_loss(before):.3f}; difference "
            f"{difference.mean:+.3f}{_interval(difference, ' over documents', 3)}; "
            f"{improved} of {count_text(len(trained), 'document')} lower"
        )
    return Verdict(_status(all(better)), claim, tuple(numbers))


def _retrieves_beyond(columns: Mapping[str, Column], original: int) -> Verdict:
    claim = (
        f"Passkey at every length beyond {original} tokens: trained gives the key a higher log-probability than base "
        "(95 % interval of the difference above 0)"
    )
    rows = _keys(_pair(columns, "base", "trained"), original)
    if len(rows) < 2 or len(rows["base"]) < 2:
        return Verdict("not measured", claim, (f"needs two keys asked of base and trained beyond {original} tokens",))
    numbers, higher = [], []
    for length in sorted({row.length for row in rows["trained"]}):
        trained = [row for row in rows["trained"] if row.length == length]
        difference = _difference(trained, [row for row in rows["base"] if row.length == length])
        numbers.append(f"{length} tokens: {_difference_text(difference, len(trained))}")
        higher.append(difference.low is not None and difference.low > 0)
    return Verdict(_status(all(higher)), claim, tuple(numbers))


def _retrieval_kept(columns: Mapping[str, Column]) -> Verdict:
    claim = (
        "Passkey at every length: trained not below RoPE only in log-probability "
        "(95 % interval of the difference not entirely below 0)"
    )
    rows = _keys(_pair(columns, "rope_only", "trained"), 0)
    if len(rows) < 2:
        return Verdict("not measured", claim, ("needs keys asked of RoPE only and trained",))
    numbers, kept = [], []
    for length in sorted({row.length for row in rows["trained"]}):
        trained = [row for row in rows["trained"] if row.length == length]
        before = [row for row in rows["rope_only"] if row.length == length]
        difference = _difference(trained, before)
        numbers.append(f"{length} tokens: {_difference_text(difference, len(trained))}")
        if difference.high is not None:
            kept.append(difference.high >= 0)
    if not kept:
        return Verdict("not measured", claim, (*numbers, "an interval needs two keys at a length"))
    return Verdict(_status(all(kept)), claim, tuple(numbers))


def _answers_better(columns: Mapping[str, Column]) -> tuple[Verdict, ...]:
    """None where no question was asked: most runs extend a model without tuning it on instructions."""
    found = f1_differences(_pair(columns, "base", "trained"), "trained", "base")
    if not found:
        return ()
    claim = "Questions at every length: trained above base in F1 (95 % interval of the paired difference above 0)"
    numbers = tuple(
        f"{length} tokens: difference {difference.mean:+.3f}{_interval(difference, digits=3)}; "
        f"{count_text(questions, 'question')} about {count_text(documents, 'document')}"
        for length, (difference, questions, documents) in found.items()
    )
    higher = [difference.low is not None and difference.low > 0 for difference, _, _ in found.values()]
    return (Verdict(_status(all(higher)), claim, numbers),)


def _rows(found: Shared[_Row]) -> dict[str, list[_Row]]:
    return {column.variant: rows for column, rows in found.rows.items()}


def _keys(columns: Sequence[Column], beyond: int) -> dict[str, list[RetrievalRow]]:
    """Passkeys asked for in prompts longer than `beyond` tokens, where their log-probability is known."""
    return _rows(
        shared_retrieval(columns, "passkey", lambda row: row.length > beyond and row.log_probability is not None)
    )


def _mean_loss(rows: Sequence[PerplexityRow]) -> float:
    return token_weighted_mean([row.loss for row in rows], [row.tokens for row in rows])


def _difference(a: Sequence[RetrievalRow], b: Sequence[RetrievalRow]) -> MeanInterval:
    return paired_difference([row.log_probability or 0.0 for row in a], [row.log_probability or 0.0 for row in b])


def _difference_text(difference: MeanInterval, keys: int) -> str:
    return f"difference {difference.mean:+.2f}{_interval(difference)} nats; {count_text(keys, 'key')}"


def _interval(interval: MeanInterval, suffix: str = "", digits: int = 2) -> str:
    if interval.low is None or interval.high is None:
        return " (no interval)"
    return f" {interval_text(interval.low, interval.high, digits, '+')}{suffix}"


def _status(passed: bool) -> Status:
    return "PASS" if passed else "FAIL"


def _at_most(difference: float, limit: float) -> bool:
    # Losses come with about six digits; 3.1 - 3.0 must not fail a limit of 0.1 by rounding.
    return round(difference - limit, 6) <= 0
