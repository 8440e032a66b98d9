"""Loss curves of the same run by one process and by sequence ranks that share each row.

python benchmarks/bench_sequence_curve.py              appends to benchmarks/results/sequence_curve.csv
SmolLM2-135M-Instruct on State of the Union messages, both out of pinned Python packages, groups of a quarter of a row,
as `longlora train` trains it. Rounding differs between the two: a stretch of a row is another size of product.
How much that is without any cut says a third run, of one process whose rows differ in nothing but the number of
threads that compute them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rows import append_rows

from longlora.artifacts import RunFolder, write_atomic
from longlora.config import Recipe, dump_recipe
from longlora.data.prepare import prepare_shards
from longlora.model.build import load_tokenizer, tokenizer_hash
from longlora.quickstart.run import quickstart_recipe

SETTINGS = [
    "train.grad_accum_steps=1", "train.warmup_steps=0", "train.save_steps=1000000",
    "train.validation_steps=null", "memory=unchecked",
]  # fmt: skip


def prepared(folder: Path, args: argparse.Namespace) -> Recipe:
    console = Console(stderr=True)
    overrides = [*SETTINGS, f"context.context_length={args.context}", f"train.steps={args.steps}"]
    overrides += [f"attention.group_size={args.context // 4}", f"model.original_context_length={args.context // 2}"]
    overrides += [f"model.dtype={args.dtype}", "data.min_document_tokens=0", "context.rope_factor=2"]
    recipe = quickstart_recipe(folder, None, overrides, console)
    tokenizer = load_tokenizer(recipe.model)
    prepare_shards(recipe, tokenizer, tokenizer_hash(tokenizer), console)
    return recipe


def curve(recipe: Recipe, folder: Path, processes: int, threads: int, seconds: float) -> list[float]:
    """Losses of the steps of a run in a folder of its own, on the shards of `recipe`."""
    shards, run = RunFolder(recipe.run_path), RunFolder(folder)
    run.train_shard.parent.mkdir(parents=True)
    for shard, link in ((shards.train_shard, run.train_shard), (shards.heldout_shard, run.heldout_shard)):
        link.symlink_to(shard)
    own = recipe.model_copy(
        update={
            "run_dir": str(folder), "parallel": recipe.parallel.model_copy(update={"sequence": processes})
        }
    )  # fmt: skip
    write_atomic(run.recipe, dump_recipe(own))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launcher, "-m", "longlora", "train", str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=seconds)
    rows = map(json.loads, run.metrics.read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", help="float32 on a CPU without products in bfloat16")
    parser.add_argument("--seconds", type=float, default=7200, help="that each of the runs may take")
    args = parser.parse_args()
    runs = {"one process": (1, 2), "one process, one thread": (1, 1), f"{args.ranks} sequence ranks": (args.ranks, 1)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = prepared(folder / "shards", args)
        curves = {
            name: curve(recipe, folder / str(number), processes, threads, args.seconds)
            for number, (name, (processes, threads)) in enumerate(runs.items())
        }
    rows = [
        {"run": name, "context": args.context, "dtype": args.dtype, "step": step, "loss": f"{loss:.6f}"}
        for name, losses in curves.items()
        for step, loss in enumerate(losses, 1)
    ]
    path = append_rows("sequence_curve", rows, torch.device("cpu"))
    first = curves["one process"]
    for name, losses in curves.items():
        worst = max(abs(loss - other) for loss, other in zip(losses, first, strict=True))
        print(f"{name}: {losses[0]:.4f} -> {losses[-1]:.4f}, at most {worst:.4f} from one process")
    print(path)


if __name__ == "__main__":
    main()
