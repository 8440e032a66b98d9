"""A signal while training: the step that is said to be saved is the one that is."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_jobs import metric_rows, prepared, result, signalled, steps_saved
from killing import fork_server
from rich.console import Console

from longlora.artifacts import RunFolder
from longlora.errors import InterruptedRunError
from longlora.training.checkpoint import newest_checkpoint
from longlora.training.interrupt import StopOnSignal
from longlora.training.trainer import train


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


def test_a_signal_while_a_step_is_saved_stops_behind_it() -> None:
    """The step is saved already: another one, which may take minutes, is not waited for."""
    stop = StopOnSignal(Console(quiet=True))
    with pytest.raises(InterruptedRunError, match="step 5 is saved"), stop:
        assert not end_of_step(stop, 5).should_save
        os.kill(os.getpid(), signal.SIGTERM)
        control = Control()
        stop.on_save(None, SimpleNamespace(global_step=5), control)  # type: ignore[arg-type]
        assert control.should_training_stop
        assert not control.should_save


@pytest.mark.parametrize(
    ("place", "said", "left"),
    [
        ("accumulating", "interrupted by SIGTERM; step 3 is saved", ["checkpoint-2", "checkpoint-3"]),
        ("saving", "interrupted by SIGTERM; step 2 is saved", ["checkpoint-2"]),
        # The second signal ends it at once, with the default of the system: it says nothing.
        ("saving twice", "", [".saving", "checkpoint-2"]),
    ],
)
def test_a_signal_within_a_step_or_a_save(
    tmp_path: Path, tiny_model_folder: Path, place: str, said: str, left: list[str]
) -> None:
    """And what is left is gone on from to the weights of an undisturbed run."""
    recipe = prepared(tmp_path, tiny_model_folder)
    path = tmp_path / "said.txt"
    process = fork_server("fault_jobs").Process(target=signalled, args=((recipe.run_path, place, path),))
    process.start()
    process.join(120)
    assert process.exitcode == (0 if said else -signal.SIGTERM)
    assert (path.read_text() if said else "").startswith(f"InterruptedRunError: {said}" if said else "")
    assert path.exists() == bool(said)
    assert steps_saved(recipe) == left
    newest, passed_over = newest_checkpoint(RunFolder(recipe.run_path).checkpoints, "adapter_model.safetensors")
    assert (newest.name, passed_over) == (left[-1], [])
    train(recipe, Console(quiet=True), resume=True)
    undisturbed = prepared(tmp_path, tiny_model_folder, run="undisturbed")
    train(undisturbed, Console(quiet=True))
    found, wanted = result(recipe), result(undisturbed)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert metric_rows(recipe) == metric_rows(undisturbed)
    assert ".saving" not in steps_saved(recipe)
