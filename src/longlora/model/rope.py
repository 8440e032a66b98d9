"""Rotary position embeddings for a longer context, written into the config before the model is built.

In: a transformers config and the context to reach. Out: a copy of the config with full `rope_parameters`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longlora.config import Recipe
from longlora.errors import ModelError, one_line

_NUMBERS = ("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor")
_RESCALABLE = ("default", "linear", "yarn", "llama3")


@dataclass(frozen=True)
class RopeChange:
    """What was changed: both contexts in tokens, both parameter sets."""

    original_context_length: int
    context_length: int
    before: dict[str, Any]
    after: dict[str, Any]


def rescale_rope(
    config: PreTrainedConfig,
    context_length: int,
    rope_type: str = "auto",
    original_context_length: int | None = None,
    rope_factor: float | None = None,
) -> tuple[PreTrainedConfig, RopeChange]:
    """A copy of `config` whose RoPE covers `context_length` tokens, and what was changed.

    A config that is already rescaled is scaled further: the factors multiply.

    Args:
        rope_type: ``linear`` divides all frequencies by the factor (position interpolation, Chen et al. 2023; the
            LongLoRA paper's choice); ``yarn`` divides low frequencies only and sharpens attention (Peng et al. 2023);
            ``theta`` raises the base to theta * factor^(D / (D - 2)) (NTK-aware scaling); ``auto`` keeps the scaling
            that the model already has and otherwise takes yarn.
        original_context_length: tokens the model handles now, where the config does not say it unambiguously.
        rope_factor: stretch of positions on top of an existing one; new over original context if None.

    Raises:
        ModelError: the model has no RoPE or one that cannot be scaled further, or the context is not longer.
    """
    before = rope_parameters(config)
    native_type = before.get("rope_type", "default")
    if native_type not in _RESCALABLE:
        raise ModelError(f"rope_type {native_type!r} of the model cannot be rescaled; known: {', '.join(_RESCALABLE)}")
    original = original_context_length or current_context(config)
    if context_length <= original:
        raise ModelError(
            f"context.context_length={context_length} is not longer than the model's {original} tokens; "
            "raise context.context_length"
        )
    if rope_type == "auto":
        rope_type = "yarn" if native_type == "default" else native_type
    if native_type not in ("default", rope_type):
        raise ModelError(
            f"context.rope_type={rope_type}: the model already uses {native_type}; scale it further with "
            "context.rope_type=auto"
        )
    ratio = context_length / original
    if rope_factor is not None and rope_factor < ratio:
        raise ModelError(
            f"context.rope_factor={rope_factor} is less than {context_length} / {original} tokens = {ratio:g}; "
            f"give at least {ratio:g} or null"
        )
    after = _scaled(config, before, rope_type, rope_factor or ratio, original)
    try:
        extended = _taken(config, after, context_length)
    except Exception as error:
        raise ModelError(
            f"model type {config.model_type!r} does not take rope_type {rope_type!r} ({one_line(error)}): "
            f"{_other_type(config, before, rope_factor or ratio, context_length)}"
        ) from error
    return extended, RopeChange(original, context_length, before, after)


def with_rope(config: PreTrainedConfig, parameters: dict[str, Any], context_length: int) -> PreTrainedConfig:
    """A copy of `config` with these `rope_parameters` (of all layer types) and a context of so many tokens."""
    changed = copy.deepcopy(config)
    changed.rope_parameters = copy.deepcopy(parameters)
    changed.max_position_embeddings = context_length
    if getattr(changed, "head_dim", 0) is None:  # left open by some configs, and missed by transformers' own functions
        changed.head_dim = config.hidden_size // config.num_attention_heads
    return changed


def _taken(config: PreTrainedConfig, after: dict[str, Any], context_length: int) -> PreTrainedConfig:
    """`config` with `after` for its full-attention layers; whatever its class raises that does not take it."""
    extended = with_rope(config, _replace_global(config.rope_parameters, after), context_length)
    type(config).from_dict(extended.to_dict())
    return extended


def _other_type(config: PreTrainedConfig, before: dict[str, Any], ratio: float, context_length: int) -> str:
    """What to do about a model type that validates its RoPE and refuses the scaling asked for."""
    try:
        _taken(config, _scaled(config, before, "theta", ratio, context_length), context_length)
    except Exception:
        return "its RoPE cannot be rescaled by any way that longlora knows"
    return "set context.rope_type=theta"


def rescale_for(recipe: Recipe, config: PreTrainedConfig) -> tuple[PreTrainedConfig, RopeChange]:
    """`rescale_rope` with the settings of a recipe.

    Instructions need no longer context than the model has: up to that RoPE is left as it is, and so is the context.
    """
    context, original = recipe.context, recipe.model.original_context_length
    if recipe.data.kind == "instruct":
        original = original or current_context(config)
        if context.context_length <= original:
            return _unchanged(recipe, config, original)
    return rescale_rope(config, context.context_length, context.rope_type, original, context.rope_factor)


def _unchanged(recipe: Recipe, config: PreTrainedConfig, original: int) -> tuple[PreTrainedConfig, RopeChange]:
    if recipe.context.rope_factor is not None:
        raise ModelError(
            f"context.rope_factor={recipe.context.rope_factor}: context.context_length="
            f"{recipe.context.context_length} is within the model's {original} tokens, so RoPE stays as it is; set "
            "context.rope_factor=null"
        )
    before, after = rope_parameters(config), rope_parameters(config)
    factor = after.get("factor") or 1.0
    if factor != 1.0 and not after.get("original_max_position_embeddings"):
        # Changes no frequency; without it nobody can tell from the result's config which context it gives.
        after["original_max_position_embeddings"] = math.ceil(original / factor)
    same = with_rope(config, _replace_global(config.rope_parameters, after), original)
    return same, RopeChange(original, original, before, after)


def rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """RoPE of the full-attention layers; `ModelError` for a model without RoPE, or whose numbers are none."""
    parameters = getattr(config, "rope_parameters", None)
    # Models that mix windows keep one set per layer type; only full-attention layers see the longer context.
    if parameters and "full_attention" in parameters:
        parameters = parameters["full_attention"]
    if not parameters:
        raise ModelError(f"model type {config.model_type!r} has no rotary position embeddings to rescale")
    kinds = [key for key, value in parameters.items() if isinstance(value, dict)]
    if kinds and "rope_theta" not in parameters:
        raise ModelError(
            f"model type {config.model_type!r} has RoPE for layers of kind {', '.join(kinds)}, and longlora rescales "
            "that of full_attention only"
        )
    for name in _NUMBERS:
        value = parameters.get(name)
        if value is None and name != "rope_theta":  # as transformers reads it: not given
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ModelError(f"rope_parameters of the model: {name} is {value!r:.40}, not a positive number")
    return dict(parameters)


def assert_rope_applied(model: nn.Module, config: PreTrainedConfig) -> None:
    """Raise `ModelError` unless the frequencies in use are those of `config` (a later change of it has no effect)."""
    expected, scaling = expected_frequencies(config)
    for name, module in model.named_modules():
        # Models with one set per layer type keep its name in front.
        prefix = "full_attention_" if hasattr(module, "full_attention_inv_freq") else ""
        inv_freq = getattr(module, f"{prefix}inv_freq", None)
        if isinstance(inv_freq, torch.Tensor) and inv_freq.shape == expected.shape:
            applied = inv_freq.detach().float().cpu()
            applied_scaling = getattr(module, f"{prefix}attention_scaling")
            if torch.allclose(applied, expected, rtol=1e-5, atol=0) and applied_scaling == scaling:
                return
            raise ModelError(
                f"{name}.inv_freq does not follow the config's rope_parameters: "
                "set them before the model is built (longlora.model.build does)"
            )
    raise ModelError(f"{type(model).__name__} has no rotary frequencies of {expected.numel()} values to check")


def expected_frequencies(config: PreTrainedConfig) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [D/2] in float32 and the attention factor that `config` asks for."""
    parameters = rope_parameters(config)
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        flat = copy.deepcopy(config)
        flat.rope_parameters = parameters
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](flat, torch.device("cpu"))
        return inv_freq.float(), float(scaling)
    width = _rotary_width(config, parameters)
    return 1.0 / parameters["rope_theta"] ** (torch.arange(0, width, 2).float() / width), 1.0


def _scaled(
    config: PreTrainedConfig, before: dict[str, Any], rope_type: str, ratio: float, original: int
) -> dict[str, Any]:
    if rope_type == "theta":
        width = _rotary_width(config, before)
        return {**before, "rope_type": "default", "rope_theta": before["rope_theta"] * ratio ** (width / (width - 2))}
    pretrained = before.get("original_max_position_embeddings") or math.ceil(original / (before.get("factor") or 1.0))
    after = {
        **before,
        "rope_type": rope_type,
        "factor": (before.get("factor") or 1.0) * ratio,
        "original_max_position_embeddings": pretrained,
    }
    # A stored attention factor belongs to the old factor; without one transformers computes it.
    after.pop("attention_factor", None)
    return after


def current_context(config: PreTrainedConfig) -> int:
    """Tokens the model handles now. Configs of scaled models give the length before or after the scaling.

    Raises:
        ModelError: the model has no RoPE, or its config does not say which of the two it gives.
    """
    before = rope_parameters(config)
    context, factor = int(config.max_position_embeddings), before.get("factor") or 1.0
    pretrained = before.get("original_max_position_embeddings")
    if factor == 1.0 or (pretrained and context > pretrained):
        return context
    if pretrained:
        return int(pretrained * factor)
    raise ModelError(
        f"the model's RoPE is already scaled by {factor} and its config ({context} tokens) does not say "
        "whether that is included; set model.original_context_length to the tokens it handles now"
    )


def _rotary_width(config: PreTrainedConfig, parameters: dict[str, Any]) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))


def _replace_global(parameters: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {**parameters, "full_attention": after} if "full_attention" in parameters else after
