"""RULER scores by length and task, with their intervals; the average; and the tables task x length.

In: `Column`. Out: `Score` (0 to 100) and `Table`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from longlora.evaluation.report.compare import Column
from longlora.evaluation.report.shared import lengths_of, shared_retrieval
from longlora.evaluation.report.statistics import wilson_interval
from longlora.evaluation.report.tables import NOT_MEASURED, Cell, Row, Table, count_text, interval_text
from longlora.evaluation.retrieval.ruler import effective_length, weighted_average


@dataclass(frozen=True)
class Score:
    """A mean score from 0 to 100, its 95 % interval, and the prompts it rests on."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, mean: float, n: int) -> Score:
        """From a mean score between 0 and 1 over `n` prompts."""
        low, high = wilson_interval(mean * n, n)
        return cls(100 * mean, 100 * low, 100 * high, n)

    def cell(self, mark: str = "") -> Cell:
        shown = interval_text(self.low, self.high, 0)
        return Cell(f"{self.mean:.1f}", shown, self.mean, self.low, self.high, self.n, mark, self.mean / 100)


ByLength = Mapping[int, Mapping[str, Score]]


def ruler_scores(columns: Sequence[Column]) -> dict[Column, dict[int, dict[str, Score]]]:
    """Scores by column, length and task over the prompts that all models with any at that length answered."""
    found: dict[Column, dict[int, dict[str, Score]]] = {}
    for length in lengths_of(columns, "ruler"):
        for column, rows in shared_retrieval(columns, "ruler", lambda row, at=length: row.length == at).rows.items():  # type: ignore[misc]
            by_task: dict[str, list[float]] = {}
            for row in rows:
                by_task.setdefault(row.name, []).append(row.score)
            scores = {task: Score.of(sum(values) / len(values), len(values)) for task, values in by_task.items()}
            found.setdefault(column, {})[length] = scores
    return found


def average(scores: Mapping[str, Score]) -> Score:
    """Mean over tasks, each of the same weight.

    The interval is that of as many right and wrong answers as the smallest task has, times the tasks; splitting answers
    into tasks can only make the mean vary less.
    """
    n = len(scores) * min(score.n for score in scores.values())
    mean = sum(score.mean for score in scores.values()) / len(scores) / 100
    bounded = Score.of(min(max(mean, 0.0), 1.0), n)
    return Score(bounded.mean, bounded.low, bounded.high, sum(score.n for score in scores.values()))


def effective_cell(column: Column, by_length: ByLength) -> Cell:
    """The longest length whose average reaches the threshold of the column's settings, in tokens."""
    averages = {length: average(scores).mean for length, scores in by_length.items()}
    threshold = column.evaluation.settings.ruler.threshold
    longest = effective_length(averages, threshold)
    if longest is None:
        return Cell(f"below {min(averages)}", value=0.0, n=len(averages))
    return Cell(str(longest), value=float(longest), n=len(averages), mark=column.mark(longest))


def ruler_sentence(column: Column, by_length: ByLength) -> str:
    """The effective length in words and, of several lengths, the weighted averages of the paper's table 3."""
    threshold = column.evaluation.settings.ruler.threshold
    tasks = count_text(max(map(len, by_length.values())), "task")
    text = (
        f"{column.label}: effective length {effective_cell(column, by_length)} tokens, at the threshold of "
        f"{threshold:g} over {tasks}"
    )
    if len(by_length) < 2:
        return f"{text}."
    averages = {length: average(scores).mean for length, scores in by_length.items()}
    to_long, to_short = (weighted_average(averages, increasing) for increasing in (True, False))
    return f"{text}; average weighted towards long prompts {to_long:.1f}, towards short ones {to_short:.1f}."


def thresholds(columns: Sequence[Column]) -> str:
    """The thresholds of the models' settings, in words."""
    found = sorted({column.evaluation.settings.ruler.threshold for column in columns})
    return ", ".join(f"{threshold:g}" for threshold in found)


def ruler_table(column: Column, by_length: ByLength) -> Table:
    """Tasks x lengths of one model, then the average over tasks and the effective length."""
    lengths = sorted(by_length)
    tasks = list(dict.fromkeys(task for length in lengths for task in by_length[length]))
    rows = [Row(task, tuple(_cell(column, by_length, length, task) for length in lengths), key=task) for task in tasks]
    means = tuple(_with_count(average(by_length[length]), column.mark(length)) for length in lengths)
    rows.append(Row("average", means, key="average"))
    return Table(("task", *map(str, lengths)), tuple(rows), title=column.label)


def _cell(column: Column, by_length: ByLength, length: int, task: str) -> Cell:
    score = by_length[length].get(task)
    return NOT_MEASURED if score is None else _with_count(score, column.mark(length))


def _with_count(score: Score, mark: str) -> Cell:
    cell = score.cell(mark)
    return replace(cell, detail=f"{cell.detail} n={score.n}")
