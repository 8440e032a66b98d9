"""Training killed at any moment: started again, it gives what an undisturbed run gives, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_jobs import TIMES, prepared
from fault_jobs import train
from killing import files_in, kill_after, kill_at_change, run_whole

from longlora.artifacts import MANIFEST

SETTINGS = (
    "train.steps=5", "train.save_steps=1", "train.save_total_limit=2", "train.validation_steps=2",
    "train.validation_rows=2", "train.warmup_steps=2", "adapter.lora_dropout=0.1",
    "attention.full_attention_final_fraction=0.4",
)  # fmt: skip
_TIMES_IN_LOG = {"train_runtime", "train_tokens_per_second"}
_AGAIN = 1 / 3
"""How often a run that was killed is killed once more."""


def content(name: str, data: bytes) -> Any:
    """What a file says, without times and without the order of PEFT's sets."""
    if name.endswith("metrics.jsonl"):
        rows = map(json.loads, data.splitlines())
        return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    if name.endswith("adapter_config.json"):
        return {key: sorted(value) if isinstance(value, list) else value for key, value in json.loads(data).items()}
    if name.endswith("trainer_state.json"):
        state = json.loads(data)
        log = [{key: value for key, value in row.items() if key not in _TIMES_IN_LOG} for row in state["log_history"]]
        return state | {"log_history": log}
    if name.endswith(MANIFEST):  # which has the sums of the files above
        return {key: value for key, value in json.loads(data).items() if key != "files"}
    return data


class Case:
    """A prepared run, and what an undisturbed training leaves of it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.root = prepared(folder, model, *SETTINGS).run_path
        self.before = files_in(self.root)
        self.moments, self.seconds = run_whole(train, self.root)
        self.finished = self.left()
        assert {f"checkpoints/checkpoint-{step}/optimizer.pt" for step in (4, 5)} < self.finished.keys()
        assert "adapter/adapter_model.safetensors" in self.finished

    def left(self) -> dict[str, Any]:
        return {name: content(name, data) for name, data in files_in(self.root).items()}

    def start(self) -> None:
        shutil.rmtree(self.root)
        for name, data in self.before.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def kills_survived(self, draw: random.Random, *, at_change: bool) -> int:
        """Kill the run, perhaps again, and let it end; returns how often it was at work when it was killed."""
        self.start()
        kills = 0
        while True:
            if at_change:
                kills += kill_at_change(train, self.root, draw.randrange(1, self.moments + 1))
            else:
                kills += kill_after(train, self.root, draw.uniform(0, 1.1 * self.seconds))
            if draw.random() > _AGAIN:
                break
        run_whole(train, self.root)
        found = self.left()
        assert found.keys() == self.finished.keys(), "something was left behind, or is missing"
        differing = [name for name, value in self.finished.items() if found[name] != value]
        assert not differing, f"{differing} differ from those of the undisturbed run"
        return kills


@pytest.fixture
def case(tmp_path: Path, tiny_model_folder: Path) -> Case:
    return Case(tmp_path, tiny_model_folder)


def test_killed_at_a_few_moments(case: Case) -> None:
    draw = random.Random(6)
    assert sum(case.kills_survived(draw, at_change=at_change) for at_change in (True, False, True)) >= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_changes_on_the_disk_and_at_random(case: Case) -> None:
    seed = 7
    draw = random.Random(seed)
    at_changes, at_random = (until(60, case, draw, at_change=how) for how in (True, False))
    print(f"seed {seed}: survived {at_changes} kills before changes on the disk and {at_random} at random")


def until(kills: int, case: Case, draw: random.Random, *, at_change: bool) -> int:
    """Kill runs until so many were at work; times that were drawn on a busier machine may lie behind their end."""
    done = 0
    for _ in range(4 * kills):
        done += case.kills_survived(draw, at_change=at_change)
        if done >= kills:
            return done
    raise AssertionError(f"only {done} of {4 * kills} runs were killed at work")
