"""A long run of a tiny model: memory, open files, threads and disk stay what they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_jobs import prepared
from fault_jobs import soak
from killing import run_whole

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what a process holds is read from /proc")

Rows = list[dict[str, int]]
_LOGGED_BYTES = 400
"""Of a step in metrics.jsonl and in trainer_state.json, of which two are kept."""


def held(folder: Path, model: Path, steps: int, save_steps: int, seconds: int) -> Rows:
    """What a run held after each of its checkpoints."""
    settings = (f"train.steps={steps}", f"train.save_steps={save_steps}", "train.save_total_limit=2")
    recipe = prepared(folder, model, *settings, "train.grad_accum_steps=1", "adapter.lora_dropout=0.1")
    samples = folder / "samples.jsonl"
    run_whole(soak, (recipe.run_path, samples), seconds)
    return [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]


def require_flat(rows: Rows, megabytes: float) -> None:
    """The last quarter against the first one, after what is loaded once was loaded."""
    settled = rows[len(rows) // 5 :]
    quarter = max(1, len(settled) // 4)
    first, last = settled[:quarter], settled[-quarter:]

    def growth(name: str) -> int:
        return max(row[name] for row in last) - max(row[name] for row in first)

    assert growth("resident") < megabytes * 2**20, [row["resident"] for row in rows]
    for name in ("open_files", "threads", "files"):
        assert growth(name) <= 0, (name, [row[name] for row in rows])
    steps = last[-1]["step"] - first[-1]["step"]
    assert growth("bytes") < 3 * _LOGGED_BYTES * steps, [row["bytes"] for row in rows]


def test_forty_steps(tmp_path: Path, tiny_model_folder: Path) -> None:
    rows = held(tmp_path, tiny_model_folder, 40, 2, 120)
    assert [row["step"] for row in rows] == list(range(2, 41, 2))
    require_flat(rows, megabytes=6)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_thousand_steps(tmp_path: Path, tiny_model_folder: Path) -> None:
    rows = held(tmp_path, tiny_model_folder, 2000, 10, 7000)
    assert rows[-1]["step"] == 2000
    for row in rows[:: len(rows) // 8]:
        print(row)
    require_flat(rows, megabytes=5)
