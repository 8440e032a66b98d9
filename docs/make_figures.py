"""Draw the figures of docs/method.md into docs/figures/: ``python docs/make_figures.py`` (or ``make figures``).

Nothing is drawn by hand: the cells of attention matrices come from `figure_cells.py`. The SVG carries the sha256 of its
data, by which tests/test_docs.py sees that a figure is out of date.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from figure_cells import GROUP, LEAK, SHORT, SINK, UNSEEN, packed_cells, pattern_cells, rolled_cells
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline

from longlora.planning.flops import paper_attention_tflops, paper_linear_tflops

FIGURES = Path(__file__).parent / "figures"

# Okabe and Ito's colours, told apart with any colour vision; what is not seen is grey, the future stays white.
_COLOURS = {UNSEEN: "#e4e4e4", GROUP: "#0072b2", SINK: "#e69f00", SHORT: "#009e73", LEAK: "#d55e00"}
_LABELS = {
    UNSEEN: "earlier, not seen",
    GROUP: "same group",
    SINK: "sink token",
    SHORT: "document of at most one group",
    LEAK: "later token seen: a leak",
}
_INK = "#222222"
_STYLE = {
    "svg.hashsalt": "longlora",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}

# Llama-2-7B: layers, hidden size, width of the MLP.
_LAYERS, _HIDDEN, _MLP = 32, 4096, 11008
FIXED_GROUP = 2048
PAPER_RATIO = 4
# Forward pass at batch 1 in 10^12 operations: tokens, full attention, S2-Attn with four groups (paper, table 11).
PAPER_TABLE_11 = ((8192, 35.2, 8.8), (16384, 140.7, 35.2), (32768, 562.9, 140.7), (65536, 2251.8, 562.9))


def attention_operations(tokens: int, group_size: int) -> float:
    """Of Llama-2-7B, forward, in 10^12; see the planner."""
    return paper_attention_tflops(tokens, group_size, _LAYERS, _HIDDEN)


def linear_operations(tokens: int) -> float:
    """The same for all its linear layers."""
    return paper_linear_tflops(tokens, _LAYERS, _HIDDEN, _MLP)


@dataclass(frozen=True)
class Panel:
    """One attention matrix."""

    title: str
    rows: list[str]
    cuts: tuple[int, ...] = ()
    """Where a document ends and the next begins."""


def s2_pattern_panels() -> list[Panel]:
    """16 tokens, groups of 4."""
    return [
        Panel(f"{'shifted' if shifted else 'unshifted'} head, {sinks or 'no'} sink token{'' if sinks == 1 else 's'}",
              pattern_cells(16, 4, sinks, shifted=shifted))
        for sinks in (0, 1)
        for shifted in (False, True)
    ]  # fmt: skip


def leak_panels() -> list[Panel]:
    """A shifted head, 16 tokens, groups of 4."""
    return [
        Panel("rolled (paper, Algorithm 1)", rolled_cells(16, 4)),
        Panel("cut, not rolled (longlora)", pattern_cells(16, 4, 0, shifted=True)),
    ]


def packed_panels() -> list[Panel]:
    """Documents of 10, 3 and 9 tokens in one row, groups of 4, one sink token."""
    lengths = (10, 3, 9)
    cuts = tuple(int(cut) for cut in np.cumsum(lengths)[:-1])
    return [
        Panel(f"{'shifted' if shifted else 'unshifted'} head", packed_cells(lengths, 4, 1, shifted=shifted), cuts)
        for shifted in (False, True)
    ]


def cost_curves() -> dict[str, list[float]]:
    """Operations in 10^12 at the context lengths of "tokens"."""
    tokens = [2**power for power in range(11, 21)]
    return {
        "tokens": [float(count) for count in tokens],
        "full attention": [attention_operations(count, count) for count in tokens],
        "S2-Attn, group = context / 4": [attention_operations(count, count // PAPER_RATIO) for count in tokens],
        "S2-Attn, group = 2048": [attention_operations(count, FIXED_GROUP) for count in tokens],
        "linear layers": [linear_operations(count) for count in tokens],
    }


def draw_s2_pattern() -> Figure:
    return _matrices(s2_pattern_panels(), columns=4, size=(11.4, 3.75), legend=(GROUP, SINK, UNSEEN))


def draw_leak() -> Figure:
    return _matrices(leak_panels(), columns=2, size=(8.0, 4.7), legend=(GROUP, LEAK, UNSEEN), diagonal=True)


def draw_packed() -> Figure:
    return _matrices(packed_panels(), columns=2, size=(8.6, 5.0), legend=(GROUP, SINK, SHORT, UNSEEN))


def draw_cost() -> Figure:
    curves = cost_curves()
    tokens = curves["tokens"]
    styles = {
        "full attention": ("#d55e00", "-"),
        "S2-Attn, group = context / 4": ("#e69f00", "-"),
        "S2-Attn, group = 2048": ("#0072b2", "-"),
        "linear layers": ("#777777", "--"),
    }
    figure = Figure(figsize=(7.6, 4.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, (colour, dash) in styles.items():
        axes.plot(tokens, curves[name], dash, color=colour, linewidth=2.2)
        axes.annotate(name, (tokens[-1], curves[name][-1]), (7, 0), textcoords="offset points", va="center", color=_INK)
    points = [row[0] for row in PAPER_TABLE_11]
    for column in (1, 2):
        axes.plot(points, [row[column] for row in PAPER_TABLE_11], "o", markerfacecolor="none", markeredgecolor=_INK,
                  markersize=6, label="paper, table 11" if column == 1 else None)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(tokens[0], tokens[-1]))
    axes.set_xticks(tokens[::2], [f"{int(count) // 1024:,}k" for count in tokens[::2]])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("context length (tokens; k = 1024)")
    axes.set_ylabel("operations of a forward pass (10¹² FLOP)")
    axes.set_title("Llama-2-7B, one sequence, all layers", loc="left")
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False)
    return figure


def _matrices(
    panels: Sequence[Panel], columns: int, size: tuple[float, float], legend: Sequence[str], *, diagonal: bool = False
) -> Figure:
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    all_axes = figure.subplots(-(-len(panels) // columns), columns, sharey=True, squeeze=False).flat
    for number, (panel, axes) in enumerate(zip(panels, all_axes, strict=True)):
        _matrix(axes, panel)
        axes.set_xlabel("key position")
        if number % columns == 0:
            axes.set_ylabel("query position")
        if diagonal:
            # Along the upper edges of the cells in which a token sees itself: right of it lies the future.
            count = len(panel.rows)
            steps = [(x, y) for i in range(count) for x, y in ((i, i), (i + 1, i))] + [(count, count)]
            axes.plot(*zip(*steps, strict=True), color=_INK, linewidth=1.4)
    handles = [Patch(facecolor=_COLOURS[letter], label=_LABELS[letter]) for letter in legend]
    if diagonal:
        handles.append(Line2D([], [], color=_INK, linewidth=1.4, label="later tokens begin"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _matrix(axes: Axes, panel: Panel) -> None:
    count = len(panel.rows)
    # One path for all cells of a kind, neighbours in a row merged, and one for the grid: the files stay small.
    for letter, colour in _COLOURS.items():
        bars = [bar for query, row in enumerate(panel.rows) for bar in _bars(row, query, letter)]
        if bars:
            axes.add_patch(PathPatch(Outline.make_compound_path(*bars), facecolor=colour, linewidth=0))
    ends = [((0, i), (count, i)) for i in range(1, count)] + [((i, 0), (i, count)) for i in range(1, count)]
    grid = Outline([point for line in ends for point in line], [Outline.MOVETO, Outline.LINETO] * len(ends))
    axes.add_patch(PathPatch(grid, facecolor="none", edgecolor="white", linewidth=1.0))
    bounds = [0, *panel.cuts, count]
    for letter, start, stop in zip("ABCDEFGH", bounds, bounds[1:], strict=False):
        if panel.cuts:
            axes.text(stop - 0.5, start + 0.5, letter, ha="center", va="center", fontweight="bold")
    for cut in panel.cuts:
        axes.axhline(cut, color=_INK, linewidth=1.1, linestyle=(0, (4, 2)))
        axes.axvline(cut, color=_INK, linewidth=1.1, linestyle=(0, (4, 2)))
    ticks = range(0, count, 2 if count <= 16 else 3)
    axes.set(xlim=(0, count), ylim=(count, 0), aspect="equal")
    axes.set_xticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.set_yticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
    axes.tick_params(length=0)
    axes.spines[:].set_color("#999999")
    axes.set_title(panel.title)


def _bars(row: str, query: int, letter: str) -> Iterator[Outline]:
    """Rectangles over the neighbouring cells of a row that hold `letter`."""
    key = 0
    for found, cells in groupby(row):
        width = len(list(cells))
        if found == letter:
            corners = [(key, query), (key + width, query), (key + width, query + 1), (key, query + 1), (key, query)]
            yield Outline(corners, closed=True)
        key += width


@dataclass(frozen=True)
class _Plot:
    title: str
    draw: Callable[[], Figure]
    data: Callable[[], Any]


PLOTS = {
    "s2_pattern": _Plot(
        "Shifted sparse attention: attention of an unshifted and a shifted head, without and with a sink token",
        draw_s2_pattern,
        lambda: [(panel.title, panel.rows) for panel in s2_pattern_panels()],
    ),
    "leak": _Plot(
        "A shifted head of the paper's Algorithm 1, which lets the first half group see the end, and of longlora",
        draw_leak,
        lambda: [(panel.title, panel.rows) for panel in leak_panels()],
    ),
    "packed": _Plot(
        "Three documents packed in one row: the grid of groups restarts at each, a short one is attended in full",
        draw_packed,
        lambda: [(panel.title, panel.rows, panel.cuts) for panel in packed_panels()],
    ),
    "cost": _Plot(
        "Operations of attention against context length: full, group of a quarter of the context, group of 2048",
        draw_cost,
        lambda: (cost_curves(), PAPER_TABLE_11),
    ),
}


def data_digest(name: str) -> str:
    """sha256 of what figure `name` shows, whatever the version of matplotlib."""
    return hashlib.sha256(json.dumps(PLOTS[name].data()).encode()).hexdigest()


def stored_digest(svg: str) -> str | None:
    """The `data_digest` that an SVG file was drawn from."""
    found = re.search(r"data sha256 ([0-9a-f]{64})", svg)
    return found[1] if found else None


def svg_text(name: str) -> str:
    """Figure `name` as SVG: the same text for the same version of matplotlib."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        metadata = {"Date": None, "Title": PLOTS[name].title, "Description": f"data sha256 {data_digest(name)}"}
        PLOTS[name].draw().savefig(buffer, format="svg", metadata=metadata)
    rounded = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", buffer.getvalue())
    return "\n".join(line.rstrip() for line in rounded.splitlines()) + "\n"


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    for name in PLOTS:
        path = FIGURES / f"{name}.svg"
        path.write_text(svg_text(name), encoding="utf-8")
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
