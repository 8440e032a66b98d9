"""The settings that save memory, those that cost least time first: one list for plan, `memory: auto` and errors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from longlora.config import Recipe, build_recipe

_SMALL_CHUNK = 256
_TILES = (2048, 512)
_EVERY = (4, 2, 1)


@dataclass(frozen=True)
class Lever:
    """Settings to change, by dotted key, and the parts of `planning.memory.Memory` that they make smaller."""

    settings: dict[str, Any]
    eases: tuple[str, ...]
    automatic: bool = True
    """Whether ``memory: auto`` may pull it: not what changes what is trained, or the type of the result. Those on CUDA
    that round states or frozen weights are the last ones it tries."""

    def __str__(self) -> str:
        return written(self.settings)


def levers(recipe: Recipe, *, cuda: bool) -> list[Lever]:
    """The levers that `recipe` does not pull yet; of those with the same key the later one is the stronger one.

    Args:
        cuda: whether the machine has what only runs on CUDA.
    """
    train = recipe.train
    pulled: list[Lever] = []

    def add(wanted: bool, settings: dict[str, Any], *eases: str) -> None:
        if wanted:
            pulled.append(Lever(settings, eases))

    batch = train.micro_batch_size * train.grad_accum_steps
    add(train.loss_chunk_tokens > _SMALL_CHUNK, {"train.loss_chunk_tokens": _SMALL_CHUNK}, "temporary")
    add(
        train.micro_batch_size > 1,
        {"train.micro_batch_size": 1, "train.grad_accum_steps": batch},
        "saved_activations",
        "temporary",
    )
    for every in _EVERY:
        kept = not train.activation_checkpointing or train.activation_checkpointing_every > every
        settings = {"train.activation_checkpointing": True, "train.activation_checkpointing_every": every}
        add(kept, settings, "saved_activations")
    for tile in _TILES:
        coarser = train.mlp_tile_tokens is None or train.mlp_tile_tokens > tile
        add(coarser, {"train.mlp_tile_tokens": tile}, "temporary", "saved_activations")
    add(cuda and not train.activation_offload, {"train.activation_offload": True}, "saved_activations")
    # Its states cannot be divided among devices, and there is little left of them where they are.
    whole = recipe.parallel.shard == "none"
    add(cuda and whole and train.optimizer == "adamw", {"train.optimizer": "adamw_8bit"}, "optimizer")
    full = recipe.adapter.method == "full"  # no weight is frozen then
    add(cuda and not full and recipe.model.quantization == "none", {"model.quantization": "nf4"}, "frozen_weights")
    if recipe.model.dtype == "float32":
        pulled.append(Lever({"model.dtype": "bfloat16"}, ("frozen_weights", "temporary"), automatic=False))
    if not full and recipe.adapter.train_embeddings and recipe.adapter.embedding_rows == "all":
        rows = {"adapter.embedding_rows": "occurring"}
        pulled.append(Lever(rows, ("trained_weights", "gradients", "optimizer"), automatic=False))
    return pulled


def across_devices(recipe: Recipe, devices: int) -> list[dict[str, Any]]:
    """Settings of the section `parallel` that divide more among `devices`, those with fewer messages first.

    None of them is a `Lever`: who shares a row changes how many rows a step has.
    """
    now = recipe.parallel
    sequences = [number for number in range(now.sequence, devices + 1) if devices % number == 0]
    # ZeRO-2 divides less, and FSDP2 no weights in 4 bits; both are kept where the recipe says so.
    shards = [now.shard] if now.shard in ("fsdp2", "zero3") or devices == 1 else [now.shard, "fsdp2"]
    every = [
        {"parallel.shard": shard, "parallel.sequence": sequence}
        for sequence in sequences
        for shard in shards
        if (shard, sequence) != (now.shard, now.sequence)
    ]
    return [{key: value for key, value in each.items() if value != _now(recipe, key)} for each in every]


def _now(recipe: Recipe, key: str) -> Any:
    return getattr(recipe.parallel, key.removeprefix("parallel."))


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """`recipe` with dotted settings changed."""
    return build_recipe(recipe.model_dump(), [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def with_levers(recipe: Recipe, pulled: list[Lever]) -> Recipe:
    """`recipe` with levers pulled one after the other."""
    return with_settings(recipe, settings_of_levers(pulled))


def settings_of_levers(pulled: list[Lever]) -> dict[str, Any]:
    """What levers set together; a later one replaces an earlier one of the same key."""
    settings: dict[str, Any] = {}
    for lever in pulled:
        settings |= lever.settings
    return settings


def written(settings: dict[str, Any]) -> str:
    """Settings as they are given on the command line."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return " ".join(f"{key}={text}" for key, text in texts.items())
