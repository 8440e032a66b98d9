"""Write docs/results.md and its pictures from the rows of benchmarks/results: ``python docs/make_results.py``.

Of each point the newest row counts, on the device of the last row. The evaluation of a real model is a ``results.json``
of `longlora report`. `results_rows.py` has what the sections share, `results_plots.py` the pictures.
"""

from __future__ import annotations

import json
from pathlib import Path

from results_ablations import ablations
from results_cost import attention, paper_ratios, plan, ratios_to_full, several_processes, train_step
from results_model import EVALUATION, evaluation, instructions
from results_original import original
from results_plots import before_and_after_picture, ratio_picture, step_picture
from results_rows import ROOT, newest, origin

PAGE, PICTURES = ROOT / "docs" / "results.md", ROOT / "docs" / "results"


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
    parts += ratios_to_full()
    parts += ablations()
    parts += original()
    parts += several_processes()
    parts += evaluation()
    parts += instructions()
    return "\n\n".join(parts) + "\n"


def pictures() -> dict[Path, str]:
    """File -> SVG, of what has been measured."""
    found = {}
    if steps := newest("train_step", "shape", "variant", "context"):
        found[PICTURES / "train_step.svg"] = step_picture(steps)
        found[PICTURES / "ratios.svg"] = ratio_picture(paper_ratios())
    if EVALUATION.exists():
        results = json.loads(EVALUATION.read_text(encoding="utf-8"))
        found[PICTURES / "before_and_after.svg"] = before_and_after_picture(results)
    return found


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for path, text in pictures().items():
        path.write_text(text, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
