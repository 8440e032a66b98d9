"""A run that is interrupted after every step is the undisturbed one: weights, optimizer, random numbers and metrics.

The undisturbed run saves at each step. The other one gets SIGTERM in every step, saves it, stops and is resumed, so
that each of its steps is the first of a process. Their checkpoints are compared at every step, bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_jobs import changed, interrupted_after, metric_rows, prepared, result, steps_saved
from rich.console import Console
from safetensors.torch import load_file

from longlora.artifacts import RunFolder
from longlora.config import Recipe
from longlora.data.packing import PackedDataset
from longlora.data.shards import open_shard
from longlora.model.trainable import weights_file
from longlora.training.trainer import train

QUIET = Console(quiet=True)
STEPS = 7
# Three steps in an epoch, the last of them with a single micro batch: 7 steps are two epochs and one step.
ROWS = 5
COMMON = (
    f"train.steps={STEPS}", "train.warmup_steps=3", "train.logging_steps=2", "train.validation_steps=3",
    "train.validation_rows=2", "attention.full_attention_final_fraction=0.3",
)  # fmt: skip
LORA = ("adapter.lora_dropout=0.1",)
VARIANTS: dict[str, tuple[str, ...]] = {
    "lora with dropout, embeddings and norms, sinks": LORA,
    "occurring rows of the embeddings": (*LORA, "adapter.embedding_rows=occurring"),
    "full": ("adapter.method=full", "train.learning_rate=0.003"),
    "every other layer recomputed, tiled MLP": (
        *LORA, "train.activation_checkpointing_every=2", "train.mlp_tile_tokens=30",
    ),
    "instruct": (*LORA, "data.kind=instruct", "data.instruct.template=llama2"),
    "instruct by examples, two rows a batch": (
        *LORA, "data.kind=instruct", "data.instruct.template=llama2", "data.instruct.loss_weighting=examples",
        "train.micro_batch_size=2", "train.logging_steps=1",
    ),
    "bfloat16, no recomputation, no sinks": (
        *LORA, "model.dtype=bfloat16", "train.activation_checkpointing=false", "attention.sink_tokens=0",
    ),
}  # fmt: skip
QUICK = ("lora with dropout, embeddings and norms, sinks", "full", "instruct")

pytestmark = pytest.mark.usefixtures("one_thread")


def texts(folder: Path) -> dict[str, Any]:
    """Documents that are packed, and instructions."""
    path = folder / "documents.jsonl"
    lengths = (180, 130, 90, 70, 60, 40, 30)
    documents = [{"text": (f"the {number} bears went home. " * 20)[:length]} for number, length in enumerate(lengths)]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return {"train": [str(path)], "heldout": [str(path)]}


def instructions(folder: Path) -> dict[str, Any]:
    path = folder / "instructions.jsonl"
    records = [
        {"question": f"which {number}?", "document": "a story. " * (number + 1), "answer": "it is " * (number + 1)}
        for number in range(8)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return {"kind": "instruct", "instruct": {"template": "llama2"}, "train": [str(path)], "heldout": [str(path)]}


def make(folder: Path, model: Path, name: str, run: str, *settings: str) -> Recipe:
    variant = VARIANTS[name]
    data = (instructions if "data.kind=instruct" in variant else texts)(folder)
    return prepared(folder, model, *COMMON, *variant, *settings, run=run, data=data)


def interrupted_everywhere(recipe: Recipe) -> None:
    for step in range(1, STEPS):
        with interrupted_after(step):
            train(recipe, QUIET, resume=step > 1)
    train(recipe, QUIET, resume=True)


def states(folder: Path) -> dict[str, Any]:
    """What is in the files of states of a checkpoint, by the name of the file."""
    found = {
        path.name: torch.load(path, weights_only=False) for path in folder.iterdir() if path.suffix in (".pt", ".pth")
    }
    state = json.loads((folder / "trainer_state.json").read_text())
    # Both depend on when a run is stopped, and nothing of a run depends on them.
    return {
        **found,
        "trainer_state.json": {k: v for k, v in state.items() if k not in ("log_history", "stateful_callbacks")},
    }


def assert_same(found: Any, wanted: Any, where: str) -> None:
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_same(found[key], value, f"{where}[{key}]")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for index, value in enumerate(wanted):
            assert_same(found[index], value, f"{where}[{index}]")
    elif hasattr(wanted, "tobytes"):  # numpy's
        assert found.tobytes() == wanted.tobytes(), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in VARIANTS]
)
def test_interrupted_after_every_step(tmp_path: Path, tiny_model_folder: Path, name: str) -> None:
    every = ("train.save_steps=1", "train.save_total_limit=99")
    whole = make(tmp_path, tiny_model_folder, name, "whole", *every)
    train(whole, QUIET)
    # Saves nothing but what the signals make it save; keeps all of that.
    stopped = make(tmp_path, tiny_model_folder, name, "stopped", "train.save_steps=1000", "train.save_total_limit=99")
    interrupted_everywhere(stopped)
    assert steps_saved(stopped) == steps_saved(whole) == [f"checkpoint-{step}" for step in range(1, STEPS + 1)]
    weights = weights_file(whole.adapter)
    for step in range(1, STEPS + 1):
        one, other = (RunFolder(r.run_path).checkpoints / f"checkpoint-{step}" for r in (stopped, whole))
        assert_same(load_file(one / weights), load_file(other / weights), f"step {step} weights")
        found, wanted = states(one), states(other)
        found["trainer_state.json"].pop("save_steps")
        wanted["trainer_state.json"].pop("save_steps")
        assert_same(found, wanted, f"step {step}")
    assert_same(result(stopped), result(whole), "result")
    assert metric_rows(stopped) == metric_rows(whole)


def test_the_data_goes_round_more_than_once(tmp_path: Path, tiny_model_folder: Path) -> None:
    """What the tests above rest on."""
    recipe = make(tmp_path, tiny_model_folder, QUICK[0], "run")
    dataset = PackedDataset(open_shard(RunFolder(recipe.run_path).train_shard, None), 128, min_length=64)
    assert len(dataset) == ROWS
    assert any(int((row["position_ids"] == 0).sum()) > 1 for row in dataset), "rows of several documents"


def test_saving_and_stopping_leave_no_trace(tmp_path: Path, tiny_model_folder: Path) -> None:
    """A run that never saved before its end, and one that was interrupted twice, once where it saves anyway."""
    whole = make(tmp_path, tiny_model_folder, QUICK[0], "whole", "train.save_steps=1000")
    train(whole, QUIET)
    twice = make(tmp_path, tiny_model_folder, QUICK[0], "twice", "train.save_steps=2", "train.save_total_limit=1")
    with interrupted_after(3):
        train(twice, QUIET)
    with interrupted_after(4):
        train(twice, QUIET, resume=True)
    train(twice, QUIET, resume=True)
    assert_same(result(twice), result(whole), "result")
    assert metric_rows(twice) == metric_rows(whole)


def test_other_distances_between_checkpoints_after_resuming(tmp_path: Path, tiny_model_folder: Path) -> None:
    recipe = make(tmp_path, tiny_model_folder, QUICK[0], "run", "train.save_steps=1000")
    with interrupted_after(2):
        train(recipe, QUIET)
    train(changed(recipe, "train.save_steps=2", "train.save_total_limit=9"), QUIET, resume=True)
    assert steps_saved(recipe) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-7"]
