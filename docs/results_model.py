"""The sections of results.md on a real model: what an evaluation costs, what it says, tuning with instructions."""

from __future__ import annotations

import json
from typing import Any

from results_rows import ROWS, Row, newest, origin, table

EVALUATION = ROWS / "evaluation_smollm2-135m_16k.json"
QUICKSTART = ROWS / "quickstart_bfloat16.json"
QUESTIONS = ROWS / "questions_smollm2-135m.json"

_CASES = {
    "grid": "passkey grid",
    "read": "reading a long text",
    "short": "short prompts with nothing in common",
    "generate": "generating",
}
_EVAL_WAYS = {
    "each from scratch": "each prompt from its beginning",
    "each by generate": "each prompt by transformers' `generate`",
    "shared": "what prompts share is read once",
    "shared, attention without a mask": "the same, attention without a mask: what `longlora eval` does on a CPU",
    "transformers' mask": "transformers' mask of all pairs",
    "two calls, no mask": "two kernel calls and no mask",
    "ours": "our cache, which is not copied for each token",
}
_MEASURES = (
    *("loss", "tail_loss", "bits_per_byte", "longppl", "passkey", "needle", "lines", "topics", "ruler", "questions"),
)


def eval_cost(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        kind, _, size = row["case"].partition(" ")
        lines.append([
            f"{_CASES.get(kind, kind)}: {size}", _EVAL_WAYS.get(row["way"], row["way"]),
            *(f"{int(row[name]):,}" for name in ("prompt_tokens", "tokens_read", "tokens_generated")),
            f"{float(row['p50_s']):.2f} ({float(row['p20_s']):.2f} to {float(row['p80_s']):.2f})", row["repeats"],
            row["speed_up"],
        ])  # fmt: skip
    head = [
        "what",
        "how",
        "tokens of all prompts",
        "read",
        "generated",
        "seconds, median (p20 to p80)",
        "runs",
        "speed-up",
    ]
    return table(head, lines, texts=2)


def results_cell(key: str, cell: dict[str, Any]) -> str:
    """The number, with its interval where one is shown in the report."""
    if not key.endswith(("correct", "log_probability", "average", "exact_match", "f1")):
        return str(cell["text"])
    return with_interval(cell, 0 if key.endswith("average") else 2)


def with_interval(cell: dict[str, Any], digits: int = 2) -> str:
    """The number with its interval, where it has one."""
    if cell["low"] is None:
        return str(cell["text"])
    return f"{cell['text']} [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"


def quickstart() -> str:
    """The table of README.md: what `longlora quickstart` shows."""
    return model_results(json.loads(QUICKSTART.read_text(encoding="utf-8")))


def model_results(results: dict[str, Any]) -> str:
    """Loss, retrieval and RULER by length, one column for each model."""
    main = next(found for found in results["tables"] if found["section"] == "Results")
    lines = []
    for row in main["rows"]:
        if row["key"].split("/")[0] in _MEASURES:
            label = row["label"] + (f" ({row['detail']})" if row["detail"] else "")
            lines.append([label, *(results_cell(row["key"], cell) for cell in row["cells"])])
    return table(main["columns"], lines)


def model_cost(results: dict[str, Any]) -> str:
    """Time by task, with tokens read and saved, and memory."""
    cost = next(found for found in results["tables"] if found["section"] == "Cost of the evaluation")
    lines = []
    for row in cost["rows"]:
        texts = (", ".join([cell["text"], *(part["text"] for part in cell.get("below", []))]) for cell in row["cells"])
        lines.append([row["label"], *texts])
    return table(cost["columns"], lines)


def results_origin(results: dict[str, Any]) -> str:
    """Where the numbers are from, once for all models that agree."""
    facts = set()
    for model in results["models"]:
        versions = ", ".join(f"{name} {version}" for name, version in model["versions"].items() if version)
        how = f"attention {model['attention']}, {model['dtype']}, seed {model['seed']}"
        commit = f", commit {model['commit']}" if model["commit"] else ""
        where = f"{model['device']}, {versions}{commit}, {model['date']}"
        facts.add(f"{results['title']}, {how}, {where}")
    return "; ".join(sorted(facts))


def evaluation() -> list[str]:
    """The section on what an evaluation costs and what it says of a real model."""
    parts = ["## Evaluation", "### What it costs"]
    rows = newest("eval_cost", "shape", "case", "way")
    if rows:
        parts += [
            f"`python benchmarks/bench_eval.py`: {rows[0]['shape']}'s shape with random weights, bfloat16. Speed-up "
            f"is over the first way of each case. {origin(rows)}.",
            eval_cost(rows),
        ]
    else:
        parts.append("Not measured: `python benchmarks/bench_eval.py` has not been run.")
    parts.append("### What it says of SmolLM2-135M")
    if not EVALUATION.exists():
        return [*parts, f"Not measured: there is no `benchmarks/results/{EVALUATION.name}` from `longlora report`."]
    results = json.loads(EVALUATION.read_text(encoding="utf-8"))
    notes = [note if note.endswith(".") else f"{note}." for note in results["notes"]]
    return [
        *parts,
        "`longlora eval` and `longlora report`; the whole report with its figures, verdicts and settings: "
        f"[example_report.md](example_report.md). {results_origin(results)}.",
        model_results(results),
        *notes,
        "What measuring this took, by task:",
        model_cost(results),
    ]


def section_table(found: dict[str, Any]) -> str:
    """A table of a report's results.json, as it stands there."""
    lines = [[row["label"], *(with_interval(cell) for cell in row["cells"])] for row in found["rows"]]
    return table(found["columns"], lines)


def instructions() -> list[str]:
    """The section on tuning with long instructions."""
    parts = ["## Long instructions"]
    if not QUESTIONS.exists():
        return [*parts, f"Not measured: there is no `benchmarks/results/{QUESTIONS.name}` from `longlora report`."]
    results = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    tables = {found["title"]: found for found in results["tables"] if found["section"] == "Questions about documents"}
    verdicts = [verdict for run in results["runs"] for verdict in run["verdicts"] if "Questions" in verdict["claim"]]
    return [
        *parts,
        f"Questions about held-out documents, before and after tuning; what was run: [log.md](log.md). "
        f"{results_origin(results)}.",
        model_results(results),
        *(f"{verdict['status']}: {verdict['claim']}." for verdict in verdicts),
        "Paired difference to base, 95 % interval over questions:",
        section_table(tables["Difference to base"]),
        "By task:",
        section_table(tables["By task"]),
        "By document:",
        section_table(tables["By document"]),
    ]
