"""What the planner predicts against what training takes: peak memory and seconds of a step.

python benchmarks/bench_plan.py            writes benchmarks/results/plan.csv; points that are there are left out
python benchmarks/bench_plan.py --only smol-4k mid-8k --again

Every model has random weights. A point is predicted in one process and trained for three steps in another, through
`longlora.training.trainer.train`; peak memory is that of the process (``ru_maxrss``), time the median of the steps
after the first. Run it on an idle machine: memory is the same on a busy one, time is not.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rows import RESULTS, append_rows, device_for_benchmark

STEPS = 3
MEMORY_TARGET, TIME_TARGET = 0.10, 0.25


@dataclass(frozen=True)
class Shape:
    """A model type and its sizes."""

    kind: str
    sizes: dict[str, Any]


SHAPES = {
    "tiny": Shape("llama", {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True,
    }),
    "mid": Shape("llama", {
        "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12,
        "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": False,
    }),
    "smol": Shape("llama", {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "tie_word_embeddings": True,
    }),
    "moe": Shape("qwen3_moe", {
        "vocab_size": 16000, "hidden_size": 384, "intermediate_size": 1024, "moe_intermediate_size": 256,
        "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 8,
        "num_experts_per_tok": 2, "tie_word_embeddings": True,
    }),
    "window": Shape("gemma3_text", {
        "vocab_size": 16000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 512,
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One row: a shape, a context and settings beside the defaults."""

    shape: str
    context: int
    settings: list[str] = field(default_factory=list)


POINTS = {
    "tiny-4k": Point("tiny", 4096),
    "tiny-16k": Point("tiny", 16384),
    "tiny-16k-kept": Point("tiny", 16384, ["train.activation_checkpointing=false"]),
    "tiny-64k": Point("tiny", 65536),
    "mid-8k": Point("mid", 8192),
    "mid-8k-tiled": Point("mid", 8192, ["train.mlp_tile_tokens=1024", "train.loss_chunk_tokens=256"]),
    "mid-16k-full": Point("mid", 16384, ["attention.pattern=full"]),
    "mid-4k-float32": Point("mid", 4096, ["model.dtype=float32"]),
    "mid-4k-batch": Point("mid", 4096, ["train.micro_batch_size=2"]),
    "mid-8k-lora": Point("mid", 8192, ["adapter.train_embeddings=false", "adapter.target_modules=all-linear"]),
    "smol-4k": Point("smol", 4096),
    "smol-16k": Point("smol", 16384),
    "smol-4k-kept": Point("smol", 4096, ["train.activation_checkpointing=false"]),
    "smol-8k-every-2": Point("smol", 8192, ["train.activation_checkpointing_every=2"]),
    "smol-8k-accumulated": Point("smol", 8192, ["train.grad_accum_steps=2"]),
    "smol-32k": Point("smol", 32768, ["train.loss_chunk_tokens=256"]),
    "moe-4k": Point("moe", 4096),
    "window-8k": Point("window", 8192),
}


def make(point: Point, folder: Path) -> None:
    """A model folder with random weights and a shard of random letters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from longlora.artifacts import RunFolder
    from longlora.data.documents import Document, ReadReport
    from longlora.data.shards import write_shard
    from longlora.model.build import tokenizer_hash

    shape = SHAPES[point.shape]
    config = AutoConfig.for_model(shape.kind, max_position_embeddings=point.context // 2, pad_token_id=0, **shape.sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rules = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules)
    tokenizer.save_pretrained(folder / "model")
    generator = random.Random(0)
    texts = ("".join(generator.choices("abcdefghij ", k=point.context)) for _ in range(4))
    write_shard(
        RunFolder(folder / "run").train_shard,
        (Document(str(number), text) for number, text in enumerate(texts)),
        tokenizer,
        tokenizer_hash=tokenizer_hash(tokenizer),
        add_special_tokens=False,
        report=ReadReport(),
    )


def recipe_of(point: Point, folder: Path) -> Any:
    from longlora.config import build_recipe

    values = {
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(folder / "model")},
        "context": {"context_length": point.context},
        "attention": {"group_size": 1024},
        "train": {"steps": STEPS, "grad_accum_steps": 1, "warmup_steps": 0, "save_steps": 1000},
    }
    return build_recipe(values, point.settings)


def predict(point: Point, folder: Path) -> dict[str, Any]:
    from longlora.model.build import load_config
    from longlora.planning.calibrate import calibrate
    from longlora.planning.machines import this_machine
    from longlora.planning.plan import plan_run

    recipe = recipe_of(point, folder)
    config = load_config(recipe.model)
    plan = plan_run(recipe, config, calibrate(config, recipe, this_machine()))
    return {"bytes": plan.memory.peak, "seconds": plan.time.total, "parts": plan.memory.parts}


def measure(point: Point, folder: Path) -> dict[str, Any]:
    from rich.console import Console

    from longlora.artifacts import RunFolder
    from longlora.training.trainer import train

    recipe = recipe_of(point, folder)
    train(recipe, Console(file=sys.stderr))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = [json.loads(line) for line in RunFolder(recipe.run_path).metrics.read_text().splitlines()]
    times = [row["seconds"] for row in rows]
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return {"bytes": peak, "seconds": statistics.median(steps)}


def in_process(way: str, name: str, folder: Path) -> dict[str, Any]:
    made = subprocess.run(
        [sys.executable, __file__, "--way", way, "--only", name, "--folder", str(folder)],
        capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if made.returncode:
        raise SystemExit(f"{name}: {way} failed:\n{made.stderr[-3000:]}")
    return json.loads(made.stdout.splitlines()[-1])


def one_way(way: str, name: str, folder: Path) -> None:
    from longlora.memory.allocator import keep_freed_memory

    keep_freed_memory()  # as the command line does
    done = {"make": make, "predict": predict, "measure": measure}[way](POINTS[name], folder)
    print(json.dumps(done))


def row_of(name: str, folder: Path) -> dict[str, Any]:
    in_process("make", name, folder)
    predicted, measured = (in_process(way, name, folder) for way in ("predict", "measure"))
    point = POINTS[name]
    error = {key: predicted[key] / measured[key] - 1 for key in ("bytes", "seconds")}
    print(
        f"{name:22} memory {predicted['bytes'] / 1e6:7.0f} of {measured['bytes'] / 1e6:7.0f} MB ({error['bytes']:+.1%})"
        f"   step {predicted['seconds']:7.2f} of {measured['seconds']:7.2f} s ({error['seconds']:+.1%})   "
        + json.dumps({key: round(value / 1e6) for key, value in predicted["parts"].items()}),
        flush=True,
    )
    return {
        "point": name, "shape": point.shape, "context": point.context, "settings": " ".join(point.settings),
        "predicted_mb": round(predicted["bytes"] / 1e6), "measured_mb": round(measured["bytes"] / 1e6),
        "memory_error": f"{error['bytes']:+.3f}", "predicted_s": f"{predicted['seconds']:.3f}",
        "measured_s": f"{measured['seconds']:.3f}", "time_error": f"{error['seconds']:+.3f}",
    }  # fmt: skip


def done_before() -> set[str]:
    path = RESULTS / "plan.csv"
    if not path.exists():
        return set()
    with path.open(encoding="utf-8") as handle:
        return {row["point"] for row in csv.DictReader(handle)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--again", action="store_true", help="also points that have a row")
    parser.add_argument("--dry", action="store_true", help="print, append nothing")
    parser.add_argument("--way", choices=("make", "predict", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        one_way(args.way, args.only[0], args.folder)
        return
    skipped = set() if args.again or args.dry else done_before()
    for name in [name for name in args.only if name not in skipped]:
        with tempfile.TemporaryDirectory() as folder:
            row = row_of(name, Path(folder))
        if not args.dry:
            append_rows("plan", [row], device_for_benchmark())


if __name__ == "__main__":
    main()
