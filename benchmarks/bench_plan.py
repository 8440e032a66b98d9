"""What the planner predicts against what training takes: peak memory and seconds of a step.

python benchmarks/bench_plan.py            writes benchmarks/results/plan.csv; points that are there are left out
python benchmarks/bench_plan.py --only smol-4k mid-8k --again

Every model has random weights and is trained for three steps twice, each time in a process of its own. Once freed
memory goes back to the system, as `longlora train` does where memory is short: peak memory (``ru_maxrss``) is from
there, and is what the planner predicts. Once it is kept, as where there is plenty: seconds, the median of the steps
after the first, are from there; the process is then larger (``kept_mb``). Time needs an idle machine, memory does not.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does, before torch

from rows import append_rows, device_for_benchmark, read_rows
from transformers import AutoConfig

from longlora.bench.inputs import random_model
from longlora.bench.step import StepCost, StepJob, measure_apart, recipe_of
from longlora.config import build_recipe
from longlora.memory.allocator import keep_freed_memory
from longlora.planning.calibrate import calibrate
from longlora.planning.machines import this_machine
from longlora.planning.plan import plan_run

STEPS = 3


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


def job_of(point: Point, folder: str, *, return_freed: bool) -> StepJob:
    """The step to measure: the point's settings, with groups of 1024."""
    dotted = build_recipe(
        {
            "run_dir": "",
            "model": {"name_or_path": ""},
            "context": {"context_length": point.context},
            "attention": {"group_size": 1024},
        },
        point.settings,
    )
    values = dotted.model_dump(include={"model", "attention", "adapter", "train"})
    return StepJob(
        "longlora", str(Path(folder) / "model"), str(Path(folder) / "run"), point.context, STEPS, values=values,
        return_freed=return_freed,
    )  # fmt: skip


def predict(point: Point) -> tuple[float, float]:
    """Bytes and seconds."""
    shape = SHAPES[point.shape]
    config = AutoConfig.for_model(shape.kind, max_position_embeddings=point.context // 2, pad_token_id=0, **shape.sizes)
    recipe = recipe_of(job_of(point, "", return_freed=True))
    plan = plan_run(recipe, config, calibrate(config, recipe, this_machine()))
    return plan.memory.peak, plan.time.total


def measure(point: Point, *, return_freed: bool) -> StepCost:
    shape = SHAPES[point.shape]
    config = AutoConfig.for_model(shape.kind, pad_token_id=0, **shape.sizes)
    with tempfile.TemporaryDirectory() as folder:
        random_model(config, point.context, Path(folder) / "model")
        cost = measure_apart(job_of(point, folder, return_freed=return_freed))
    if isinstance(cost, str):
        raise SystemExit(f"{point}: {cost}")
    return cost


def row_of(name: str) -> dict[str, Any]:
    point = POINTS[name]
    tight, kept = (measure(point, return_freed=each) for each in (True, False))
    size, seconds = predict(point)
    errors = size / tight.peak_bytes - 1, seconds / kept.seconds - 1
    print(
        f"{name:22} memory {size / 1e6:7.0f} of {tight.peak_bytes / 1e6:7.0f} MB ({errors[0]:+.1%}), kept "
        f"{kept.peak_bytes / 1e6:7.0f}   step {seconds:7.2f} of {kept.seconds:7.2f} s ({errors[1]:+.1%}), returned "
        f"{tight.seconds:7.2f}",
        flush=True,
    )
    return {
        "point": name, "shape": point.shape, "context": point.context, "settings": " ".join(point.settings),
        "predicted_mb": round(size / 1e6), "measured_mb": round(tight.peak_bytes / 1e6),
        "memory_error": f"{errors[0]:+.3f}", "kept_mb": round(kept.peak_bytes / 1e6),
        "predicted_s": f"{seconds:.3f}", "measured_s": f"{kept.seconds:.3f}", "time_error": f"{errors[1]:+.3f}",
        "returned_s": f"{tight.seconds:.3f}",
    }  # fmt: skip


def done_before() -> set[str]:
    return {row["point"] for row in read_rows("plan")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--again", action="store_true", help="also points that have a row")
    parser.add_argument("--dry", action="store_true", help="print, append nothing")
    args = parser.parse_args()
    keep_freed_memory()  # as the command line does, for the rates
    skipped = set() if args.again or args.dry else done_before()
    for name in [name for name in args.only if name not in skipped]:
        row = row_of(name)
        if not args.dry:
            append_rows("plan", [row], device_for_benchmark())


if __name__ == "__main__":
    main()
