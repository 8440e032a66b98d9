"""What models cannot be cut: found before the first step, in a forward pass of some tokens, on one process.

In: a whole model that `use_s2` has prepared. Out: what its layers need of other processes, or one error.

B batch, T tokens, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longlora.attention.halo_plan import stretch_length
from longlora.attention.layers import hides_nothing, text_decoder
from longlora.attention.lazy_mask import LazyMask
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern
from longlora.attention.probing import (
    attention_function,
    largest_difference,
    logits,
    tokens,
    tolerance,
    without_noise,
)
from longlora.attention.settings import settings_of
from longlora.errors import ModelError, UnsupportedModelError

_PROBED, _BEFORE = 32, 15
"""Tokens of the probe, and those before its cut."""
# RoPE whose frequencies depend on the largest position of a pass: stretches of one row would have different ones.
_BY_LENGTH = {"dynamic", "longrope"}


@dataclass(frozen=True)
class LayerNeeds:
    """Of one layer of attention."""

    heads: tuple[int, int]
    """Query and key/value heads."""
    pattern: Pattern


def require_cuttable(model: PreTrainedModel) -> list[LayerNeeds]:
    """Refuse a model in which anything but attention passes from token to token; what each layer needs.

    Attention is taken out: every token gets its own value. Then two halves of a text have to give what the whole gives,
    which they do not where a state, a convolution or a shift of tokens runs along the sequence, and where positions
    are counted from the beginning of what is given and not told.

    Args:
        model: in the mode and with the attention it has in training.

    Raises:
        UnsupportedModelError: `model` cannot be cut.
        ModelError: it has a mask that S2-Attn does not know.
    """
    config = text_decoder(model).config.get_text_config(decoder=True)
    kind = f"model type {config.model_type!r}"
    if by_length := _BY_LENGTH & {*_rope_types(getattr(config, "rope_parameters", None))}:
        raise UnsupportedModelError(
            f"{kind} has RoPE of type {by_length.pop()}, which depends on the length that a process sees, so that its "
            "rows cannot be cut: set parallel.sequence=1"
        )
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise UnsupportedModelError(
            f"{kind} has layers of chunked attention, whose chunks are not counted across processes: set "
            "parallel.sequence=1"
        )
    found: list[LayerNeeds] = []
    ids = tokens(model, _PROBED)
    positions = torch.arange(_PROBED, device=ids.device)[None]
    with attention_function(_recorded(found)), without_noise(model):
        whole = logits(model, ids, position_ids=positions)
        layers = len(found)
        halves = [
            logits(model, part, position_ids=own)
            for part, own in zip(_halves(ids), _halves(positions), strict=True)
        ]  # fmt: skip
    difference = largest_difference(whole, torch.cat(halves, dim=1), model)
    if difference > tolerance(whole, model):
        raise UnsupportedModelError(
            f"{kind} passes something from token to token outside of attention (a state, a convolution, positions of "
            "its own), which would end where a row is cut between processes: set parallel.sequence=1"
        )
    return found[:layers]


def least_stretch(layers: list[LayerNeeds], context_length: int, world: int) -> int:
    """The shortest stretch, in tokens, that may be cut from a short row: a group, or a window if one is longer.

    Raises:
        ModelError: a row of `context_length` tokens has shorter stretches on `world` processes.
    """
    patterns = {layer.pattern for layer in layers} - {FULL}
    for pattern in patterns:
        stretch_length(context_length, world, pattern)
    reaches = [pattern.group_size if isinstance(pattern, S2Pattern) else pattern.size for pattern in patterns]
    return max(reaches, default=1)


def _recorded(found: list[LayerNeeds]) -> Any:
    """An attention function in which each token sees itself alone, with its position; it notes what it is asked for."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
    ) -> tuple[Tensor, None]:
        if not isinstance(attention_mask, LazyMask):
            raise ModelError(f"S2-Attn got a ready-made attention mask of type {type(attention_mask).__name__}")
        _bounds_B = attention_mask.bounds_B  # reading it refuses what is more than causal
        window = attention_mask.window
        if window is not None and hides_nothing(window, module.config):
            window = None
        pattern = settings_of(module).pattern if window is None else WindowPattern(window)
        found.append(LayerNeeds((query.shape[1], key.shape[1]), pattern))
        out_BHTD = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        out_BTHD = (out_BHTD * (1 + query.mean(-1, keepdim=True).tanh())).transpose(1, 2)
        return out_BTHD.contiguous(), None

    return forward


def _halves(x_BT: Tensor) -> tuple[Tensor, Tensor]:
    return x_BT[:, :_BEFORE], x_BT[:, _BEFORE:]


def _rope_types(parameters: Any) -> Iterator[str]:
    """Of all kinds of layers, which may have parameters of their own."""
    if isinstance(parameters, dict):
        if isinstance(own := parameters.get("rope_type"), str):
            yield own
        for value in parameters.values():
            yield from _rope_types(value)
