"""What `use_s2` leaves on each attention module of a model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from longlora.attention.backends import Backend
from longlora.attention.layers import dispatching_forward
from longlora.attention.pattern import FULL, S2Pattern
from longlora.errors import ModelError

S2_ATTENTION = "s2_attn"
"""The name under which transformers knows the attention and the mask function."""

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model that another process sent (``mp.spawn``, ``torch.load``) finds its attention registered here too."""
        from longlora.attention.registry import register

        vars(self).update(state)
        register()


def settings_of(module: nn.Module) -> S2Settings:
    """What `use_s2` left on an attention module; `ModelError` in training if it did not."""
    settings: S2Settings | None = getattr(module, SETTINGS, None)
    if settings is not None:
        return settings
    if not module.training:  # a fresh model of a config that says s2_attn, as trainers make for reference
        own = usual_attention(type(module))
        return S2Settings(FULL, own, "auto", sparse_in_evaluation=False, wraparound=False)
    raise ModelError(f"{type(module).__name__} has no S2-Attn settings: call longlora.use_s2(model) first")


def usual_attention(kind: type[nn.Module]) -> str:
    """Full attention of a model whose config says s2_attn and no other: what transformers takes where none is named.

    That is sdpa, unless the models in the attention class's own file cannot use it (Gemma 2 has soft caps).
    """
    forward = dispatching_forward(kind)
    models = [value for value in forward.__globals__.values() if inspect.isclass(value)] if forward else []
    kinds = [model for model in models if issubclass(model, PreTrainedModel)]
    return "sdpa" if all(getattr(model, "_supports_sdpa", True) for model in kinds) else "eager"
