"""What `use_s2` leaves on each attention module of a model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from longlora.attention.backends import Backend
from longlora.attention.layers import dispatching_forward
from longlora.attention.pattern import FULL, S2Pattern
from longlora.errors import ModelError

SETTINGS = "longlora_s2"
"""The attribute of an attention module."""


@dataclass(frozen=True)
class S2Settings:
    """How one attention module computes."""

    pattern: S2Pattern
    """Of this layer in training, unless the layer has a window of its own."""
    full_attention: str
    """The implementation before `use_s2`: what evaluation uses and `use_full` brings back."""
    backend: Backend
    sparse_in_evaluation: bool
    wraparound: bool


def settings_of(module: nn.Module) -> S2Settings:
    """What `use_s2` left on an attention module; `ModelError` in training if it did not."""
    settings: S2Settings | None = getattr(module, SETTINGS, None)
    if settings is not None:
        return settings
    if not module.training:  # a fresh model of a config that says s2_attn, as trainers make for reference
        own = "sdpa" if _supports_sdpa(type(module)) else "eager"
        return S2Settings(FULL, own, "auto", sparse_in_evaluation=False, wraparound=False)
    raise ModelError(f"{type(module).__name__} has no S2-Attn settings: call longlora.use_s2(model) first")


def _supports_sdpa(kind: type[nn.Module]) -> bool:
    """Whether the models of an attention class's own file can use scaled_dot_product_attention."""
    forward = dispatching_forward(kind)
    models = [value for value in forward.__globals__.values() if inspect.isclass(value)] if forward else []
    return all(getattr(model, "_supports_sdpa", True) for model in models if issubclass(model, PreTrainedModel))
