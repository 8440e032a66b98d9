"""What all figures share: axes, lines, legend, and SVG text that can be put into one HTML page many times.

In: numbers by `Column`. Out: matplotlib axes, and SVG strings. Ids are prefixed with the name of the plot; axes and
text have the colour of the surrounding text (``currentColor``), so a figure reads in light and dark mode.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from longlora.evaluation.report.compare import Column
from longlora.evaluation.report.tables import printable

INK = "#010203"
"""Stands for the colour of the surrounding text; no real colour of a figure."""
PAPER = "#fefdfc"
"""Stands for the colour of the page."""
QUIET = "#888888"
# Okabe-Ito, darkened or lightened to show on white and on black: told apart with any colour vision. The model as it
# came takes the ink.
_COLOURS = ("#d55e00", "#0080c8", "#009e73", "#cc79a7", "#b38600", "#56b4e9")
_MARKERS = ("s", "^", "o", "D", "v", "P", "X")
_DASHES = {"base": ":", "rope_only": "--", "trained": "-"}
_FONTS = "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
_WIDTH = 4.8  # inches; 9 point text then stays legible from a phone to a desktop
_LEGEND_LETTERS = 58  # that fit beside each other
_LEGEND_LINE = 0.19  # inches
MOST_MARKED = 40
"""Points up to which each has a marker."""


@dataclass(frozen=True)
class Look:
    """How one model is drawn, the same in every figure."""

    colour: str
    marker: str
    dash: str

    @classmethod
    def of(cls, column: Column) -> Look:
        colour = INK if column.tint == 0 else _COLOURS[(column.tint - 1) % len(_COLOURS)]
        return cls(colour, _MARKERS[column.tint % len(_MARKERS)], _DASHES[column.variant])


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """`count` axes above each other with one x axis, each `height` inches high."""
    figure = Figure(figsize=(_WIDTH, 0.8 + height * count), layout="constrained")
    return figure, list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def style(axes: Axes, label: str) -> None:
    """Two quiet axes with a light grid; `label` names the y axis."""
    axes.set_ylabel(label, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(axis="y", color=QUIET, alpha=0.25, lw=0.6)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(QUIET)


def line(axes: Axes, x: Sequence[float], y: Sequence[float], column: Column) -> None:
    """The curve of one model."""
    look = Look.of(column)
    marker = look.marker if len(x) <= MOST_MARKED else ""
    axes.plot(x, y, color=look.colour, ls=look.dash, lw=1.6, label=literal(column.label), marker=marker, ms=3.5)


def literal(text: str) -> str:
    """`text` as matplotlib must get it to show it as it is: without mathematics between dollar signs."""
    return printable(text).replace("$", r"\$")


def narrow_range(curves: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The range of all curves but the highest, if that one would press them into less than a third of the axis."""
    floor = min(min(values) for values in curves)
    tops = sorted(max(values) for values in curves)
    if len(curves) < 2 or tops[-1] - floor <= 3 * (tops[-2] - floor):
        return None
    margin = 0.1 * (tops[-2] - floor) or 0.1
    return floor - margin, tops[-2] + margin


def note(axes: Axes, text: str) -> None:
    """A small title over the left end of the axes."""
    axes.set_title(text, fontsize=9, color=INK, loc="left")


def x_label(axes: Axes, text: str) -> None:
    """What the x axis counts."""
    axes.set_xlabel(text, color=INK, fontsize=9)


def mark_original(panels: Sequence[Axes], columns: Iterable[Column], at_top: bool = True) -> None:
    """A line at the original context length of the models, named in the first panel; only where they have one in
    common. The x axis must have its limits."""
    tokens = {column.evaluation.original_context_length for column in columns}
    if len(tokens) != 1:
        return
    (at,) = tokens
    for axes in panels:
        axes.axvline(at, color=QUIET, ls=(0, (4, 3)), lw=1, zorder=0)
    first = panels[0]
    place = first.transAxes.inverted().transform(first.transData.transform((at, first.get_ylim()[0])))[0]
    to_the_right = place < 0.4
    first.annotate(
        "original context",
        (at, int(at_top)),
        xycoords=("data", "axes fraction"),
        xytext=(3 if to_the_right else -3, -2 if at_top else 3),
        textcoords="offset points",
        ha="left" if to_the_right else "right",
        va="top" if at_top else "bottom",
        fontsize=8,
        color=QUIET,
    )


def x_ticks(axes: Axes, ticks: Sequence[int]) -> None:
    """Ticks at these values, written out."""
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(tick) for tick in ticks])


def legend(axes: Axes) -> None:
    """Names of the curves above the axes, as many in a line as fit; the figure grows by further lines."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    longest = max(len(label) for label in labels) + 6
    columns = max(1, min(len(labels), 3, _LEGEND_LETTERS // longest))
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(figure.get_figheight() + _LEGEND_LINE * (-(-len(labels) // columns) - 1))
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize=9,
        borderaxespad=0.2,
    )


def to_svg(figure: Figure, name: str, description: str, scale: float = 1.6) -> str:
    """The figure as an ``<svg>`` element that `description` stands for where it cannot be seen.

    `scale` is its largest width in CSS pixels per point.
    """
    buffer = io.StringIO()
    # The SVG writer takes these two settings from nowhere else; the context puts the old ones back.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        # The browser has letters that the font measured with here has not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'xlink:href="#{name}-')
    # A style element inside SVG acts on the whole page.
    text = re.sub(r"(<style[^>]*>)\*\{", rf"\1[id^={name}-] *{{", text)
    text = text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    text = re.sub(r"font-family: [^;\"]*", f"font-family: {_FONTS}", text)
    width = figure.get_figwidth() * 72 * scale
    # It may grow to its largest width and shrink to a narrow screen; beside others it keeps four fifths of the largest.
    look = f"width: 100%; max-width: {width:.0f}px; flex: 1 1 {0.8 * width:.0f}px"
    tag, rest = text.split(">", 1)
    tag = re.sub(r'\s(width|height)="[^"]*"', "", tag)
    shown = escape(printable(description))
    return f'{tag} role="img" aria-label="{shown}" style="{look}">\n<title>{shown}</title>{rest}'
