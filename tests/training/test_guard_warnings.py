"""What a run says of steps that teach nothing and of spikes, once, also where it is resumed."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from guard_jobs import (
    assert_equal,
    documents_of,
    logged,
    rows_of_step,
    saved_weights,
    spoken,
)
from launch_cases import copied, prepared_run
from rich.console import Console
from torch import Tensor

from longlora.artifacts import RunFolder
from longlora.data.packing import IGNORE_INDEX, PackedDataset, collate
from longlora.data.shards import open_shard
from longlora.data.stretches import StretchCollator
from longlora.training.distributed import Ranks
from longlora.training.guard import SpikeWatch, StepGuard

pytestmark = [pytest.mark.usefixtures("one_thread")]


def ignore_labels(patch: pytest.MonkeyPatch, rows: Collection[int]) -> None:
    """As an example whose answer is empty."""
    get = PackedDataset.__getitem__

    def emptied(self: PackedDataset, index: int) -> dict[str, Tensor]:
        item = get(self, index)
        return item | {"labels": torch.full_like(item["labels"], IGNORE_INDEX)} if index in rows else item

    patch.setattr(PackedDataset, "__getitem__", emptied)


def test_micro_batches_without_labels_are_counted_and_said_once(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder)
    empty = [rows_of_step(recipe, 2)[0], rows_of_step(recipe, 4)[1]]
    ignore_labels(monkeypatch, empty)
    (warning,) = spoken(recipe)
    assert warning == (
        f"WARNING: step 2 predicts nothing in 1 of 2 micro batches, of {documents_of(recipe, empty[:1])}; they teach "
        "nothing; metrics.jsonl counts such in unlabelled_batches, and this is said once"
    )
    assert [row["unlabelled_batches"] for row in logged(recipe)] == [0, 1, 0, 1]
    assert [row["skipped_steps"] for row in logged(recipe)] == [0, 0, 0, 0]
    assert all(row["loss"] > 1 for row in logged(recipe)), "mean over the labels there are"


def test_a_step_without_labels_is_left_out_and_is_not_bad(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam would go on with its momentum, and weights would decay."""
    recipe = prepared_run(
        tmp_path, tiny_model_folder, train__save_steps=1, train__max_skipped_steps=0, train__weight_decay=0.1,
        train__save_total_limit=4,
    )  # fmt: skip
    ignore_labels(monkeypatch, rows_of_step(recipe, 2))
    (warning,) = spoken(recipe)
    assert "step 2 predicts nothing in 2 of 2 micro batches" in warning
    assert "the step is left out" in warning
    assert_equal(saved_weights(recipe, 2), saved_weights(recipe, 1))
    found = logged(recipe)
    assert [(row["skipped_steps"], row["unlabelled_batches"]) for row in found] == [(0, 0), (1, 2), (0, 0), (0, 0)]
    assert [row["loss"] is None for row in found] == [False, True, False, False]


def spikes(values: list[float]) -> list[int]:
    """Which of `values` are said to be spikes."""
    watch = SpikeWatch()
    return [index for index, value in enumerate(values) if watch.above(value) is not None]


def test_a_spike_is_said_once_and_a_smooth_curve_has_none() -> None:
    noise = random.Random(3)
    print("seed 3")
    smooth = [2 + 2 * math.exp(-step / 40) + noise.gauss(0, 0.05) for step in range(400)]
    assert spikes(smooth) == []
    assert spikes([3.0] * 100) == []
    assert spikes([3.0 - 0.001 * step for step in range(100)]) == []
    one = [*smooth[:200], 7.0, 6.0, 5.0, *smooth[200:]]
    assert spikes(one) == [200]
    assert spikes([*one, 9.0]) == [200, 403]
    assert spikes([3.0] * 7 + [9.0]) == [], "too few to compare with"
    assert spikes([3.0] * 8 + [9.0]) == [8]
    assert spikes([3.0] * 20 + [3.2]) == [], "a deviation is no less than a part of the median"
    assert spikes([3.0] * 20 + [9.0] * 60 + [18.0]) == [20, 80], "a new level is a level"


def test_a_spike_is_told_with_what_to_do(tmp_path: Path, tiny_model_folder: Path) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder)
    dataset = PackedDataset(open_shard(RunFolder(recipe.run_path).train_shard, None), 128)
    out = io.StringIO()
    guard = StepGuard(dataset, Ranks(), Console(file=out, width=400), recipe)
    for step in range(1, 12):
        guard.logged({"loss": 2.0 if step < 10 else 8.0, "grad_norm": 1.0}, step)
    (line,) = out.getvalue().splitlines()
    assert line == (
        "WARNING: loss spike in step 10: 8.0000, and 2.0000 is the median of the last steps; if it does not come back, "
        "train in another run_dir with a lower train.learning_rate (now 0.003) or more train.warmup_steps (now 0)"
    )


def test_what_was_said_is_not_said_again_after_a_resume(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder, train__save_steps=1, train__save_total_limit=9)
    ignore_labels(monkeypatch, [rows_of_step(recipe, 2)[0], rows_of_step(recipe, 4)[1]])
    assert len(spoken(recipe)) == 1
    for step, said in ((1, 1), (2, 0)):
        again = copied(recipe, tmp_path / f"from {step}", keep_step=step)
        assert len(spoken(again, resume=True)) == said


def test_a_watch_that_is_taken_up_knows_what_it_was_told() -> None:
    values = [3.0, 3.1] * 30 + [9.0, 9.0, 3.0, 9.0]
    whole = spikes(values)
    for cut in range(len(values)):
        watch, found = SpikeWatch(), []
        for index, value in enumerate(values):
            if index == cut:
                watch = SpikeWatch(**json.loads(json.dumps(watch.state())))
            if watch.above(value) is not None:
                found.append(index)
        assert found == whole == [60, 63]


def test_batches_know_their_documents(tmp_path: Path, tiny_model_folder: Path) -> None:
    """A piece of a document is named with its tokens; padding rows have no number."""
    recipe = prepared_run(tmp_path, tiny_model_folder)
    dataset = PackedDataset(open_shard(RunFolder(recipe.run_path).train_shard, None), 400)
    assert dataset.documents(0) == ["0 (document 0, tokens 0-399)"]
    rest = [name for row in range(len(dataset)) for name in dataset.documents(row) if name.startswith("3 ")]
    length = len(dataset.shard.document(3))
    assert sorted(rest) == ["3 (document 3, tokens 0-399)", f"3 (document 3, tokens 400-{length - 1})"]
    whole = PackedDataset(dataset.shard, 1000)
    assert whole.documents(1) == ["2 (document 2)", "3 (document 3)"]

    rows = [dataset[3], dataset[1]]
    assert "row" not in collate(rows, 0)
    for rank in range(2):
        assert StretchCollator(0, rank, 2, weighted=False)(rows)["stretch"].rows == (3, 1)
    assert StretchCollator(0, 0, 2, weighted=False)([])["stretch"].rows == ()


def test_a_spike_is_five_standard_deviations_of_normal_noise() -> None:
    """Losses of median 2 and median deviation 0.1: the limit is 2 + 5 * 0.14826."""
    losses = [1.9, 2.1] * 10
    assert SpikeWatch([*losses, 2.0]).above(2.74) is None
    assert SpikeWatch([*losses, 2.0]).above(2.75) == 2.0
