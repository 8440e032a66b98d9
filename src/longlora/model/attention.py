"""The attention section of a recipe, applied to a model: the one place that turns settings into `use_s2`."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from torch import nn

from longlora.attention.registry import use_s2
from longlora.config import AttentionConfig, Recipe
from longlora.errors import UnsupportedModelError


def apply_attention(model: nn.Module, settings: AttentionConfig, context_length: int, *, full: bool = False) -> bool:
    """Let `model` train as `settings` say; true if S2-Attn computes its attention now.

    Args:
        context_length: tokens, for a group size that is a ratio.
        full: full attention in all layers, whatever the pattern.

    Raises:
        ModelError: a setting cannot be used, or the architecture is not supported. With ``pattern: full`` such an
            architecture keeps its own attention, and the answer is false.
    """
    try:
        use_s2(model, **s2_arguments(settings, context_length, full=full))
    except UnsupportedModelError:
        if settings.pattern != "full":
            raise
        return False
    return True


def s2_arguments(settings: AttentionConfig, context_length: int, *, full: bool = False) -> dict[str, Any]:
    """What `settings` are as arguments of `use_s2`; see `apply_attention`."""
    every_layer = full or settings.pattern == "full"
    return {
        "group_size": settings.resolve_group_size(context_length),
        "sink_tokens": settings.sink_tokens,
        "shift": settings.shift,
        "full_attention_layers": "all" if every_layer else settings.full_attention_layers,
        "backend": settings.backend,
    }


def full_attention_steps(recipe: Recipe) -> int:
    """How many of the last steps are trained with full attention: at least one where a fraction is asked for."""
    if recipe.attention.pattern == "full":
        return recipe.train.steps
    # As it is written: 0.07 of 100 steps is 7, but 100 * 0.07 is a little more.
    return math.ceil(recipe.train.steps * Fraction(str(recipe.attention.full_attention_final_fraction)))
