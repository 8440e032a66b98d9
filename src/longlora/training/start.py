"""Before any weights are read: who takes part, from which checkpoint, with which settings. The same on every process.

In: a recipe. Out: a `Start`, or one error that all processes have in common.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedConfig

from longlora.artifacts import RunFolder
from longlora.config import CHANGEABLE_ON_RESUME, Recipe, load_recipe
from longlora.errors import RunFolderError
from longlora.memory.allocator import return_freed_memory_if_tight
from longlora.model.build import device_for_run, load_config
from longlora.model.levers import check_levers
from longlora.model.rope import RopeChange, rescale_for
from longlora.model.trainable import weights_file
from longlora.planning.machines import has_bfloat16_products, this_machine
from longlora.planning.memory import Memory
from longlora.planning.plan import run_disk
from longlora.planning.settle import Settled, adopt_levers, settle_memory
from longlora.storage import require_free_space
from longlora.training.attention_schedule import moved_full_phase
from longlora.training.checkpoint import checkpoint_step, discard_unfinished, newest_checkpoint
from longlora.training.collectives import from_main, join, largest, require_same
from longlora.training.distributed import Ranks, read_ranks
from longlora.training.launchers import with_launcher_settings
from longlora.training.saved import saved_in
from longlora.training.sharding import check_sharding
from longlora.training.zero import STAGES, check_zero


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    recipe: Recipe
    """With the levers that `memory: auto` picked."""
    ranks: Ranks
    console: Console
    """Says nothing but on the first process."""
    device: torch.device
    config: PreTrainedConfig
    change: RopeChange
    memory: Memory | None
    """What was planned, if it was."""
    checkpoint: Path | None
    """From which the run goes on."""
    grad_accum_steps: int
    """Micro batches of this process in a step: the recipe's, unless a run goes on with other processes."""

    @property
    def shard(self) -> str:
        """`parallel.shard`, where there are several processes."""
        return self.recipe.parallel.shard if self.ranks.world > 1 else "none"

    @property
    def shards_weights(self) -> bool:
        """Whether processes hold parts of the weights."""
        return self.shard in ("fsdp2", "zero3")


def start(
    recipe: Recipe, console: Console, held: contextlib.ExitStack, *, resume: bool, prepared: bool = False
) -> Start:
    """Join the other processes, agree with them, and settle what is to be trained.

    Args:
        recipe: what to train.
        console: for a person.
        held: gets the lock of the run folder, which the first process takes for all.
        resume: go on from the newest whole checkpoint.
        prepared: the shards must be those that `longlora prepare` made with this recipe's data section.

    Raises:
        LongLoraError: the run folder is in use, something is missing or does not fit, or processes differ.
    """
    recipe, lines = with_launcher_settings(recipe)
    ranks = read_ranks(recipe.parallel.sequence)
    if not ranks.is_main:
        console = Console(quiet=True)
    join(ranks)
    require_same(ranks, _flat(recipe.model_dump(mode="json")) | {"longlora resume": str(resume).lower()})
    device = device_for_run()
    for line in [*lines, *_notes(recipe, ranks, device)]:
        console.print(line, highlight=False)
    # DeepSpeed, which accelerate imports where it is installed, would look for one and say what it found.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    run = RunFolder(recipe.run_path)
    doing = "longlora resume" if resume else "longlora train"
    from_main(ranks, lambda: held.enter_context(run.lock(doing)))
    checkpoint = from_main(ranks, lambda: _checkpoint(run, recipe, console, resume=resume, prepared=prepared))
    grad_accum_steps = recipe.train.grad_accum_steps
    if checkpoint is not None:
        _require_shared(checkpoint, ranks)
        saved = load_recipe(run.recipe)
        recipe = adopt_levers(recipe, saved)
        if moved := moved_full_phase(saved, recipe, checkpoint_step(checkpoint)):
            console.print(moved, highlight=False)
        grad_accum_steps = _same_rows(recipe, checkpoint, ranks, console)
    check_levers(recipe, device)
    if recipe.parallel.shard == "fsdp2" and ranks.world > 1:
        check_sharding(recipe)
    if recipe.parallel.shard in STAGES and ranks.world > 1:
        check_zero(recipe)
    config, change = rescale_for(recipe, load_config(recipe.model))
    recipe, memory = _settle(recipe, config, ranks, console)
    return Start(recipe, ranks, console, device, config, change, memory, checkpoint, grad_accum_steps)


def _checkpoint(run: RunFolder, recipe: Recipe, console: Console, *, resume: bool, prepared: bool) -> Path | None:
    """The newest whole checkpoint of a run that goes on; None for one that begins."""
    discard_unfinished(run.checkpoints)
    if not resume:
        run.require_unused()
        if prepared:
            _require_prepared(run, recipe)
        return None
    saved = load_recipe(run.recipe)
    _require_same_run(adopt_levers(recipe, saved), saved)
    if run.trained.exists():
        raise RunFolderError(f"{run.trained} exists: the run is finished; merge, evaluate or export it")
    checkpoint, passed_over = newest_checkpoint(run.checkpoints, weights_file(recipe.adapter))
    for line in passed_over:
        console.print(f"passed over: {line}", highlight=False)
    if (done := checkpoint_step(checkpoint)) > recipe.train.steps:
        raise RunFolderError(
            f"{checkpoint} has more steps than train.steps={recipe.train.steps}: give train.steps={done} to end there, "
            "or more to go on"
        )
    console.print(f"going on from {checkpoint}", highlight=False)
    return checkpoint


def _require_prepared(run: RunFolder, recipe: Recipe) -> None:
    if run.train_shard.exists() and not run.recipe.exists():
        raise RunFolderError(f"{recipe.run_dir} was not prepared to its end: run `longlora prepare`")
    if not run.recipe.exists():
        return
    before = load_recipe(run.recipe)
    if before.data != recipe.data:
        raise RunFolderError(f"the data section differs from what {recipe.run_dir} was prepared with: prepare again")
    drawn = any(weight % 1 for weight in recipe.data.instruct.weights or ())
    if recipe.data.kind == "instruct" and drawn and before.train.seed != recipe.train.seed:
        raise RunFolderError(
            f"train.seed={recipe.train.seed}: examples were drawn by data.instruct.weights with seed "
            f"{before.train.seed} when {recipe.run_dir} was prepared: prepare again"
        )


def _require_same_run(recipe: Recipe, saved: Recipe) -> None:
    """Refuse settings under which steps would not go on as they began in `saved`."""
    for section in ("model", "context", "attention", "adapter", "data", "train"):
        now, then = getattr(recipe, section), getattr(saved, section)
        if section == "train":
            now = now.model_copy(update={key: getattr(then, key) for key in CHANGEABLE_ON_RESUME})
        if now != then:
            raise RunFolderError(
                f"{section} differs from the recipe the run in {recipe.run_dir} began with: "
                f"resume with its own recipe.yaml (of train only {', '.join(CHANGEABLE_ON_RESUME)} may change), "
                "or train in another run_dir"
            )


def _require_shared(checkpoint: Path, ranks: Ranks) -> None:
    if not checkpoint.is_dir():
        raise RunFolderError(
            f"{checkpoint} is not there on rank {ranks.rank}: run_dir must be on a file system that all machines share"
        )


def _same_rows(recipe: Recipe, checkpoint: Path, ranks: Ranks, console: Console) -> int:
    """Micro batches of a process in a step, so that steps go on with the rows that come next, as many as before."""
    saved = saved_in(checkpoint)
    before = saved.batches
    dropout = recipe.adapter.lora_dropout > 0
    if before.processes == ranks.data_world:
        if dropout and saved.processes != ranks.world:
            console.print(
                f"on {ranks.world} instead of {saved.processes} processes: dropout draws other numbers", highlight=False
            )
        return before.steps
    now = before.on(ranks.data_world)
    console.print(
        f"on {now.processes} instead of {before.processes} processes with rows of their own: {now.steps} instead of "
        f"{before.steps} micro batches in a step on each, so that steps have the same rows in the same order"
        f"{'; dropout draws other numbers' if dropout else ''}",
        highlight=False,
    )
    return now.steps


def _settle(recipe: Recipe, config: PreTrainedConfig, ranks: Ranks, console: Console) -> tuple[Recipe, Memory | None]:
    """The recipe with its memory levers, and what it is planned to take; a run that does not fit is refused here.

    One process plans for all, with what the one with least memory has: they must not pick different levers.
    """
    machine = this_machine(ranks.world, ranks.local_world)
    least = int(-largest(ranks, -machine.memory_bytes))
    # A CPU has no other memory: its host_bytes is sys.maxsize, which a float would round up.
    beside = int(-largest(ranks, -machine.host_bytes)) if machine.cuda else machine.host_bytes
    machine = replace(machine, memory_bytes=least, host_bytes=beside)
    settled: Settled = from_main(ranks, lambda: settle_memory(recipe, config, machine))
    if settled.line:
        console.print(settled.line, highlight=False)
    peak = settled.memory.peak if settled.memory else None
    if not machine.cuda and return_freed_memory_if_tight(peak, machine.memory_bytes):
        why = "memory is short" if peak else "what the run takes is not planned"
        console.print(f"{why}: what is freed goes back to the system at once, which takes time")
    if settled.memory is not None:
        from_main(ranks, lambda: _require_disk(settled.recipe, config))
    return settled.recipe, settled.memory


def _require_disk(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse a run whose checkpoints and result the disk cannot take; those that are there already count."""
    run, disk = RunFolder(recipe.run_path), run_disk(recipe, config)
    written = sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
    result = disk.merged if recipe.adapter.method == "full" else disk.adapter
    require_free_space(run.root, max(0, disk.checkpoints - written) + result, "what the run writes")


def _notes(recipe: Recipe, ranks: Ranks, device: torch.device) -> list[str]:
    """What a run says of settings and devices before it begins."""
    lines = []
    if recipe.model.dtype == "bfloat16" and device.type == "cpu" and not has_bfloat16_products():
        lines.append(
            "WARNING: this CPU has no products in bfloat16 (AMX or AVX512-BF16) and is several times slower with it "
            "than with model.dtype=float32"
        )
    if ranks.world > 1:
        return lines
    if recipe.parallel.shard != "none":
        lines.append(f"parallel.shard={recipe.parallel.shard} divides nothing: there is one process")
    if torch.cuda.device_count() > 1:
        lines.append(
            f"training on one of {torch.cuda.device_count()} GPUs: start it with torchrun "
            f"--nproc-per-node {torch.cuda.device_count()} -m longlora train ... to use all"
        )
    return lines


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names -> values of a nested recipe."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": str(value)}
    return flat
