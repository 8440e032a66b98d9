"""The report's figures: loss by position, perplexity and log-probability by length, and training.

In: `Comparison`. Out: SVG strings, or None where there are no rows to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from longlora.evaluation.report import plots
from longlora.evaluation.report.compare import Column, Comparison, Run
from longlora.evaluation.report.records import PerplexityRow, PositionRow
from longlora.evaluation.report.shared import groups_of, kinds_of, shared_perplexity, shared_positions, shared_retrieval
from longlora.evaluation.report.statistics import MeanInterval, log_probability_interval, token_weighted_mean
from longlora.evaluation.report.summary import bits_per_byte, loss_interval, perplexity, perplexity_lengths

_SMOOTHED_FROM = 40  # logged steps


def loss_by_position(comparison: Comparison, name: str = "position") -> str | None:
    """Loss (nats per token) over position (tokens), token-weighted over the documents all models share.

    A second panel shows the lower curves alone when one model's loss would flatten the others.
    """
    found = shared_positions(comparison.columns)
    if not found.rows:
        return None
    curves = {column: _by_position(rows) for column, rows in found.rows.items()}
    narrow = plots.narrow_range([losses for _, losses in curves.values()])
    figure, panels = plots.panels(2 if narrow else 1, 2.2)
    for axes in panels:
        plots.style(axes, "loss (nats/token)")
        for column, (positions, losses) in curves.items():
            plots.line(axes, positions, losses, column)
        _position_axis(axes, found.first)
    plots.mark_original(panels, curves)
    if narrow:
        panels[-1].set_ylim(*narrow)
        plots.note(panels[-1], "same curves, loss axis cut above")
    plots.x_label(panels[-1], "position in the document (tokens)")
    plots.legend(panels[0])
    ends = {
        c.label: f"{y[0]:.2f} around token {x[0]:.0f}, {y[-1]:.2f} around {x[-1]:.0f}" for c, (x, y) in curves.items()
    }
    return plots.to_svg(figure, name, f"Line plot: loss in nats per token by position. {_spoken(ends)}")


def _spoken(texts: Mapping[str, str]) -> str:
    return "; ".join(f"{label}: {text}" for label, text in texts.items())


def _by_position(rows: Sequence[PositionRow]) -> tuple[list[float], list[float]]:
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
        plots.x_ticks(axes, [end >> shift for shift in range(6, -1, -1) if end >> shift])
    else:
        axes.set_xlim(0, end * 1.01)
        plots.x_ticks(axes, [end * part // 4 for part in range(5)])


def perplexity_by_length(comparison: Comparison, name: str = "perplexity") -> str | None:
    """Perplexity over context length (tokens), both logarithmic; hollow points lie beyond what the RoPE covers.

    With several tokenizers bits per byte on a linear axis, which compare. None with fewer than two lengths.
    """
    measure = _perplexity if comparison.one_tokenizer else _bits
    points: dict[Column, dict[int, float]] = {}
    for length in perplexity_lengths(comparison):
        found = shared_perplexity(
            comparison.columns, length, lambda row: comparison.one_tokenizer or row.text_bytes is not None
        )
        for column, rows in found.rows.items():
            points.setdefault(column, {})[length] = measure(rows)
    lengths = sorted({length for values in points.values() for length in values})
    if len(lengths) < 2:
        return None
    figure, (axes,) = plots.panels(1, 2.4)
    title = "perplexity" if comparison.one_tokenizer else "bits per byte"
    plots.style(axes, title)
    for column, values in points.items():
        plots.line(axes, list(values), list(values.values()), column)
        _hollow(axes, column, {length: value for length, value in values.items() if column.mark(length)})
    axes.set_xscale("log", base=2)
    plots.x_ticks(axes, lengths)
    if comparison.one_tokenizer:
        _log_values(axes, [value for values in points.values() for value in values.values()])
    plots.mark_original([axes], points)
    plots.x_label(axes, "context length (tokens)")
    plots.legend(axes)
    spoken = {
        c.label: ", ".join(f"{value:.2f} at {at}" for at, value in values.items()) for c, values in points.items()
    }
    return plots.to_svg(figure, name, f"Line plot: {title} by context length in tokens. {_spoken(spoken)}")


def _perplexity(rows: Sequence[PerplexityRow]) -> float:
    return perplexity(loss_interval(rows).mean)


def _bits(rows: Sequence[PerplexityRow]) -> float:
    return token_weighted_mean([bits_per_byte(row) for row in rows], [row.text_bytes or 0 for row in rows])


def _hollow(axes: Axes, column: Column, points: Mapping[float, float]) -> None:
    look = plots.Look.of(column)
    x, y = list(points), list(points.values())
    axes.plot(x, y, marker=look.marker, mec=look.colour, mfc=plots.PAPER, ls="", ms=5, zorder=3)


def _log_values(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis with plain numbers, many of them where the values lie close together."""
    axes.set_yscale("log")
    wide = max(values) > 20 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if wide else (1, 1.5, 2, 3, 4, 5, 6, 8), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def log_probability_by_length(comparison: Comparison, task: str, kind: str) -> str | None:
    """Mean log-probability of the right answer (nats) by prompt length (tokens), with 95 % t intervals; hollow points
    lie beyond what the RoPE covers."""
    points: dict[Column, dict[int, MeanInterval]] = {}
    for prompts in groups_of(comparison.columns, task, kind):
        found = shared_retrieval(
            comparison.columns,
            task,
            lambda row, p=prompts: p.holds(row) and row.log_probability is not None,  # type: ignore[misc]
        )
        for column, rows in found.rows.items():
            points.setdefault(column, {})[prompts.high] = log_probability_interval(
                [row.log_probability or 0.0 for row in rows]
            )
    lengths = sorted({length for values in points.values() for length in values})
    if not points:
        return None
    # Worse is lower here, so the axis is cut below.
    narrow = plots.narrow_range(
        [[_reach(item)[0] - item.mean for item in values.values()] for values in points.values()]
    )
    figure, panels = plots.panels(2 if narrow else 1, 1.9)
    gap = 0.012 * (lengths[-1] - lengths[0] or lengths[0])
    for axes in panels:
        plots.style(axes, "log-probability (nats)")
        for index, (column, values) in enumerate(points.items()):
            # Set apart sideways, or equal intervals would hide each other.
            places = [length + gap * (index - (len(points) - 1) / 2) for length in values]
            means = [item.mean for item in values.values()]
            reach = list(zip(*map(_reach, values.values()), strict=True))
            plots.line(axes, places, means, column)
            beyond = {at: mean for at, mean, length in zip(places, means, values, strict=True) if column.mark(length)}
            _hollow(axes, column, beyond)
            colour = plots.Look.of(column).colour
            axes.errorbar(places, means, yerr=reach, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3)
        plots.x_ticks(axes, _apart(lengths))
    plots.mark_original(panels, points, at_top=False)
    if narrow:
        panels[-1].set_ylim(-narrow[1], max(-narrow[0], 0.1))
        plots.note(panels[-1], "same points, axis cut below")
    plots.x_label(panels[-1], "prompt length (tokens)")
    plots.legend(panels[0])
    spoken = {c.label: ", ".join(f"{i.mean:.2f} at {at}" for at, i in values.items()) for c, values in points.items()}
    asked, number = f"{task} {kind}".strip(), kinds_of(comparison.columns, task).index(kind)
    text = f"Plot: mean log-probability of the right answer in nats, {asked}, by prompt length. {_spoken(spoken)}"
    return plots.to_svg(figure, f"{task}-length{number}", text)


def _reach(interval: MeanInterval) -> tuple[float, float]:
    """How far the interval goes below and above its mean; 0 for a single value."""
    mean, low, high = interval
    return (0.0, 0.0) if low is None or high is None else (mean - low, high - mean)


def _apart(lengths: Sequence[int]) -> list[int]:
    """The lengths without those whose labels would run into the next one on a linear axis."""
    kept: list[int] = []
    for length in reversed(lengths):
        if not kept or kept[-1] - length >= 0.11 * lengths[-1]:
            kept.append(length)
    return kept[::-1]


def training_curves(runs: Sequence[Run], name: str = "training") -> str | None:
    """Training loss (nats per token) by step of every run, with a running mean where many steps were logged."""
    shown = [run for run in runs if run.training]
    if not shown:
        return None
    figure, (axes,) = plots.panels(1, 2.0)
    plots.style(axes, "training loss (nats/token)")
    for run in shown:
        _training_curve(axes, run, several=len(shown) > 1)
    if len(shown) > 1 or len(shown[0].training) >= _SMOOTHED_FROM:
        plots.legend(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    plots.x_label(axes, "step")
    ends = {
        run.name: f"{run.training[0].loss:.2f} at step {run.training[0].step}, "
        f"{run.training[-1].loss:.2f} at step {run.training[-1].step}"
        for run in shown
    }
    return plots.to_svg(figure, name, f"Line plot: training loss in nats per token by step. {_spoken(ends)}")


def _training_curve(axes: Axes, run: Run, several: bool) -> None:
    # A folder whose trained model was not measured takes the colour of its last model.
    look = plots.Look.of(list(run.columns.values())[-1])
    steps, losses = [row.step for row in run.training], [row.loss for row in run.training]
    smooth = len(losses) >= _SMOOTHED_FROM
    label = plots.literal(run.training_label)
    if not smooth:
        axes.plot(steps, losses, color=look.colour, lw=1.5, marker=look.marker, ms=3, label=label)
    else:
        each = "" if several else "each logged step"
        axes.plot(steps, losses, color=look.colour, lw=0.7, alpha=0.35, label=each)
        window = len(losses) // 20
        means = [sum(losses[i - window : i]) / window for i in range(window, len(losses) + 1)]
        label = f"{label}, mean of {window}" if several else f"mean of the last {window}"
        axes.plot(steps[window - 1 :], means, color=look.colour, lw=1.8, label=label)
