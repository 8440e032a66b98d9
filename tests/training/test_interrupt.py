"""A signal while training: the step that is said to be saved is the one that is."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from longlora.errors import InterruptedRunError
from longlora.training.interrupt import StopOnSignal


class Control(SimpleNamespace):
    should_save = should_training_stop = False


def end_of_step(stop: StopOnSignal, step: int) -> Control:
    control = Control()
    stop.on_step_end(None, SimpleNamespace(global_step=step), control)  # type: ignore[arg-type]
    return control


def test_a_signal_stops_after_the_step_under_way() -> None:
    stop = StopOnSignal(Console(quiet=True))
    with pytest.raises(InterruptedRunError, match="interrupted by SIGTERM; step 4 is saved") as stopped, stop:
        assert not end_of_step(stop, 3).should_training_stop
        os.kill(os.getpid(), signal.SIGTERM)
        control = end_of_step(stop, 4)
        assert control.should_save
        assert control.should_training_stop
    assert stopped.value.exit_code == 143


def test_a_signal_behind_the_last_step_names_that_step() -> None:
    stop = StopOnSignal(Console(quiet=True))
    with pytest.raises(InterruptedRunError, match="step 7 is saved"), stop:
        end_of_step(stop, 7)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_signal_stops_at_once(request: pytest.FixtureRequest) -> None:
    stop = StopOnSignal(Console(quiet=True))
    # A shell starts background jobs with SIGINT ignored, and tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt), stop:
        os.kill(os.getpid(), signal.SIGINT)
        while not end_of_step(stop, 1).should_save:  # two signals on their way at the same time are one
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


def test_a_note_that_cannot_be_printed_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(quiet=True)

    def reentrant(*arguments: object, **options: object) -> None:
        raise RuntimeError("reentrant call inside a writer")

    monkeypatch.setattr(console, "print", reentrant)
    stop = StopOnSignal(console)
    with pytest.raises(InterruptedRunError, match="step 2 is saved"), stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert end_of_step(stop, 2).should_save
