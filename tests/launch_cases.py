"""Whole runs of several processes on a tiny prepared run: `torchrun -m longlora`, `accelerate launch -m longlora`, or
processes that are forked with the variables of torchrun, where the launcher is not what is tested.

Every run has a timeout, and nothing of it is left when a function returns.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forked_ranks import run_forked
from rich.console import Console
from safetensors.torch import load_file
from tiny import bear_texts

from longlora.artifacts import RunFolder, write_atomic
from longlora.config import Recipe, build_recipe, dump_recipe
from longlora.data.prepare import prepare_shards
from longlora.model.build import load_tokenizer, tokenizer_hash

# A few are spent on training, the others on starting Python, which takes long where other tests run too.
SECONDS = 240


@dataclass(frozen=True)
class Launched:
    """A finished launch: what all its processes printed together, as a terminal shows it."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def ours(self) -> list[str]:
        """The lines that begin with ``longlora:`` on stderr, in order: errors for a person."""
        return [line for line in self.stderr.splitlines() if line.startswith("longlora:")]


def prepared_run(folder: Path, model: Path, run: str = "run", **changes: Any) -> Recipe:
    """A recipe with shards prepared in `folder`/`run`; its recipe.yaml lies in the run folder, as `prepare` leaves it.

    64 -> 128 tokens on four short texts, float32, 4 steps of 2 micro batches; checkpoints at steps 2 and 4.

    Args:
        changes: dotted names of recipe keys with two underscores for the dot, for example ``train__steps=2``.
    """
    texts = bear_texts(folder / "texts")
    values = {
        "run_dir": str(folder / run),
        "memory": "unchecked",
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "context": {"context_length": 128, "rope_type": "linear"},
        "attention": {"group_size": 32, "sink_tokens": 2},
        "data": {"train": [str(texts)], "heldout": [str(texts)]},
        "train": {
            "steps": 4, "grad_accum_steps": 2, "learning_rate": 0.003, "warmup_steps": 0, "save_steps": 2,
            "save_total_limit": 3, "loss_chunk_tokens": 50,
        },
    }  # fmt: skip
    recipe = build_recipe(values, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])
    run_folder = RunFolder(recipe.run_path)
    if not run_folder.train_shard.exists():
        tokenizer = load_tokenizer(recipe.model)
        prepare_shards(recipe, tokenizer, tokenizer_hash(tokenizer), Console(quiet=True))
    write_atomic(run_folder.recipe, dump_recipe(recipe))
    return recipe


def launch(
    recipe: Recipe | Path,
    *overrides: str,
    verb: str = "train",
    processes: int = 2,
    launcher: str = "torchrun",
    options: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    trouble: str | None = None,
    seconds: float = SECONDS,
    meanwhile: Callable[[subprocess.Popen[str]], None] | None = None,
) -> Launched:
    """``longlora VERB RECIPE OVERRIDES`` in `processes` processes joined over loopback, one thread each.

    Args:
        recipe: a recipe, whose run folder is given to the verb, or a path of a YAML file.
        launcher: ``torchrun``, ``accelerate``, ``none`` for one process by itself, or ``forked``, which takes neither
            `options` nor `meanwhile`.
        options: of the launcher.
        environment: variables on top of this process's.
        trouble: ``WHAT:RANK:STEP`` for `launch_trouble.py`; what is ``killed``, ``signal``, ``error``, ``nan``,
            ``gradient``, ``recipe``, ``data`` or ``no deepspeed``.
        meanwhile: is called once the launcher runs, for example to kill one of its processes.

    Raises:
        TimeoutError: it took longer than `seconds`, and was killed with all it started; the message has its output.
    """
    path = recipe.run_path if isinstance(recipe, Recipe) else recipe
    program = ["-m", "longlora"] if trouble is None else [str(Path(__file__).with_name("launch_trouble.py"))]
    name = uuid.uuid4().hex
    changes = (environment or {}) | ({} if trouble is None else {"TROUBLE": trouble}) | {"LAUNCHED": name}
    began = time.monotonic()
    if launcher == "forked":
        with tempfile.TemporaryDirectory() as printed:
            arguments = [verb, str(path), *overrides]
            ended = run_forked(arguments, processes, _environment(changes), Path(printed), seconds)
        return Launched(*ended, time.monotonic() - began)
    command = [*_launcher(launcher, processes, options), *program, verb, str(path), *overrides]
    process = subprocess.Popen(
        command,
        env=_environment(changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if meanwhile is not None:
            meanwhile(process)
        out, err = process.communicate(timeout=max(1.0, seconds - (time.monotonic() - began)))
    except subprocess.TimeoutExpired:
        _kill(name)
        out, err = process.communicate()
        raise TimeoutError(f"{' '.join(command)} took over {seconds} s\n{out}\n{err}") from None
    finally:
        _kill(name)
    return Launched(process.returncode, out, err, time.monotonic() - began)


def workers(launcher: subprocess.Popen[str], count: int, seconds: float = 60) -> dict[int, int]:
    """Rank -> process id of the `count` processes that `launcher` started, once all of them run."""
    deadline = time.monotonic() + seconds
    found: dict[int, int] = {}
    while len(found) < count and time.monotonic() < deadline:
        time.sleep(0.1)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        for child in map(int, children):
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks = [int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")]
            found |= dict.fromkeys(ranks, child)
    if len(found) < count:
        raise TimeoutError(f"only ranks {sorted(found)} of {count} were started")
    return found


def wait_for_step(recipe: Recipe, step: int, launcher: subprocess.Popen[str], seconds: float = 90) -> None:
    """Return once metrics.jsonl has a row of `step`, or `launcher` ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and launcher.poll() is None:
        path = RunFolder(recipe.run_path).metrics
        if path.exists() and f'"step": {step},' in path.read_text(encoding="utf-8"):
            return
        time.sleep(0.05)


def losses(recipe: Recipe) -> list[float]:
    """Training loss of each step, from metrics.jsonl."""
    lines = RunFolder(recipe.run_path).metrics.read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def trained(recipe: Recipe) -> dict[str, torch.Tensor]:
    """The tensors of the result: of the adapter, or of the whole model."""
    run = RunFolder(recipe.run_path)
    whole = recipe.adapter.method == "full"
    return load_file(run.merged / "model.safetensors" if whole else run.adapter / "adapter_model.safetensors")


def checkpoint_files(recipe: Recipe, step: int) -> dict[str, int]:
    """Name -> bytes of the files of a checkpoint."""
    folder = RunFolder(recipe.run_path).checkpoints / f"checkpoint-{step}"
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], part: float = 1e-5) -> None:
    """The same names, types and shapes; values within `part` of the largest one."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert (found[name] - tensor).abs().max() <= part * tensor.abs().max(), name


def copied(recipe: Recipe, run_dir: Path, *, keep_step: int) -> Recipe:
    """The run as it was after `keep_step`, in a folder of its own."""
    shutil.copytree(recipe.run_path, run_dir)
    run = RunFolder(run_dir)
    for folder in run.checkpoints.iterdir():
        if folder.name != f"checkpoint-{keep_step}":
            shutil.rmtree(folder)
    for result in (run.adapter, run.merged):
        shutil.rmtree(result, ignore_errors=True)
    return recipe.model_copy(update={"run_dir": str(run_dir)})


def settings(path: Path) -> dict[str, Any]:
    """A JSON file of a result, whose lists PEFT makes from sets: in order."""
    values = json.loads(path.read_text(encoding="utf-8"))
    return {name: sorted(value) if isinstance(value, list) else value for name, value in values.items()}


def _launcher(name: str, processes: int, options: tuple[str, ...]) -> list[str]:
    if name == "none":
        return [sys.executable, *options]
    if name == "torchrun":
        # A free port: several runs may go on at one time.
        module, chosen = "torch.distributed.run", ["--standalone", f"--nproc-per-node={processes}"]
    else:
        # Without GPUs it starts several processes with options such as --use_fsdp only, and with --cpu a single one.
        module, chosen = "accelerate.commands.launch", [f"--num_processes={processes}", "--main_process_port=0"]
    return [sys.executable, "-m", module, *chosen, *options]


def _environment(changes: dict[str, str]) -> dict[str, str]:
    """This process's, without what another launcher left in it."""
    other = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in other}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return kept | threads | {"GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "COLUMNS": "240"} | changes


def _kill(name: str) -> None:
    """End the launcher and all of its processes, also those that outlived it, by the `name` in their environment.

    torchrun gives each of them a session of its own, so that no group or session holds all.
    """
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"LAUNCHED={name}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:  # it ended, or is not ours
            continue
