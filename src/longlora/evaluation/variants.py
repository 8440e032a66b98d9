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
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from longlora import __version__
from longlora.artifacts import RunFolder
from longlora.config import ModelConfig, Recipe
from longlora.data.instruct_template import adopt_template
from longlora.errors import RecipeError, RunFolderError
from longlora.model.build import load_config, load_model, load_tokenizer, weights_fingerprint
from longlora.model.merge import merged_model
from longlora.model.rope import current_context, rescale_for
from longlora.model.sidecar import read_sidecar


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


def tokenizer_of(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; of a run on instructions with its template, in which every variant is asked."""
    tokenizer = load_tokenizer(recipe.model)
    if recipe.data.kind == "instruct":
        adopt_template(tokenizer, recipe.data.instruct)
    return tokenizer


def load_variant(recipe: Recipe, run: RunFolder, variant: str) -> PreTrainedModel:
    """``base``, ``rope_only``, or ``trained``: merged/, or the adapter merged in memory where there is none.

    Raises:
        RecipeError: there is no variant of this name.
        RunFolderError: as `require_variants`.
    """
    if variant == "base":
        return load_model(recipe.model)
    if variant == "rope_only":
        config, _ = rescale_for(recipe, load_config(recipe.model))
        return load_model(recipe.model, config)
    if variant != "trained":
        raise RecipeError(f"variant {variant!r} is not known: give base, rope_only or trained")
    require_variants(recipe, run)
    if run.merged.exists():
        return load_model(recipe.model.model_copy(update={"name_or_path": str(run.merged), "revision": None}))
    return merged_model(run.adapter)


def require_variants(recipe: Recipe, run: RunFolder) -> None:
    """Refuse what would be found out only after hours of measuring the others.

    Raises:
        ModelError: the recipe does not fit the base model.
        RunFolderError: ``trained`` is asked for and nothing was trained yet, or for another context than the recipe's.
    """
    if "trained" not in recipe.eval.variants:
        return
    if run.merged.exists():
        folder, context = run.merged, current_context(load_config(ModelConfig(name_or_path=str(run.merged))))
    elif run.adapter.exists():
        folder, context = run.adapter, read_sidecar(run.adapter).context_length
    else:
        raise RunFolderError(f"{run.root} holds no trained model: run `longlora train` first, or leave out trained")
    # Not the recipe's own number: instructions may be shorter than the context of the model, which then stays.
    wanted, length = contexts_of(recipe, load_config(recipe.model)).extended, recipe.context.context_length
    if context != wanted:
        raise RunFolderError(
            f"{folder} was trained for {context} tokens, the recipe says context.context_length={length}"
            f"{'' if wanted == length else f' within {wanted} of the model'}: leave that as it was; to measure other "
            "lengths give eval.perplexity.context_lengths and eval.passkey.lengths"
        )


SAME_MODEL = ("weights", "rope_parameters", "attention", "dtype")
"""Keys of `environment` that must agree where rows of two measurements stand side by side."""


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
