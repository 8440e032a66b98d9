"""Ctrl-C and SIGTERM while training: the step under way is finished and saved; a second signal ends at once.

Python raises KeyboardInterrupt wherever it happens to be, also where libraries swallow it (a weak reference's callback,
a hook inside of autograd). So the first signal only leaves a note, which is read between steps.

Several processes get a signal in different steps, or only some of them do, so that they agree between steps. A second
signal does nothing to them: a cluster sends it to the launcher and to each process, and the launcher sends it on. It
kills after 30 seconds what has not ended by then.
"""

from __future__ import annotations

import contextlib
import signal
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from longlora.errors import InterruptedRunError
from longlora.training.collectives import largest
from longlora.training.distributed import Ranks

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Inside of its ``with`` block a signal makes the trainer save and stop, and the block raise `InterruptedRunError`.

    Outside of the main thread, which alone may handle signals, it does nothing.
    """

    def __init__(self, console: Console, ranks: Ranks | None = None) -> None:
        self._console, self._ranks = console, ranks or Ranks()
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._step = 0

    def __enter__(self) -> StopOnSignal:
        try:
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        except ValueError:  # not the main thread
            self._before = {}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self._received = self._received is not None, signal.Signals(number)
        several = self._ranks.world > 1
        if several and again:
            return
        if not several:
            self._restore()
        once_more = "" if several else "; once more stops at once"
        with contextlib.suppress(RuntimeError):  # it came while something else was being printed
            self._console.print(f"stopping after this step, which is saved first{once_more}", highlight=False)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step = state.global_step
        if self._agreed():
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Another step, which may take minutes, need not be waited for: this one is saved."""
        if self._agreed():
            control.should_training_stop = True

    def _agreed(self) -> bool:
        """Whether any process got a signal."""
        number = int(largest(self._ranks, self._received or 0))
        if number:
            self._received = signal.Signals(number)
        return number != 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Where another process is gone, the launcher's signal must not end this one before it has said so.
        if error is None or self._ranks.world == 1:
            self._restore()
        # After the last step too: none may leave while others go on.
        if error is None and self._agreed() and self._received:
            raise InterruptedRunError(
                f"interrupted by {self._received.name}; step {self._step} is saved, `longlora resume` goes on from it",
                128 + self._received,
            )
