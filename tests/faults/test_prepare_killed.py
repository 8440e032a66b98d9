"""`longlora prepare` killed at any moment: shards of one recipe or of none, and the next prepare starts clean."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from fault_jobs import prepare, recipe_file
from killing import files_in, kill_after, kill_at_change, run_whole
from tiny import bear_texts

from longlora.artifacts import RunFolder
from longlora.data.shards import open_shard


class Case:
    """A run that was prepared with one recipe, and another recipe to prepare it with."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.run = RunFolder(folder / "run")
        texts = bear_texts(folder / "texts")
        one, two, three, four = (str(texts / f"{number}.txt") for number in range(4))
        self.old = recipe_file(folder, model, "old", [one], [two])
        # The same text is held out first and trained on then: mixing the two would be the worst mistake.
        self.new = recipe_file(folder, model, "new", [two, three], [four])
        self.moments, self.seconds = run_whole(prepare, self.new)
        self.finished = files_in(self.run.root)
        shutil.rmtree(self.run.root)
        run_whole(prepare, self.old)
        self.before = files_in(self.run.root)
        assert self.before != self.finished

    def start(self) -> None:
        shutil.rmtree(self.run.root, ignore_errors=True)
        for name, content in self.before.items():
            path = self.run.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def check(self) -> None:
        """After a kill: nothing of the two recipes side by side that says it is prepared; then prepare again."""
        left = files_in(self.run.root)
        if self.run.recipe.exists():
            whole = self.before if left["recipe.yaml"] == self.before["recipe.yaml"] else self.finished
            assert {name: left.get(name) for name in whole} == whole
        for shard in (self.run.train_shard, self.run.heldout_shard):
            if shard.exists():
                open_shard(shard, None)
        run_whole(prepare, self.new)
        assert files_in(self.run.root) == self.finished, "something was left behind, or the shards differ"


def killed(case: Case, moments: list[int], delays: list[float]) -> int:
    count = 0
    for moment in moments:
        case.start()
        count += kill_at_change(prepare, case.new, moment)
        case.check()
    for delay in delays:
        case.start()
        count += kill_after(prepare, case.new, delay)
        case.check()
    return count


def test_killed_at_a_few_moments(tmp_path: Path, tiny_model_folder: Path) -> None:
    case, seed = Case(tmp_path, tiny_model_folder), 1
    print(f"seed {seed}, {case.moments} moments in {case.seconds:.2f} s")
    draw = random.Random(seed)
    # The last changes are those where shards take each other's place.
    moments = [*draw.sample(range(1, case.moments - 20), 3), *draw.sample(range(case.moments - 20, case.moments), 5)]
    assert killed(case, moments, [draw.uniform(0, case.seconds) for _ in range(2)]) >= 7


@pytest.mark.slow
def test_killed_at_every_change_on_the_disk_and_at_random(tmp_path: Path, tiny_model_folder: Path) -> None:
    case, seed = Case(tmp_path, tiny_model_folder), 2
    draw = random.Random(seed)
    moments = list(range(1, case.moments + 1))
    at_changes = killed(case, moments, [])
    at_random = killed(case, [], [draw.uniform(0, 1.1 * case.seconds) for _ in range(60)])
    print(f"seed {seed}: killed before {at_changes} of {len(moments)} changes and at {at_random} of 60 random moments")
    assert at_changes >= len(moments) - 2, "the number of changes differs from run to run by a few"
    assert at_random >= 10
