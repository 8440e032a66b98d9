"""Write docs/results.md and its picture from the rows of benchmarks/results: ``python docs/make_results.py``.

Of each point the newest row counts, on the device of the last row. What a table says of a run, its last column says of
where it is from.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "benchmarks" / "results"
PAGE, PICTURE = ROOT / "docs" / "results.md", ROOT / "docs" / "results" / "train_step.svg"

Row = dict[str, str]
VARIANTS = {
    "a": "Trainer, PEFT LoRA, full attention",
    "b": "the same with the paper's Algorithm 1, groups of T/4",
    "c": "longlora, groups of T/4",
    "d": "longlora, groups of 2,048 and 4 sink tokens",
}
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


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    marks = ["---", *["---:"] * (len(head) - 1)]
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
