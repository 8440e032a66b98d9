"""A whole training step against context: what one would write today, the paper's roll, and ours.

python benchmarks/bench_train_step.py                  appends to benchmarks/results/train_step.csv
python benchmarks/bench_train_step.py --contexts 4096 8192 --only a d
python docs/make_results.py                            draws them into docs/results.md

SmolLM2-135M's shape with random weights, one row a step, bfloat16; on CUDA Llama-2-7B's shape. Variants:

- a: transformers' Trainer, PEFT's LoRA, scaled_dot_product_attention, activation checkpointing, the model's own loss
- b: a with the paper's Algorithm 1 (groups of T/4)
- c: `longlora train` with groups of T/4 and no sink tokens
- d: `longlora train` with groups of 2048 and 4 sink tokens, its defaults, and compiled norms

a and b train LoRA alone; c and d embeddings and norms too, as the paper does. Each point is a process of its own, the
variants of a context follow each other, and its seconds are the median of the steps after the first. What runs out of
memory, or is left out as hopeless (`_HOPELESS`), has a row that says so.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rows import append_rows, device_for_benchmark
from transformers import AutoConfig, PreTrainedConfig

from longlora.bench.inputs import random_model
from longlora.bench.step import StepCost, StepJob, measure_apart, recipe_of
from longlora.planning.flops import step_flops
from longlora.planning.outline import outline

SHAPES = {
    "SmolLM2-135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "Llama-2-7B": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
    },
}  # fmt: skip
PAPER = {"group_size": None, "group_size_ratio": 0.25, "sink_tokens": 0}
VARIANTS = ("a", "b", "c", "d")
CPU_CONTEXTS, CUDA_CONTEXTS = (4096, 8192, 16384, 32768, 65536), (32768, 65536, 131072, 262144, 524288)
# On two CPU cores and 23 GiB: a step of full attention takes half an hour, and neither has memory for the logits.
_HOPELESS = {("a", 65536), ("b", 65536)}


def job_of(variant: str, context: int, folder: str, steps: int) -> StepJob:
    job = StepJob("longlora", str(Path(folder) / "model"), str(Path(folder) / "run"), context, steps)
    if variant == "a":
        return replace(job, variant="trainer")
    if variant == "b":
        return replace(job, variant="roll", group_size=context // 4)
    if variant == "c":
        return replace(job, values={"attention": PAPER})
    return replace(job, values={"train": {"compile_norms": True}})


def measure(config: PreTrainedConfig, variant: str, context: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        random_model(config, context, Path(folder) / "model")
        job = job_of(variant, context, folder, steps)
        cost: StepCost | str = "left out: logits of the whole sequence do not fit here"
        if torch.cuda.is_available() or (variant, context) not in _HOPELESS:
            cost = measure_apart(job)
        recipe = recipe_of(job)
    row: dict[str, Any] = {"variant": variant, "context": context, "steps": steps}
    row |= {"seconds": "", "tokens_per_second": "", "peak_mb": "", "tflops": ""}
    if isinstance(cost, str):
        return row | {"failed": cost}
    flops = step_flops(outline(config, recipe), recipe.train, context)
    return row | {
        "seconds": f"{cost.seconds:.2f}",
        "tokens_per_second": round(cost.tokens_per_second),
        "peak_mb": round(cost.peak_bytes / 1e6),
        # Of the model alone: what is computed again is not counted. Only ours is planned.
        "tflops": f"{(flops.total - flops.recomputed.total) / cost.seconds / 1e12:.3f}" if variant in "cd" else "",
        "failed": "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    device = device_for_benchmark()
    cuda = device.type == "cuda"
    parser.add_argument("--contexts", nargs="+", type=int, default=CUDA_CONTEXTS if cuda else CPU_CONTEXTS)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--shape", choices=SHAPES, default="Llama-2-7B" if cuda else "SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=3, help="of each point, the first of which is not counted")
    parser.add_argument("--dry", action="store_true", help="print, append nothing")
    args = parser.parse_args()
    config = AutoConfig.for_model("llama", **SHAPES[args.shape])
    for context in args.contexts:
        for variant in args.only:
            row = {"shape": args.shape} | measure(config, variant, context, args.steps)
            print(row, flush=True)
            if not args.dry:
                append_rows("train_step", [row], device)


if __name__ == "__main__":
    main()
