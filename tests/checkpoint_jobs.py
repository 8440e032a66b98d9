"""Tiny prepared runs whose checkpoints are damaged, and what the children of `killing.py` do with them."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import bear_texts

from longlora.artifacts import MANIFEST, RunFolder, read_json, write_manifest
from longlora.config import Recipe, build_recipe, load_recipe
from longlora.data.prepare import prepare_shards
from longlora.errors import InterruptedRunError, LongLoraError
from longlora.model.adapters import ADAPTER_WEIGHTS
from longlora.model.build import load_tokenizer, tokenizer_hash
from longlora.training.checkpoint import complete_checkpoint, saving_folder
from longlora.training.saved import CHECKSUM, Batches, checksum

FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", ADAPTER_WEIGHTS, "adapter_config.json")
"""Of a checkpoint of one process, beside its manifest."""
TIMES = {"seconds", "tokens_per_second"}
"""Columns of metrics.jsonl that no two runs have in common."""


def prepared(folder: Path, model: Path, *settings: str, run: str = "run", **sections: Any) -> Recipe:
    """A recipe with shards in `folder`/`run`: 64 -> 128 tokens, 4 steps of 2 micro batches, a checkpoint each 2 steps.

    Args:
        settings: dotted overrides.
        sections: in place of those below.
    """
    texts = [str(bear_texts(folder / "texts"))]
    values: dict[str, Any] = {
        "run_dir": str(folder / run),
        "memory": "unchecked",
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "context": {"context_length": 128, "rope_type": "linear"},
        "attention": {"group_size": 32, "sink_tokens": 2},
        "data": {"train": texts, "heldout": texts},
        "train": {
            "steps": 4, "grad_accum_steps": 2, "learning_rate": 0.02, "warmup_steps": 0, "save_steps": 2,
            "loss_chunk_tokens": 50,
        },
    }  # fmt: skip
    recipe = build_recipe(values | sections, list(settings))
    tokenizer = load_tokenizer(recipe.model)
    prepare_shards(recipe, tokenizer, tokenizer_hash(tokenizer), Console(quiet=True))
    return recipe


def changed(recipe: Recipe, *settings: str) -> Recipe:
    """`recipe` with dotted overrides."""
    return build_recipe(recipe.model_dump(mode="json"), list(settings))


def result(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The tensors that a finished run left."""
    run = RunFolder(recipe.run_path)
    whole = recipe.adapter.method == "full"
    return load_file(run.merged / "model.safetensors" if whole else run.adapter / "adapter_model.safetensors")


def metric_rows(recipe: Recipe) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without the columns of time."""
    lines = RunFolder(recipe.run_path).metrics.read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def steps_saved(recipe: Recipe) -> list[str]:
    """What lies in checkpoints/, hidden names too."""
    folder = RunFolder(recipe.run_path).checkpoints
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def complete(folder: Path, *, keep: int, weights: str = ADAPTER_WEIGHTS, processes: int = 1) -> None:
    """`complete_checkpoint` of a run on nothing."""
    complete_checkpoint(
        folder, weights=weights, keep=keep, batches=Batches(1, 1, processes), processes=processes, source={},
        unlogged=None,
    )  # fmt: skip


def mark_again(folder: Path, **facts: Any) -> None:
    """Write the manifest of what lies in a checkpoint now, with other `facts` and a checksum that is right."""
    known = {key: value for key, value in read_json(folder / MANIFEST, "").items() if key not in ("files", CHECKSUM)}
    write_manifest(folder, **(known | facts), **{CHECKSUM: checksum(known | facts)})


def made(folder: Path, step: int) -> Path:
    """A checkpoint that is written and not yet marked."""
    path = saving_folder(folder) / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in FILES:
        (path / name).write_bytes(b"12345")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def train_or_resume(run_dir: Path) -> str:
    """``longlora train --or-resume`` of a run folder; what ended it, or "done"."""
    from longlora.training.checkpoint import has_checkpoint
    from longlora.training.trainer import train

    run = RunFolder(run_dir)
    try:
        train(load_recipe(run.recipe), Console(quiet=True), resume=has_checkpoint(run.checkpoints))
    except LongLoraError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def on_a_full_disk(arguments: tuple[Path, int, Path]) -> None:
    """`train_or_resume` where no file may have more than so many bytes; what it says is left in a file."""
    run_dir, most_bytes, said = arguments
    with said.open("w", encoding="utf-8") as handle:
        _alone()
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
        try:
            words = train_or_resume(run_dir)
        except BaseException as error:
            words = f"TRACEBACK {type(error).__name__}: {error}"
        handle.write(words)


def signalled(arguments: tuple[Path, str, Path]) -> None:
    """`train_or_resume` that gets signals at a place in the code; what it says is left in a file.

    The places: ``accumulating`` (SIGTERM between the micro batches of step 3), ``saving`` (SIGTERM while step 2 is
    saved), ``saving twice`` (the same, and once more while the step is saved that the first one stopped at).
    """
    run_dir, place, said = arguments
    _alone()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _PLACES[place]()
    said.write_text(train_or_resume(run_dir), encoding="utf-8")


def _alone() -> None:
    torch.set_num_threads(1)
    for stream in (1, 2):  # what is printed may be a file as well
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _before(owner: Any, name: str, call: int, do: Callable[[], None]) -> None:
    """Do something before a function is called for the `call`-th time, from 1."""
    original, calls = getattr(owner, name), [0]

    def patched(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            do()
        return original(*args, **options)

    setattr(owner, name, patched)


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _while_accumulating() -> None:
    from longlora.training import loss_model

    _before(loss_model, "chunked_loss", 6, _terminate)  # two micro batches a step


def _while_saving() -> None:
    _before(torch, "save", 2, _terminate)  # the scheduler's state of step 2


def _while_saving_twice() -> None:
    from longlora.training import loss_model

    _before(loss_model, "chunked_loss", 6, _terminate)
    _before(torch, "save", 5, _terminate)  # three for each checkpoint


_PLACES = {"accumulating": _while_accumulating, "saving": _while_saving, "saving twice": _while_saving_twice}


@contextlib.contextmanager
def interrupted_after(step: int) -> Any:
    """Inside it, training gets SIGTERM in the middle of `step`, saves it and stops."""
    from longlora.training.metrics import MetricsCallback

    original = MetricsCallback.on_step_begin

    def patched(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
        original(self, args, state, control, **others)
        if state.global_step + 1 == step:
            _terminate()

    MetricsCallback.on_step_begin = patched  # type: ignore[method-assign]
    try:
        yield
    except InterruptedRunError:
        pass
    else:
        raise AssertionError(f"the run went on after step {step}")
    finally:
        MetricsCallback.on_step_begin = original  # type: ignore[method-assign]
