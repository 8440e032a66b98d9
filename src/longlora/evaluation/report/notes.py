"""Title, and the sentences that a reader needs beside the main table.

In: `Comparison` and the table. Out: plain text.
"""

from __future__ import annotations

from pathlib import Path

from longlora.evaluation.report.compare import Column, Comparison, Run
from longlora.evaluation.report.records import LABELS
from longlora.evaluation.report.tables import BEYOND, Table


def titles(comparison: Comparison) -> tuple[str, str]:
    """What was measured, and how it was extended or what it is compared with."""
    models = list(dict.fromkeys(_model_name(column) for column in comparison.columns))
    if len(comparison.runs) > 1:
        names = ", ".join(run.name for run in comparison.runs)
        return " and ".join(models), f"{len(comparison.runs)} runs compared: {names}."
    run = comparison.runs[0]
    old, new = run.original_context_length, run.context_length
    if new == old:
        what = f"Context of {old} tokens"
    elif any(column.variant != "base" for column in comparison.columns):
        what = f"Context extended from {old} to {new} tokens"
    else:
        what = f"Context of {old} tokens, asked up to {new}"
    return " and ".join(models), f"{what}. Measured: {', '.join(comparison.labels)}."


def _model_name(column: Column) -> str:
    name = column.evaluation.model
    return Path(name).name if Path(name).is_absolute() else name


def notes(comparison: Comparison, table: Table) -> tuple[str, ...]:
    """Sentences without which the main `table` would mislead: what does not compare, and what is not shown."""
    found = []
    if not comparison.one_tokenizer:
        found.append(
            "The models have different tokenizers: losses per token are not comparable between them, bits per byte "
            "are. The same number of tokens is also not the same length of text."
        )
    if any(cell.mark == BEYOND for cell in table.cells()):
        marked = [c for i, c in enumerate(comparison.columns) if any(row.cells[i].mark for row in table.rows)]
        covered = "; ".join(f"{column.label}: {column.evaluation.covered_context_length} tokens" for column in marked)
        found.append(f"{BEYOND} Measured at a length beyond what the model's RoPE covers ({covered}).")
    for column in comparison.columns:
        item = column.evaluation
        most = item.benchmarks.settings.max_length if item.benchmarks else None
        if most and most > item.covered_context_length:
            found.append(
                f"Standard benchmarks of {column.label} had prompts of up to {most} tokens; its RoPE covers "
                f"{item.covered_context_length}."
            )
    for run in comparison.runs:
        of_run = f"In {run.name}: " if len(comparison.runs) > 1 else ""
        found += [f"{of_run}{text}." for text in (*run.left_out, *_shared_columns(run))]
    return tuple(found)


def _shared_columns(run: Run) -> list[str]:
    """Which columns show the rows of another run."""
    found = []
    if run.borrowed:
        shown = " and ".join(LABELS[variant] for variant in run.borrowed)
        found.append(f"no rows of {shown}; those of another run with the same model stand for them")
    if run.doubled:
        shown = ", ".join(f"{LABELS[variant]} (as in {run.columns[variant].runs[0]})" for variant in run.doubled)
        found.append(f"measured once more and not shown: {shown}")
    return found
