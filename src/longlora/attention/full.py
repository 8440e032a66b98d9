"""Full attention as the model computes it without `use_s2`, from inside the attention function that `use_s2` sets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longlora.attention.layers import dispatching_forward
from longlora.attention.lazy_mask import LazyMask
from longlora.errors import ModelError


def full_attention_forward(
    implementation: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What `implementation`, transformers' name of an attention function, makes of the arguments it would get."""
    if isinstance(mask, LazyMask):
        mask = mask.full_for(implementation)
    function = _eager(type(module)) if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    return function(_Named(module, implementation), query, key, value, mask, **kwargs)  # type: ignore[no-any-return]


def _eager(kind: type[nn.Module]) -> Callable[..., Any]:
    """Each architecture has its own, in the file of its attention class, under no key."""
    forward = dispatching_forward(kind)
    function = forward.__globals__.get("eager_attention_forward") if forward is not None else None
    if function is None:
        raise ModelError(f"the file of {kind.__name__} has no eager attention: load the model with sdpa")
    return function  # type: ignore[no-any-return]


class _Named:
    """A module whose config names its full attention: flash functions look there for the kernel they shall load.

    The config itself is shared by all layers, and by all threads of a server, so it is never changed for a call.
    """

    def __init__(self, module: nn.Module, implementation: str) -> None:
        self._module = module
        self.config = copy.copy(module.config)
        vars(self.config)["_attn_implementation_internal"] = implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
