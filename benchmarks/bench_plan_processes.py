"""What the planner predicts against what each process of a run takes: peak memory on 1, 2 and 4 processes of a CPU.

python benchmarks/bench_plan_processes.py          writes benchmarks/results/plan_processes.csv
python benchmarks/bench_plan_processes.py --only fsdp2-2 cut-4 --again --dry

A model with random weights is trained by `longlora train` under torchrun, joined by gloo on this machine; freed memory
goes back to the system, as where memory is short. Measured is VmHWM of every process; the largest is compared. Memory
does not need an idle machine, so no times are taken: processes share its cores, which no GPUs do.

Where a CPU has no bfloat16 of its own (no AVX512-BF16, no AMX) products in it are 80 times slower than in float32: give
``--dtype float32`` there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does, before torch

from bench_plan import SHAPES
from rich.console import Console
from rows import append_rows, device_for_benchmark, read_rows
from transformers import AutoConfig

from longlora.artifacts import RunFolder
from longlora.bench.inputs import random_model, random_shard
from longlora.config import Recipe, build_recipe, load_recipe
from longlora.memory.allocator import keep_freed_memory
from longlora.memory.limit import peak_bytes
from longlora.planning.machines import this_machine
from longlora.planning.plan import plan_run
from longlora.training.distributed import read_ranks
from longlora.training.trainer import train

STEPS = 2  # the optimizer's states are there from the first step's end on
SECONDS = 480  # of a process at most
_WORKER = "--worker"


@dataclass(frozen=True)
class Point:
    """One row: processes, how many share a row, what they divide, and settings beside the defaults."""

    processes: int
    sequence: int = 1
    shard: str = "none"
    settings: list[str] = field(default_factory=list)


POINTS = {
    "one": Point(1),
    "data-2": Point(2),
    "data-4": Point(4),
    "fsdp2-2": Point(2, shard="fsdp2"),
    "fsdp2-4": Point(4, shard="fsdp2"),
    "cut-2": Point(2, 2),
    "cut-4": Point(4, 4),
    "cut-2-fsdp2-4": Point(4, 2, "fsdp2"),
    "cut-2-full": Point(2, 2, settings=["attention.pattern=full"]),
    "zero2-2": Point(2, shard="zero2"),
    "zero3-2": Point(2, shard="zero3"),
}


def recipe_of(point: Point, context: int, dtype: str, folder: Path) -> Recipe:
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "memory": "unchecked",  # the plan is made here; freed memory is then given back without one
        "model": {"name_or_path": str(folder / "model"), "dtype": dtype, "original_context_length": context // 2},
        "context": {"context_length": context},
        "attention": {"group_size": 1024},
        "train": {"steps": STEPS, "save_steps": STEPS + 1, "grad_accum_steps": 1, "warmup_steps": 0},
        "parallel": {"sequence": point.sequence, "shard": point.shard},
    }
    return build_recipe(values, point.settings)


def measure(shape: str, recipe: Recipe, point: Point, context: int, folder: Path) -> list[int]:
    """Peak bytes of each process."""
    config = AutoConfig.for_model(SHAPES[shape].kind, pad_token_id=0, **SHAPES[shape].sizes)
    random_model(config, context, folder / "model")
    random_shard(RunFolder(recipe.run_path), context, rows=STEPS * point.processes)
    path = folder / "recipe.json"  # YAML too
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={point.processes}",
        __file__, _WORKER, str(path),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as handle:
        done = subprocess.run(command, env=environment, stdout=handle, stderr=handle, check=False)
    if done.returncode:
        raise SystemExit(f"{point}: {log.read_text(encoding='utf-8')[-2000:]}")
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(point.processes)]


def work(path: Path) -> None:
    """One process of a run; it ends by itself, because torchrun, killed, leaves its processes behind."""
    signal.alarm(SECONDS)
    recipe = load_recipe(path)
    keep_freed_memory()  # as the command line does; `train` gives back what is freed where nothing was planned
    train(recipe, Console(file=sys.stderr))
    rank = read_ranks(recipe.parallel.sequence).rank
    (path.parent / f"{rank}.json").write_text(json.dumps(peak_bytes()), encoding="utf-8")


def row_of(name: str, shape: str, context: int, dtype: str) -> dict[str, Any]:
    point = POINTS[name]
    with tempfile.TemporaryDirectory() as text:
        recipe = recipe_of(point, context, dtype, Path(text))
        found = measure(shape, recipe, point, context, Path(text))
    config = AutoConfig.for_model(
        SHAPES[shape].kind, max_position_embeddings=context // 2, pad_token_id=0, **SHAPES[shape].sizes
    )
    plan = plan_run(recipe, config, this_machine(point.processes))
    error = plan.memory.peak / max(found) - 1
    parts = {part: round(size / 1e6) for part, size in plan.memory.parts.items() if size > 5e5}
    print(
        f"{name:16} {plan.memory.peak / 1e6:6.0f} of {max(found) / 1e6:6.0f} MB ({error:+.1%}), least "
        f"{min(found) / 1e6:6.0f}   {parts}",
        flush=True,
    )
    return {
        "point": name, "shape": shape, "context": context, "dtype": dtype, "processes": point.processes,
        "sequence": point.sequence, "shard": point.shard, "settings": " ".join(point.settings),
        "predicted_mb": round(plan.memory.peak / 1e6),
        "measured_most_mb": round(max(found) / 1e6), "measured_least_mb": round(min(found) / 1e6),
        "memory_error": f"{error:+.3f}",
    }  # fmt: skip


def done_before() -> set[tuple[str, str, int, str]]:
    return {(row["point"], row["shape"], int(row["context"]), row["dtype"]) for row in read_rows("plan_processes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(_WORKER, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--again", action="store_true", help="also points that have a row")
    parser.add_argument("--dry", action="store_true", help="print, append nothing")
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return
    skipped = set() if args.again or args.dry else done_before()
    for name in args.only:
        if (name, args.shape, args.context, args.dtype) in skipped:
            continue
        row = row_of(name, args.shape, args.context, args.dtype)
        if not args.dry:
            append_rows("plan_processes", [row], device_for_benchmark())


if __name__ == "__main__":
    main()
