"""Write docs/results.md and its picture from the rows of benchmarks/results: ``python docs/make_results.py``.

Of each point the newest row counts, on the device of the last row. The evaluation of a real model is a ``results.json``
of `longlora report`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks" / "results"
PAGE, PICTURE = ROOT / "docs" / "results.md", ROOT / "docs" / "results" / "train_step.svg"

EVALUATION = ROWS / "evaluation_smollm2-135m_16k.json"
QUESTIONS = ROWS / "questions_smollm2-135m.json"

Row = dict[str, str]
VARIANTS = {
    "a": "Trainer, PEFT LoRA, full attention",
    "b": "the same with the paper's Algorithm 1, groups of T/4",
    "c": "longlora, groups of T/4",
    "d": "longlora, groups of 2,048 and 4 sink tokens",
}
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
_WAYS = ("full", "Algorithm 1", "ours, 0 sinks", "ours, 4 sinks", "floor")


def newest(name: str, *keys: str) -> list[Row]:
    """The newest row of each combination of `keys`, on the device of the last row; none without a file."""
    path = ROWS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    return list({tuple(row[key] for key in keys): row for row in rows if row["device"] == rows[-1]["device"]}.values())


def origin(rows: Iterable[Row]) -> str:
    found = sorted({f"{row['device']}, torch {row['torch']}, commit {row['commit']}, {row['date']}" for row in rows})
    return "; ".join(found)


def table(head: list[str], lines: Iterable[list[str]], texts: int = 1) -> str:
    """Markdown, with the first `texts` columns to the left and numbers to the right."""
    marks = [*["---"] * texts, *["---:"] * (len(head) - texts)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, marks, *lines])


def train_step(rows: list[Row]) -> str:
    points = {(row["variant"], int(row["context"])): row for row in rows}
    contexts = sorted({context for _, context in points})

    def cell(variant: str, context: int, column: str, scale: float = 1.0) -> str:
        row = points.get((variant, context))
        if row is None:
            return ""
        return f"{float(row[column]) / scale:,.1f}" if row[column] else row["failed"].split(":")[0]

    head = ["seconds a step", *(f"{context:,}" for context in contexts)]
    seconds = [[f"({v}) {name}", *(cell(v, c, "seconds") for c in contexts)] for v, name in VARIANTS.items()]
    speed = [[f"({v})", *(cell(v, c, "tokens_per_second") for c in contexts)] for v in VARIANTS]
    memory = [[f"({v})", *(cell(v, c, "peak_mb", 1000) for c in contexts)] for v in VARIANTS]
    return "\n\n".join(
        table(top, lines)
        for top, lines in (
            (head, seconds),
            (["tokens a second", *head[1:]], speed),
            (["peak memory, GB", *head[1:]], memory),
        )
    )


def attention(rows: list[Row]) -> str:
    points = {(row["shape"], int(row["tokens"]), row["group"], row["way"]): row for row in rows}
    groups = sorted({(shape, tokens, group) for shape, tokens, group, _ in points if group})

    def seconds(shape: str, tokens: int, group: str, way: str) -> float:
        return float(points[shape, tokens, "" if way == "full" else group, way]["p50_s"])

    lines = []
    for place in groups:
        times = {way: seconds(*place, way) for way in _WAYS}
        ours = times["ours, 4 sinks"]
        lines.append([
            place[0], f"{place[1]:,}", place[2], *(f"{time:.3f}" for time in times.values()),
            f"{times['full'] / ours:.1f}", f"{times['Algorithm 1'] / ours:.2f}", f"{times['floor'] / ours:.2f}",
        ])  # fmt: skip
    head = ["shape", "tokens", "group", *_WAYS, "full / ours", "Algorithm 1 / ours", "floor / ours"]
    return table(head, lines)


def plan(rows: list[Row]) -> str:
    columns = ["predicted_mb", "measured_mb", "memory_error", "predicted_s", "measured_s", "time_error"]
    head = ["shape", "tokens", "settings", "planned MB", "MB", "error", "planned s", "s", "error"]
    return table(head, ([row["shape"], row["context"], row["settings"], *(row[c] for c in columns)] for row in rows))


def several_processes() -> list[str]:
    """The section on runs of several processes; empty without rows."""
    parts = []
    if planned := newest("plan_processes", "point"):
        columns = ["processes", "sequence", "shard", "settings", "predicted_mb", "measured_most_mb", "memory_error"]
        head = ["processes", "share a row", "sharded", "settings", "planned MB", "MB of the largest", "error"]
        parts += [
            f"`python benchmarks/bench_plan_processes.py`: peak memory of each process, {planned[0]['shape']} shape, "
            f"{int(planned[0]['context']):,} tokens, {planned[0]['dtype']}, gloo. {origin(planned)}.",
            table(head, ([row[column] for column in columns] for row in planned)),
        ]
    if steps := newest("sequence", "ranks"):
        lines = (
            [row["ranks"], row["tokens_per_rank"], row["seconds_p50"], row["processor_seconds_p50"]] for row in steps
        )
        parts += [
            "`python benchmarks/bench_sequence.py`: a step of rows cut across processes, as many tokens on each; "
            f"one thread a process, on two cores. {origin(steps)}.",
            table(["processes", "tokens on each", "seconds (median)", "processor seconds of the busiest"], lines),
        ]
    if curve := newest("sequence_curve", "run", "context", "step"):
        runs = list(dict.fromkeys(row["run"] for row in curve))
        found = {(row["run"], row["step"]): row["loss"] for row in curve}
        lines = ([step, *(found[run, step] for run in runs)] for step in dict.fromkeys(row["step"] for row in curve))
        parts += [
            f"`python benchmarks/bench_sequence_curve.py`: loss of steps of SmolLM2-135M-Instruct, "
            f"{curve[0]['dtype']}, rows of {curve[0]['context']} tokens, by one process and by two. {origin(curve)}.",
            table(["step", *runs], lines),
        ]
    return ["## Several processes", *parts] if parts else []


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


def draw(rows: list[Row]) -> str:
    """Time and memory against context, as SVG."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    contexts = sorted({int(row["context"]) for row in rows})
    for axis, column, scale, label in zip(
        figure.subplots(1, 2), ("seconds", "peak_mb"), (1, 1000), ("seconds a step", "peak memory, GB"), strict=True
    ):
        for variant, name in VARIANTS.items():
            mine = sorted((int(r["context"]), float(r[column])) for r in rows if r["variant"] == variant and r[column])
            axis.plot([x for x, _ in mine], [y / scale for _, y in mine], marker="o", label=f"({variant}) {name}")
        axis.set(xscale="log", ylim=(0, None), xlabel="tokens in a step", ylabel=label)
        axis.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "longlora", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    rounded = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", buffer.getvalue())
    return "\n".join(line.rstrip() for line in rounded.splitlines()) + "\n"


def page() -> str:
    """The text of results.md."""
    steps, alone = (
        newest("train_step", "shape", "variant", "context"),
        newest("attention", "shape", "tokens", "group", "way"),
    )
    planned = newest("plan", "point")
    parts = [
        "# Measured results",
        "Written by `docs/make_results.py` from `benchmarks/results`; what each script measures and what was missed: "
        "[log.md](log.md). Times are from a shared machine; compare within a table.",
    ]
    if steps:
        parts += [
            "## A whole training step",
            f"`python benchmarks/bench_train_step.py`: {steps[0]['shape']}'s shape with random weights, one row a step,"
            f" bfloat16, each point in its own process. {origin(steps)}.",
            "![Time and memory of a step against context](results/train_step.svg)",
            train_step(steps),
        ]
    if alone:
        parts += [
            "## Attention alone",
            f"`python benchmarks/bench_attention.py`: forward and backward, bfloat16, median seconds. {origin(alone)}.",
            attention(alone),
        ]
    if planned:
        parts += [
            "## What `longlora plan` says and what happens",
            f"`python benchmarks/bench_plan.py`: random weights, groups of 1,024. {origin(planned)}.",
            plan(planned),
        ]
    parts += several_processes()
    parts += evaluation()
    parts += instructions()
    return "\n\n".join(parts) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    steps = newest("train_step", "shape", "variant", "context")
    if steps:
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_text(draw(steps), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
