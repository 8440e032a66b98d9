"""What `accelerate launch` and its config file ask for, beside a recipe: followed, or refused, and said.

accelerate passes its settings in environment variables, which its library would read behind the recipe's back.
"""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from longlora.config import Recipe
from longlora.errors import RecipeError

# Of accelerate's FSDP settings those that change what is done here: the units, their types and their files are ours.
_FSDP_OTHERS = {
    "FSDP_OFFLOAD_PARAMS": ("false", "weights stay on their devices: leave --fsdp_offload_params out"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "layers are freed after use: leave --fsdp_reshard_after_forward out"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "set train.activation_checkpointing instead"),
}
_DEEPSPEED = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
)
_FOREIGN = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism config",
}


def with_launcher_settings(
    recipe: Recipe, environment: MutableMapping[str, str] | None = None
) -> tuple[Recipe, list[str]]:
    """The recipe with what `accelerate launch` asked for, and a line for each thing that it did not say itself.

    What was read leaves the environment, so that the libraries do not act on it once more.

    Raises:
        RecipeError: the two contradict each other, or it cannot be done.
    """
    settings = os.environ if environment is None else environment
    for name, what in _FOREIGN.items():
        if _on(settings, name):
            raise RecipeError(
                f"accelerate launch asks for {what}, which longlora does not use: see recipe section parallel"
            )
    precision = settings.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16") or (precision == "bf16" and recipe.model.dtype != "bfloat16"):
        raise RecipeError(
            f"accelerate launch asks for --mixed_precision {precision}, the recipe for "
            f"model.dtype={recipe.model.dtype}: set model.dtype and leave --mixed_precision out"
        )
    dynamo = settings.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        raise RecipeError(
            f"accelerate launch asks for --dynamo_backend {dynamo}, which longlora does not use: leave it out"
        )
    settings.pop("ACCELERATE_MIXED_PRECISION", None)  # as model.dtype says; DeepSpeed's own would cast what is trained
    if _on(settings, "ACCELERATE_USE_DEEPSPEED"):
        return _with_deepspeed(recipe, settings)
    if not _on(settings, "ACCELERATE_USE_FSDP"):
        return recipe, []
    return _with_fsdp(recipe, settings)


def _with_fsdp(recipe: Recipe, settings: MutableMapping[str, str]) -> tuple[Recipe, list[str]]:
    version = settings.get("FSDP_VERSION", "1")
    if version != "2":
        raise RecipeError(f"accelerate launch asks for FSDP version {version}: give --fsdp_version 2")
    if recipe.parallel.shard not in ("none", "fsdp2"):
        raise RecipeError(
            f"accelerate launch asks for FSDP, the recipe for parallel.shard={recipe.parallel.shard}: leave one of "
            "them out"
        )
    for name, (ours, remedy) in _FSDP_OTHERS.items():
        if (found := settings.get(name, ours).lower()) != ours:
            raise RecipeError(f"accelerate launch asks for {name}={found}: {remedy}")
    for name in [name for name in settings if name == "ACCELERATE_USE_FSDP" or name.startswith("FSDP_")]:
        del settings[name]
    if recipe.parallel.shard == "fsdp2":
        return recipe, []
    parallel = recipe.parallel.model_copy(update={"shard": "fsdp2"})
    return recipe.model_copy(update={"parallel": parallel}), ["parallel.shard=fsdp2, as accelerate launch asks"]


def _with_deepspeed(recipe: Recipe, settings: MutableMapping[str, str]) -> tuple[Recipe, list[str]]:
    """The stage is followed; what else DeepSpeed is told follows from the recipe."""
    prefix = "ACCELERATE_DEEPSPEED_"
    file = settings.get(f"{prefix}CONFIG_FILE")
    zero = _zero_section(Path(file)) if file else {}
    stage = str(zero.get("stage", "none given") if file else settings.get(f"{prefix}ZERO_STAGE", "2"))
    if stage not in ("2", "3"):
        raise RecipeError(f"accelerate launch asks for DeepSpeed with ZeRO stage {stage}: give --zero_stage 2 or 3")
    for what in ("optimizer", "param"):
        section = zero.get(f"offload_{what}")
        given = section.get("device", "none") if isinstance(section, dict) else "none"
        place = str(given) if file else settings.get(f"{prefix}OFFLOAD_{what.upper()}_DEVICE", "none")
        if place != "none":
            raise RecipeError(
                f"accelerate launch asks for DeepSpeed's offload_{what} to {place}, which longlora does not use: leave "
                "it out, and see train.activation_offload"
            )
    shard = f"zero{stage}"
    if recipe.parallel.shard not in ("none", shard):
        raise RecipeError(
            f"accelerate launch asks for DeepSpeed with ZeRO stage {stage}, the recipe for "
            f"parallel.shard={recipe.parallel.shard}: leave one of them out"
        )
    for name in [name for name in settings if name in _DEEPSPEED or name.startswith(prefix)]:
        del settings[name]
    lines = [f"of {file} the stage of ZeRO is used, the rest follows from the recipe"] if file else []
    if recipe.parallel.shard == shard:
        return recipe, lines
    lines.append(f"parallel.shard={shard}, as accelerate launch asks")
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"shard": shard})}), lines


def _zero_section(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"DeepSpeed's config {path} cannot be read ({type(error).__name__}: {error}): give accelerate launch "
            "--zero_stage 2 or 3 in its place"
        ) from error
    return found if isinstance(found, dict) else {}


def _on(settings: MutableMapping[str, str], name: str) -> bool:
    return settings.get(name, "false").lower() in ("true", "1", "yes")
