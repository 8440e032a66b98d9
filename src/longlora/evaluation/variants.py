"""The models of a run that are measured: as it came, with RoPE rescaled only, trained; and what is said of them."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from longlora import __version__
from longlora.artifacts import RunFolder
from longlora.config import Recipe
from longlora.errors import RecipeError, RunFolderError
from longlora.model.build import load_config, load_model, weights_fingerprint
from longlora.model.merge import merged_model
from longlora.model.rope import current_context, rescale_for


@dataclass(frozen=True)
class Contexts:
    """Tokens that the model covers as it came, and that the run extends it to (the same where it extends nothing)."""

    original: int
    extended: int

    def covered(self, variant: str) -> int:
        """Tokens that the RoPE of `variant` was made for."""
        return self.original if variant == "base" else self.extended


def contexts_of(recipe: Recipe, config: PreTrainedConfig) -> Contexts:
    """Both contexts; a recipe that measures nothing but the base model need not extend it.

    Raises:
        LongLoraError: RoPE cannot be rescaled as the recipe says.
    """
    if recipe.eval.variants == ["base"]:
        original = recipe.model.original_context_length or current_context(config)
        return Contexts(original, max(original, recipe.context.context_length))
    _, change = rescale_for(recipe, config)
    return Contexts(change.original_context_length, change.context_length)


def load_variant(recipe: Recipe, run: RunFolder, variant: str) -> PreTrainedModel:
    """``base``, ``rope_only``, or ``trained``: the merged model, or the adapter merged in memory where there is none.

    Raises:
        RecipeError: there is no variant of this name.
        RunFolderError: nothing was trained yet.
    """
    if variant == "base":
        return load_model(recipe.model)
    if variant == "rope_only":
        config, _ = rescale_for(recipe, load_config(recipe.model))
        return load_model(recipe.model, config)
    if variant != "trained":
        raise RecipeError(f"variant {variant!r} is not known: give base, rope_only or trained")
    if run.merged.exists():
        return load_model(recipe.model.model_copy(update={"name_or_path": str(run.merged), "revision": None}))
    if not run.adapter.exists():
        raise RunFolderError(f"{run.adapter} does not exist: run `longlora train` first, or leave out trained")
    return merged_model(run.adapter)


def environment(recipe: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    """What a reader needs to measure the same again, as it stands in every file of rows."""
    return {
        "model": recipe.model.name_or_path,
        "weights": weights_fingerprint(model),
        "rope_parameters": getattr(model.config, "rope_parameters", None),
        "attention": f"full ({model.config._attn_implementation})",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")} | {"longlora": __version__},
        "commit": _commit(),
        "date": date.today().isoformat(),
    }


def device_name(device: torch.device) -> str:
    """What a row says about the hardware: the GPU, or the CPU with its threads and vector units."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        made = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return made.stdout.strip() or None if made.returncode == 0 else None
