"""The report's figures as SVG text that can be put into one HTML page many times.

In: `Evaluation` by variant, or training rows. Out: SVG strings. Ids are prefixed with the name of the plot; axes and
text have the colour of the surrounding text (``currentColor``), so a figure reads in light and dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from longlora.evaluation.records import (
    LABELS,
    VARIANTS,
    Evaluation,
    PasskeyRow,
    PositionRow,
    TrainingRow,
    shared_passkey,
    shared_positions,
)
from longlora.evaluation.statistics import mean_interval, token_weighted_mean

# Okabe-Ito vermillion and blue (lightened to show on black): told apart with any colour vision. base takes the ink.
_INK = "#010203"
_COLOURS = {"base": _INK, "rope_only": "#d55e00", "trained": "#0080c8"}
_MARKERS = {"base": "s", "rope_only": "^", "trained": "o"}
_DASHES = {"base": ":", "rope_only": "--", "trained": "-"}
_FONTS = "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
_WIDTH = 5.6  # inches; 9 point text then stays legible from a phone to a desktop
_MAX_DEPTHS = 8
_QUARTERS = ("0-25 %", "25-50 %", "50-75 %", "75-100 %")


def loss_by_position(evaluations: Mapping[str, Evaluation], name: str = "position") -> str | None:
    """Loss (nats per token) over position (tokens), token-weighted over the documents all variants share.

    A second panel shows the lower curves alone when one variant's loss would flatten the others. None without rows.
    """
    rows = shared_positions(evaluations)
    if not rows:
        return None
    curves = {variant: _curve(item) for variant, item in rows.items()}
    original = next(iter(evaluations.values())).original_context_length
    narrow = _narrow_range([losses for _, losses in curves.values()])
    figure, panels = _panels(2 if narrow else 1, 2.2)
    for axes in panels:
        _style(axes, "loss (nats/token)")
        for variant, (positions, losses) in curves.items():
            _line(axes, positions, losses, variant)
        _mark_original(axes, original)
        _position_axis(axes, next(iter(rows.values())))
    if narrow:
        panels[-1].set_ylim(*narrow)
        panels[-1].set_title("same curves, loss axis cut above", fontsize=9, color=_INK, loc="left")
    panels[-1].set_xlabel("position in the document (tokens)", color=_INK, fontsize=9)
    _legend(panels[0])
    return _svg(figure, name, "Line plot: loss by position for each variant")


def _narrow_range(curves: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The range of all curves but the highest, if that one would press them into less than a third of the axis."""
    floor = min(min(values) for values in curves)
    tops = sorted(max(values) for values in curves)
    if len(curves) < 2 or tops[-1] - floor <= 3 * (tops[-2] - floor):
        return None
    margin = 0.1 * (tops[-2] - floor) or 0.1
    return floor - margin, tops[-2] + margin


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, 0.8 + height * count), layout="constrained")
    return figure, list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def _curve(rows: Sequence[PositionRow]) -> tuple[list[float], list[float]]:
    ranges: dict[int, list[PositionRow]] = {}
    for row in sorted(rows, key=lambda row: row.start):
        ranges.setdefault(row.start, []).append(row)
    middles = [(start + max(row.stop for row in inside)) / 2 for start, inside in ranges.items()]
    means = [token_weighted_mean([row.loss for row in i], [row.tokens for row in i]) for i in ranges.values()]
    return middles, means


def _position_axis(axes: Axes, rows: Sequence[PositionRow]) -> None:
    """Logarithmic where the ranges grow with position, linear otherwise; ticks at binary parts of the end."""
    end = max(row.stop for row in rows)
    first = min(rows, key=lambda row: row.start)
    if max(row.stop - row.start for row in rows) > 4 * (first.stop - first.start):
        axes.set_xscale("log", base=2)
        axes.set_xlim(right=end * 1.05)
        _ticks(axes, [end >> shift for shift in range(6, -1, -1)])
    else:
        axes.set_xlim(0, end * 1.01)
        _ticks(axes, [end * part // 4 for part in range(5)])


def passkey_heatmap(evaluations: Mapping[str, Evaluation], variant: str, name: str | None = None) -> str | None:
    """Passkey retrieval of `variant` by length (tokens) and depth: ``correct/keys`` and mean log-probability (nats).

    Depths fall into quarters when there are many of them or not every depth was asked at every length, as with keys
    hidden in documents. The axes cover the rows of all variants, so maps can be compared. None without rows.
    """
    everything = [row for item in evaluations.values() for row in item.passkey]
    rows = evaluations[variant].passkey if variant in evaluations else []
    if not rows:
        return None
    lengths = sorted({row.length for row in everything})
    depths = sorted({row.depth for row in everything})
    grid = {(row.length, row.depth) for row in everything}
    in_quarters = len(depths) > _MAX_DEPTHS or len(grid) < len(lengths) * len(depths)
    names = list(_QUARTERS) if in_quarters else [f"{depth * 100:g} %" for depth in depths]

    def line(row: PasskeyRow) -> int:
        return min(int(row.depth * 4), 3) if in_quarters else depths.index(row.depth)

    figure = Figure(figsize=(0.8 + 0.56 * len(lengths), 0.85 + 0.4 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for y in range(len(names)):
        for x, length in enumerate(lengths):
            _heat_cell(axes, x, y, [row for row in rows if row.length == length and line(row) == y])
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, colors=_INK, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(LABELS[variant], fontsize=10, color=_INK, loc="left")
    axes.set_xlabel("prompt length (tokens)", color=_INK, fontsize=9)
    axes.set_ylabel("depth of the key", color=_INK, fontsize=9)
    return _svg(figure, name or f"passkey-{variant}", f"Heat map: passkey retrieval, {LABELS[variant]}", scale=1.4)


def _heat_cell(axes: Axes, x: int, y: int, rows: Sequence[PasskeyRow]) -> None:
    if not rows:
        axes.text(x, y, "-", ha="center", va="center", fontsize=8, color=_INK)
        return
    correct = sum(row.correct for row in rows)
    share = correct / len(rows)
    mean = mean_interval([row.log_probability for row in rows]).mean
    colour = matplotlib.colormaps["cividis"](share)
    axes.fill([x - 0.48, x + 0.48, x + 0.48, x - 0.48], [y - 0.47, y - 0.47, y + 0.47, y + 0.47], color=colour, lw=0)
    ink = "white" if share < 0.45 else "#000001"  # pure black would be left out of the SVG
    axes.text(x, y - 0.17, f"{correct}/{len(rows)}", ha="center", va="center", fontsize=9, weight="bold", color=ink)
    axes.text(x, y + 0.2, f"{mean:.2f}", ha="center", va="center", fontsize=8, color=ink)


def passkey_by_length(evaluations: Mapping[str, Evaluation], name: str = "passkey-length") -> str | None:
    """Mean log-probability of the key (nats) by prompt length (tokens), with 95 % t intervals. None without rows."""
    lengths = sorted({row.length for item in evaluations.values() for row in item.passkey})
    by_length = {length: shared_passkey(evaluations, partial(_has_length, length)) for length in lengths}
    variants = [variant for variant in VARIANTS if any(variant in rows for rows in by_length.values())]
    if not variants:
        return None
    points = {variant: _means_by_length(by_length, variant) for variant in variants}
    # Worse is lower here, so the axis is cut below.
    narrow = _narrow_range([[half - mean for mean, half in item.values()] for item in points.values()])
    figure, panels = _panels(2 if narrow else 1, 1.9)
    gap = 0.012 * (lengths[-1] - lengths[0] or lengths[0])
    for axes in panels:
        _style(axes, "log-probability (nats)")
        for index, (variant, item) in enumerate(points.items()):
            # Set apart sideways, or equal intervals would hide each other.
            places = [length + gap * (index - (len(points) - 1) / 2) for length in item]
            means, halves = [mean for mean, _ in item.values()], [half for _, half in item.values()]
            _line(axes, places, means, variant)
            axes.errorbar(places, means, yerr=halves, fmt="none", ecolor=_COLOURS[variant], elinewidth=1.2, capsize=3)
        _mark_original(axes, next(iter(evaluations.values())).original_context_length, at_top=False)
        _ticks(axes, lengths)
    if narrow:
        panels[-1].set_ylim(-narrow[1], max(-narrow[0], 0.1))
        panels[-1].set_title("same points, axis cut below", fontsize=9, color=_INK, loc="left")
    panels[-1].set_xlabel("prompt length (tokens)", color=_INK, fontsize=9)
    _legend(panels[0])
    return _svg(figure, name, "Plot: mean log-probability of the passkey by prompt length")


def _means_by_length(
    by_length: Mapping[int, Mapping[str, Sequence[PasskeyRow]]], variant: str
) -> dict[int, tuple[float, float]]:
    """Mean and half width of the interval by length; the half width of a single key is 0."""
    points = {}
    for length, rows in by_length.items():
        if variant in rows:
            mean, low, _ = mean_interval([row.log_probability for row in rows[variant]])
            points[length] = (mean, 0.0 if low is None else mean - low)
    return points


def training_curve(rows: Sequence[TrainingRow], name: str = "training") -> str | None:
    """Training loss (nats per token) by step, with a running mean from 40 steps on. None without rows."""
    if not rows:
        return None
    steps, losses = [row.step for row in rows], [row.loss for row in rows]
    figure = Figure(figsize=(_WIDTH, 2.6), layout="constrained")
    axes = figure.add_subplot()
    _style(axes, "training loss (nats/token)")
    smooth = len(rows) >= 40
    axes.plot(
        steps,
        losses,
        color=_COLOURS["trained"],
        lw=0.8 if smooth else 1.5,
        alpha=0.45 if smooth else 1,
        marker="o" if len(rows) < 40 else "",
        ms=3,
        label="each logged step",
    )
    if smooth:
        window = len(rows) // 20
        means = [sum(losses[i - window : i]) / window for i in range(window, len(losses) + 1)]
        axes.plot(steps[window - 1 :], means, color=_COLOURS["trained"], lw=1.8, label=f"mean of the last {window}")
        _legend(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel("step", color=_INK, fontsize=9)
    return _svg(figure, name, "Line plot: training loss by step")


def _style(axes: Axes, label: str) -> None:
    axes.set_ylabel(label, color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(axis="y", color="#888888", alpha=0.25, lw=0.6)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#888888")


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], variant: str) -> None:
    axes.plot(
        x,
        y,
        color=_COLOURS[variant],
        ls=_DASHES[variant],
        lw=1.6,
        label=LABELS[variant],
        marker=_MARKERS[variant] if len(x) <= 40 else "",
        ms=3.5,
    )


def _has_length(length: int, row: PasskeyRow) -> bool:
    return row.length == length


def _mark_original(axes: Axes, tokens: int, at_top: bool = True) -> None:
    axes.axvline(tokens, color="#888888", ls=(0, (4, 3)), lw=1, zorder=0)
    axes.annotate(
        "original context",
        (tokens, int(at_top)),
        xycoords=("data", "axes fraction"),
        xytext=(-3, -2 if at_top else 3),
        textcoords="offset points",
        ha="right",
        va="top" if at_top else "bottom",
        fontsize=8,
        color="#888888",
    )


def _ticks(axes: Axes, ticks: Sequence[int]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(tick) for tick in ticks])


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, labelcolor=_INK, fontsize=9, borderaxespad=0.2
    )


def _svg(figure: Figure, name: str, description: str, scale: float = 1.6) -> str:
    """The figure as an ``<svg>`` element; `scale` is its largest width in CSS pixels per point."""
    buffer = io.StringIO()
    # The SVG writer takes these two settings from nowhere else; the context puts the old ones back.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'xlink:href="#{name}-')
    # A style element inside SVG acts on the whole page.
    text = re.sub(r"(<style[^>]*>)\*\{", rf"\1[id^={name}-] *{{", text)
    text = text.replace(_INK, "currentColor")
    text = re.sub(r"font-family: [^;\"]*", f"font-family: {_FONTS}", text)
    width = figure.get_figwidth() * 72 * scale
    # It may grow to its largest width and shrink to a narrow screen; beside others it keeps four fifths of the largest.
    style = f"width: 100%; max-width: {width:.0f}px; flex: 1 1 {0.8 * width:.0f}px"
    tag, rest = text.split(">", 1)
    tag = re.sub(r'\s(width|height)="[^"]*"', "", tag)
    return f'{tag} role="img" aria-label="{escape(description)}" style="{style}">{rest}'
