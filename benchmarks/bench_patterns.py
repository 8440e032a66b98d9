"""Time of a training step under each attention pattern that `ablate.py` compares, against full attention.

python benchmarks/bench_patterns.py                    appends to benchmarks/results/patterns.csv
SmolLM2-135M's shape with random weights, one row, forward and backward pass through `LossModel`; embeddings and norms
are trained, linear layers pass their gradient on, as under LoRA. One pass of each pattern in turn, in one process. In
bfloat16 where the device multiplies matrices in it, else in float32. Patterns that change during training (the last
20 % full) lie between the two they are made of.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
import yaml
from ablation_variants import EXPERIMENTS, FULL_ATTENTION, UNTRAINED, Size, Variant
from bench_train_step import SHAPES
from rows import append_rows, device_for_benchmark, interleaved, percentiles
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from longlora import use_s2
from longlora.planning.machines import has_bfloat16_products
from longlora.training.loss_model import LossModel

# What changes during training, and what is not trained, has no step of its own.
PATTERNS = {
    variant.name: variant
    for variant in EXPERIMENTS["attention"]
    if variant != UNTRAINED and not any("final_fraction" in override for override in variant.overrides)
}


def s2_settings(variant: Variant, context: int) -> dict[str, Any]:
    """Arguments of `use_s2` for rows of `context` tokens."""
    overrides = (one.partition("=") for one in variant.settings(Size(context, steps=1), seed=0))
    values = {
        key.removeprefix("attention."): yaml.safe_load(value) for key, _, value in overrides if "attention." in key
    }
    values["group_size"] = int(context * values.pop("group_size_ratio"))
    if values.pop("pattern", None) == "full":
        values["full_attention_layers"] = "all"
    return values


def step(loss_model: LossModel, model: nn.Module, ids: torch.Tensor, settings: dict[str, Any]) -> None:
    use_s2(model, **settings)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    loss = loss_model(input_ids=ids, position_ids=positions, labels=ids, num_items_in_batch=ids.shape[1] - 1)["loss"]
    loss.backward()
    loss_model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048])
    parser.add_argument("--only", nargs="+", choices=PATTERNS, default=list(PATTERNS), help="beside full attention")
    parser.add_argument("--repeats", type=int, default=3, help="of each pattern, after one that does not count")
    args = parser.parse_args()
    device = device_for_benchmark()
    dtype = torch.bfloat16 if device.type == "cuda" or has_bfloat16_products() else torch.float32
    for context in args.contexts:
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES["SmolLM2-135M"], max_position_embeddings=context)
        model = LlamaForCausalLM(config).to(device, dtype).train()
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.requires_grad_(False)
        loss_model = LossModel(model, 1024, dtype)
        ids = torch.randint(config.vocab_size, (1, context), device=device)
        names = dict.fromkeys([FULL_ATTENTION.name, *args.only])
        ways = {name: partial(step, loss_model, model, ids, s2_settings(PATTERNS[name], context)) for name in names}
        times = interleaved(ways, args.repeats, device)
        full = percentiles(times[FULL_ATTENTION.name])[1]
        rows = []
        for name, seconds in times.items():
            p20, median, p80 = percentiles(seconds)
            rows.append(
                {
                    "pattern": name, "context": context, "dtype": str(dtype).removeprefix("torch."),
                    "repeats": args.repeats, "seconds": f"{median:.3f}", "p20": f"{p20:.3f}", "p80": f"{p80:.3f}",
                    "of_full_attention": f"{median / full:.3f}",
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
        append_rows("patterns", rows, device)


if __name__ == "__main__":
    main()
