"""`longlora merge` and `export` killed at any moment: the whole output or none of it, and the next one cleans up."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from export_cases import tiny_base, trained_run
from fault_jobs import export, merge
from killing import files_in, kill_after, kill_at_change, run_whole


def killed(root: Path, kills: int, seed: int) -> int:
    """How many of `kills` children that merge were killed at work; half of them at changes on the disk."""
    run, _ = trained_run(root / "run", tiny_base(root / "base"))
    argument = (run.adapter, run.merged)
    moments, seconds = run_whole(merge, argument)
    finished = files_in(run.root)
    shutil.rmtree(run.merged)
    draw, count = random.Random(seed), 0
    for number in range(kills):
        if number % 2:
            count += kill_after(merge, argument, draw.uniform(0, 1.1 * seconds))
        else:
            count += kill_at_change(merge, argument, draw.randrange(1, moments + 1))
        if run.merged.exists():
            assert files_in(run.merged).keys() == {
                name.removeprefix("merged/") for name in finished if name.startswith("merged/")
            }
        else:
            run_whole(merge, argument)
        assert files_in(run.root) == finished, "something was left behind, or the merge differs"
        shutil.rmtree(run.merged)
    return count


def test_merge_killed_at_a_few_moments(tmp_path: Path) -> None:
    assert killed(tmp_path, kills=4, seed=3) >= 2


@pytest.mark.slow
def test_merge_killed_at_random(tmp_path: Path) -> None:
    count = killed(tmp_path, kills=100, seed=4)
    print(f"seed 4: {count} of 100 killed at work, all survived")
    assert count >= 50


@pytest.mark.slow
def test_export_killed_at_random(tmp_path: Path) -> None:
    run, _ = trained_run(tmp_path / "run", tiny_base(tmp_path / "base"))
    output = tmp_path / "exports" / "out"
    moments, seconds = run_whole(export, (run.root, output))
    finished = files_in(output.parent)
    draw = random.Random(5)
    for number in range(40):
        shutil.rmtree(output)
        if number % 2:
            kill_after(export, (run.root, output), draw.uniform(0, 1.1 * seconds))
        else:
            kill_at_change(export, (run.root, output), draw.randrange(1, moments + 1))
        if not output.exists():
            run_whole(export, (run.root, output))
        assert files_in(output.parent) == finished
