"""What one process plans for all of a run: the machine has as many devices as there are processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launch_cases import prepared_run
from rich.console import Console

from longlora.errors import PlanError
from longlora.model.build import load_config
from longlora.model.rope import rescale_for
from longlora.planning.machines import Machine, this_machine
from longlora.training import start
from longlora.training.distributed import Ranks

TWO_OF_FOUR = Ranks(rank=0, world=4, local_rank=0, local_world=2)


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> list[Machine]:
    """What a run is planned on; the other processes answer what this one says, one has half its memory."""
    found: list[Machine] = []
    settle = start.settle_memory

    def noted(recipe: Any, config: Any, machine: Machine) -> Any:
        found.append(machine)
        return settle(recipe, config, machine)

    monkeypatch.setattr(start, "settle_memory", noted)
    monkeypatch.setattr(start, "from_main", lambda ranks, work: work())
    monkeypatch.setattr(start, "largest", lambda ranks, number: number / 2 if number < 0 else number)
    return found


def test_a_plan_counts_every_process_and_the_least_memory(
    tmp_path: Path, tiny_model_folder: Path, machines: list[Machine]
) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder, memory="check", parallel__shard="fsdp2")
    config, _ = rescale_for(recipe, load_config(recipe.model))
    settled, memory = start._settle(recipe, config, TWO_OF_FOUR, Console(quiet=True))
    alone = this_machine()
    (machine,) = machines
    assert (machine.count, machine.links.devices) == (4, 2)
    # Each of the two on this machine has half of it, and one of the four has half of that; other tests take some.
    assert machine.memory_bytes == pytest.approx(alone.memory_bytes / 4, rel=0.4)
    assert settled == recipe
    assert memory is not None
    _, whole = start._settle(recipe, config, replace(TWO_OF_FOUR, world=1, local_world=1), Console(quiet=True))
    assert whole is not None
    assert memory.peak != whole.peak, "four processes hold a quarter of what is sharded"


def test_what_does_not_fit_the_poorest_process_is_refused(
    tmp_path: Path, tiny_model_folder: Path, machines: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder, memory="check")
    config, _ = rescale_for(recipe, load_config(recipe.model))
    monkeypatch.setattr(start, "largest", lambda ranks, number: -1e6 if number < 0 else number)
    with pytest.raises(PlanError, match="context.context_length=128 needs .* not even the shortest context fits"):
        start._settle(recipe, config, TWO_OF_FOUR, Console(quiet=True))
