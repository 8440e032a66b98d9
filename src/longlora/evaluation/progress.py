"""How far an evaluation is, and how long it still takes: one line for each finished item, or a bar on a terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from longlora.duration import clock

_LINE_SECONDS = 10.0


class CostProgress:
    """Progress over items of known relative cost; time left follows from the cost done per second so far."""

    def __init__(self, console: Console, name: str, total: float) -> None:
        self._console, self._name, self._total = console, name, max(total, 1e-9)
        self._began = self._printed = time.monotonic()
        self._done = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> CostProgress:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("left {task.fields[left]}"), console=self._console)
            self._task = self._bar.add_task(self._name, total=self._total, left="?")
            self._bar.start()
        return self

    def advance(self, cost: float, item: str) -> None:
        """One more item is finished; without a terminal a line is printed every ten seconds at most."""
        self._done += cost
        left = clock(self.seconds_left)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=f"{self._name}: {item}", left=left)
            return
        now = time.monotonic()
        if now - self._printed >= _LINE_SECONDS or self._done >= self._total:
            share = min(1.0, self._done / self._total)
            self._console.print(f"{self._name}: {item}  {share:.0%}  left {left}", highlight=False)
            self._printed = now

    @property
    def seconds_left(self) -> float:
        """By the rate so far; infinite before the first item."""
        elapsed = time.monotonic() - self._began
        return elapsed / self._done * max(0.0, self._total - self._done) if self._done else float("inf")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
