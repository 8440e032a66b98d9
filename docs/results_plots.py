"""The pictures of results.md and the README, as SVG that is the same for the same rows."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results_cost import VARIANTS
from results_rows import Row

Series = dict[str, list[tuple[int, float]]]


def svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "longlora", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    rounded = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", buffer.getvalue())
    return "\n".join(line.rstrip() for line in rounded.splitlines()) + "\n"


def curves(axis: Axes, series: Series, label: str) -> None:
    """One line for each of `series`, against tokens."""
    for name, points in series.items():
        axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    lengths = sorted({x for points in series.values() for x, _ in points})
    axis.set(xscale="log", xlabel="tokens", ylabel=label)
    axis.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def two(left: tuple[Series, str], right: tuple[Series, str], *, from_zero: bool) -> Figure:
    """Two panels with a common legend below."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axis, (series, label) in zip(figure.subplots(1, 2), (left, right), strict=True):
        curves(axis, series, label)
        if from_zero:
            axis.set_ylim(0, None)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def step_picture(rows: list[Row]) -> str:
    """Time and memory of a training step against its tokens."""
    panels = []
    for column, scale, label in (("seconds", 1, "seconds a step"), ("peak_mb", 1000, "peak memory, GB")):
        series = {
            f"({variant}) {name}": sorted(
                (int(row["context"]), float(row[column]) / scale)
                for row in rows
                if row["variant"] == variant and row[column]
            )
            for variant, name in VARIANTS.items()
        }
        panels.append((series, label))
    return svg(two(*panels, from_zero=True))


def ratio_picture(ratios: dict[str, list[tuple[int, float, float]]]) -> str:
    """Time and memory of sparse over full attention; `ratios` are (tokens, time, memory) by who measured."""
    time = {name: [(tokens, time) for tokens, time, _ in points] for name, points in ratios.items()}
    memory = {name: [(tokens, memory) for tokens, _, memory in points] for name, points in ratios.items()}
    figure = two((time, "time: sparse / full attention"), (memory, "memory: sparse / full attention"), from_zero=True)
    for axis in figure.axes:
        axis.axhline(1, color="gray", linewidth=0.8)
    return svg(figure)


def before_and_after_picture(results: dict[str, Any]) -> str:
    """Loss and retrieval of the models of a report against length, from its results.json."""
    panels = []
    for pattern, label in (
        (r"loss/(\d+)", "loss of held-out documents, nats a token"),
        (r"passkey/(\d+)/log_probability", "passkey: log-probability, nats"),
    ):
        series = {}
        for model in results["models"]:
            found = ((re.fullmatch(pattern, key), cell) for key, cell in model["results"].items())
            series[model["label"]] = sorted((int(match[1]), cell["value"]) for match, cell in found if match)
        panels.append((series, label))
    figure = two(*panels, from_zero=False)
    original = results["models"][0]["original_context_length"]
    for axis in figure.axes:
        axis.axvline(original, color="gray", linestyle=":", linewidth=1)
        place = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "center", "fontsize": 8}
        axis.annotate("context of the base model ", (original, 0.5), **place)
    return svg(figure)
