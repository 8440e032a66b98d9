"""What to say when memory runs out in training: the part that probably takes most, and the next lever to pull.

The parts are counted or estimated by simple formulas; they need not be exact to name the largest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel

from longlora.config import CHANGEABLE_ON_RESUME, Recipe

Part = Literal[
    "frozen weights",
    "trained weights with their gradients and optimizer state",
    "saved activations",
    "activations of one layer",
    "logits of one chunk",
]

_OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
_SMALL_TILE = 1024
_SMALL_CHUNK = 256


@dataclass(frozen=True)
class Lever:
    """A setting that makes `part` smaller, and whether this run can still use it."""

    key: str
    value: str
    part: Part
    usable: bool


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is the way torch or Python say that there is no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def explain_out_of_memory(error: BaseException, model: PeftModel, recipe: Recipe, step: int) -> str:
    """One line: what happened, the largest part, and what to do."""
    parts = memory_parts(model, recipe)
    largest = max(parts, key=parts.__getitem__)
    device = model.device.type
    usable = [lever for lever in levers(recipe, device) if lever.usable]
    chosen = next((lever for lever in usable if lever.part == largest), usable[0] if usable else None)
    if chosen is None:
        remedy = "no lever is left: lower context.context_length or take a machine with more memory"
    elif chosen.key.removeprefix("train.") in CHANGEABLE_ON_RESUME:
        remedy = f"resume with {chosen.key}={chosen.value} (whole checkpoints are intact)"
    else:
        remedy = f"train in another run_dir with {chosen.key}={chosen.value}; whole checkpoints are intact"
    what = " ".join(str(error).split())[:160] or "no message"
    return (
        f"out of memory on {device} in step {step} ({what}): the largest part is about {parts[largest] / 2**30:.2f} "
        f"GiB of {largest} at {recipe.context.context_length:,} tokens; {remedy}"
    )


def memory_parts(model: PeftModel, recipe: Recipe) -> dict[Part, float]:
    """Bytes by part: weights are counted, the rest is estimated."""
    train = recipe.train
    config: Any = model.get_base_model().config.get_text_config(decoder=True)
    tokens = train.micro_batch_size * recipe.context.context_length
    size = 2 if recipe.model.dtype == "bfloat16" else 4
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    tile = min(tokens, train.mlp_tile_tokens or tokens)
    # Of a layer: both norms, queries, keys, values, attention and residuals; gate, up and what is made of them.
    layer = size * (10 * tokens * hidden + 4 * tile * inner)
    checkpointed = -(-layers // train.activation_checkpointing_every) if train.activation_checkpointing else 0
    inputs = 0 if train.activation_offload else checkpointed * tokens * hidden * size
    weights = list(model.parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    return {
        "frozen weights": sum(w.numel() * w.element_size() for w in weights if not w.requires_grad),
        "trained weights with their gradients and optimizer state": trained * (8 + _OPTIMIZER_BYTES[train.optimizer]),
        "saved activations": inputs + (layers - checkpointed) * layer,
        "activations of one layer": 2 * layer,
        "logits of one chunk": min(tokens, train.loss_chunk_tokens) * config.vocab_size * (size + 8),
    }


def levers(recipe: Recipe, device: str) -> list[Lever]:
    """Every lever, the cheapest first."""
    train, cuda = recipe.train, device == "cuda"
    tile = train.mlp_tile_tokens
    one = f"1 train.grad_accum_steps={train.micro_batch_size * train.grad_accum_steps}"
    smaller = _SMALL_TILE if tile is None else tile // 2
    return [
        Lever("train.activation_checkpointing", "true", "saved activations", not train.activation_checkpointing),
        Lever(
            "train.activation_checkpointing_every", "1", "saved activations", train.activation_checkpointing_every > 1
        ),
        Lever(
            "train.loss_chunk_tokens", str(_SMALL_CHUNK), "logits of one chunk", train.loss_chunk_tokens > _SMALL_CHUNK
        ),
        Lever("train.mlp_tile_tokens", str(smaller), "activations of one layer", tile is None or tile > 128),
        Lever("train.micro_batch_size", one, "saved activations", train.micro_batch_size > 1),
        Lever("train.micro_batch_size", one, "activations of one layer", train.micro_batch_size > 1),
        Lever("model.dtype", "bfloat16", "frozen weights", recipe.model.dtype == "float32"),
        Lever(
            "adapter.embedding_rows",
            "occurring",
            "trained weights with their gradients and optimizer state",
            recipe.adapter.train_embeddings and recipe.adapter.embedding_rows == "all",
        ),
        Lever(
            "train.optimizer",
            "paged_adamw_8bit",
            "trained weights with their gradients and optimizer state",
            cuda and train.optimizer != "paged_adamw_8bit",
        ),
        Lever("train.activation_offload", "true", "saved activations", cuda and not train.activation_offload),
        Lever("model.quantization", "nf4", "frozen weights", recipe.model.quantization == "none"),
    ]
