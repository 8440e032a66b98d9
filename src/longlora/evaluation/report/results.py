"""``results.json``: the report for programs, with every number that its tables show.

In: `Comparison`, `Summary` and the sections of the page. Out: JSON values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longlora import __version__
from longlora.evaluation.report.compare import Column, Comparison, Run
from longlora.evaluation.report.page import Section
from longlora.evaluation.report.summary import Summary

RESULTS_SCHEMA = 1
_ROWS = ("perplexity", "positions", "longppl", "retrieval", "cost", "schema_version")
_LEFT_OUT: dict[str, Any] = dict.fromkeys(_ROWS, True) | {"benchmarks": {"rows"}}


def to_results(comparison: Comparison, summary: Summary, sections: Sequence[Section]) -> dict[str, Any]:
    """Models with how they were measured and the main table's numbers by key; runs with verdicts; all tables."""
    return {
        "schema": RESULTS_SCHEMA,
        "longlora": __version__,
        "title": summary.title,
        "notes": list(summary.notes),
        "tokenizers_agree": comparison.one_tokenizer,
        "models": [_model(column, index, summary) for index, column in enumerate(comparison.columns)],
        "runs": [_run(run, summary) for run in comparison.runs],
        "tables": [{"section": section.title} | table.plain() for section in sections for table in section.tables()],
    }


def _model(column: Column, index: int, summary: Summary) -> dict[str, Any]:
    item = column.evaluation
    scorings = sorted({(row.protocol, row.context_length, row.stride) for row in item.perplexity})
    return {
        "label": column.label,
        "runs": list(column.runs),
        **item.model_dump(exclude=_LEFT_OUT),
        "protocols": [
            {"protocol": protocol, "context_length": length, "stride": stride} for protocol, length, stride in scorings
        ],
        "prompts": {task: len(item.of_task(task)) for task in sorted({row.task for row in item.retrieval})},
        "results": {
            row.key: row.cells[index].plain() for row in summary.table.rows if row.cells[index].value is not None
        },
    }


def _run(run: Run, summary: Summary) -> dict[str, Any]:
    last = run.training[-1] if run.training else None
    return {
        "name": run.name,
        "original_context_length": run.original_context_length,
        "context_length": run.context_length,
        "models": {variant: column.label for variant, column in run.columns.items()},
        "not_measured": list(run.missing),
        "training": None
        if last is None
        else {"steps": last.step, "loss": last.loss, "tokens": last.tokens, "seconds": last.seconds},
        "verdicts": [
            {"status": verdict.status, "claim": verdict.claim, "numbers": list(verdict.numbers)}
            for verdict in summary.verdicts
            if verdict.run == run.name
        ],
    }
