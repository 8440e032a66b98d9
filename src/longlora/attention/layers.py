"""Which layers of a model are sparse in training, and how: the layers' part of `use_s2`.

In: a transformers model. Out: its attention modules, the numbers of their layers and a pattern for each.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from types import FunctionType
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from longlora.attention.pattern import FULL, S2Pattern
from longlora.errors import ModelError, UnsupportedModelError

Shift = Literal["heads", "layers", "none"]
"""Where groups are shifted by half: in half of the heads of each layer, in every other layer, or nowhere."""

# Kinds of layers with a window, and where a config has its size.
_WINDOW_SIZES = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}


def text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of `model` whose layers count: all of it, or the language model inside one of several modalities.

    Raises:
        UnsupportedModelError: there are several modalities, and no language model of their own config.
    """
    text = model.config.get_text_config(decoder=True)
    if text is model.config or model.config.is_encoder_decoder:
        return model
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or decoder.config is not text:
        raise UnsupportedModelError(
            f"model type {model.config.model_type!r} has no language model apart from its other parts, so S2-Attn "
            "cannot be used; choose a text model, or train with attention.pattern=full"
        )
    return decoder


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that ask transformers' AttentionInterface for their attention, in order of the layers.

    Those of a vision or audio tower keep their own attention, and do not count.
    """
    return [module for module in text_decoder(model).modules() if dispatching_forward(type(module)) is not None]


def dispatching_forward(kind: type[nn.Module]) -> FunctionType | None:
    """The code of an attention class that asks AttentionInterface, also where a subclass only adds to it."""
    for each in kind.__mro__:
        own = each.__dict__.get("forward")
        forward = inspect.unwrap(own) if own is not None else None
        if not isinstance(forward, FunctionType):
            continue
        if "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names:
            return forward
        if "super" not in forward.__code__.co_names:
            return None
    return None


def layer_numbers(modules: Sequence[nn.Module]) -> list[int]:
    """The number of each module's layer in the decoder, from 0, where other layers may have no attention.

    Modules that do not know their layer (Zamba), or that share one (HRM), are counted instead.
    """
    numbers = [getattr(module, "layer_idx", None) for module in modules]
    own = [number for number in numbers if isinstance(number, int) and number >= 0]
    return own if len(set(own)) == len(modules) else list(range(len(modules)))


def has_window(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether a layer has a sliding or chunked window of its own, as its config says.

    One that `hides_nothing` from the tokens the config allows is none; the layer is sparse up to that length.
    """
    config: Any = model.config.get_text_config(decoder=True)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        window = getattr(config, "sliding_window", None)
        return window is not None and not hides_nothing(window, config)
    layer = getattr(module, "layer_idx", None)
    if layer is None or layer_types[layer] not in _WINDOW_SIZES:
        return False
    window = getattr(config, _WINDOW_SIZES[layer_types[layer]], None)
    return window is None or not hides_nothing(window, config)


def hides_nothing(window: int, config: Any, tokens: int = 0) -> bool:
    """Whether a window is as long as the longest text: the longest that a config names (Phi 3.5), or `tokens`."""
    longest = getattr(config, "max_position_embeddings", None)
    return longest is not None and window >= max(int(longest), tokens)


def layer_patterns(
    model: PreTrainedModel,
    modules: Sequence[nn.Module],
    pattern: S2Pattern,
    shift: Shift,
    full: Sequence[int] | Literal["all"],
) -> list[S2Pattern]:
    """The pattern of each of `modules` in training; layers with a window keep that instead.

    Raises:
        ModelError: `shift` is unknown, or `full` names a layer that is not there or has no attention.
    """
    if shift not in get_args(Shift):
        raise ModelError(f"shift={shift!r}: must be one of {', '.join(get_args(Shift))}")
    numbers = layer_numbers(modules)
    chosen = numbers if full == "all" else full
    if outside := [layer for layer in chosen if layer not in numbers]:
        raise ModelError(f"full_attention_layers={outside}: the model has attention in {_ranges(numbers)}")
    pattern = replace(pattern, shift="half" if shift == "heads" else "none")
    # With a shift between layers, every other layer that is sparse at all: those with a window do not count.
    sparse = [
        layer
        for layer, module in zip(numbers, modules, strict=True)
        if layer not in chosen and not has_window(model, module)
    ]
    shifted = sparse[1::2] if shift == "layers" else []
    return [
        FULL if layer in chosen else replace(pattern, shift="all") if layer in shifted else pattern for layer in numbers
    ]


def describe_layers(numbers: Sequence[int], windows: Sequence[bool], patterns: Sequence[S2Pattern]) -> str:
    """One line for a person: which layers have which pattern in training.

    >>> print(describe_layers([0, 1, 3], [False, False, True], [S2Pattern(8, 2), FULL, S2Pattern(8, 2)]))
    sparse in layer 0 (groups of 8, 2 sink tokens, shifted in half of the heads), full in layer 1, own window in layer 3
    """
    layers = list(zip(numbers, windows, patterns, strict=True))
    window = [layer for layer, windowed, _ in layers if windowed]
    full = [layer for layer, windowed, pattern in layers if pattern == FULL and not windowed]
    sparse = [(layer, pattern) for layer, windowed, pattern in layers if pattern != FULL and not windowed]
    parts = []
    if sparse:
        shifts = {pattern.shift for _, pattern in sparse}
        where = "half of the heads" if "half" in shifts else "every other layer" if "all" in shifts else "no head"
        own = sparse[0][1]
        parts.append(
            f"sparse in {_ranges([layer for layer, _ in sparse])} (groups of {own.group_size}, "
            f"{own.sink_tokens} sink tokens, shifted in {where})"
        )
    parts += [f"full in {_ranges(full)}"] if full else []
    parts += [f"own window in {_ranges(window)}"] if window else []
    return ", ".join(parts)


def _ranges(layers: list[int]) -> str:
    """Layer numbers for a person: ``layers 0-3, 8``."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    names = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(names)}"
