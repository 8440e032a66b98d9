"""Which layers of a model are sparse in training, and how: the layers' part of `use_s2`.

In: a transformers model. Out: its attention modules and a pattern for each.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedModel

from longlora.attention.pattern import FULL, S2Pattern
from longlora.errors import ModelError

Shift = Literal["heads", "layers", "none"]
"""Where groups are shifted by half: in half of the heads of each layer, in every other layer, or nowhere."""


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that ask transformers' AttentionInterface for their attention, in order of the layers."""
    return [module for module in model.modules() if _dispatches(type(module))]


def _dispatches(kind: type[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def has_window(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether a layer has a sliding or chunked window of its own, as its config says."""
    config: Any = model.config.get_text_config(decoder=True)
    window, longest = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    if window is not None and longest is not None and window >= longest:  # hides nothing (Phi 3.5)
        return False
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return window is not None
    layer = getattr(module, "layer_idx", None)
    return layer is not None and layer_types[layer] in ("sliding_attention", "chunked_attention", "hybrid_sliding")


def layer_patterns(
    model: PreTrainedModel,
    modules: Sequence[nn.Module],
    pattern: S2Pattern,
    shift: Shift,
    full: Sequence[int] | Literal["all"],
) -> list[S2Pattern]:
    """The pattern of each of `modules` in training; layers with a window keep that instead.

    Raises:
        ModelError: `shift` is unknown, or `full` names a layer that is not there.
    """
    if shift not in get_args(Shift):
        raise ModelError(f"shift={shift!r}: must be one of {', '.join(get_args(Shift))}")
    count = len(modules)
    chosen = range(count) if full == "all" else full
    if outside := [index for index in chosen if not 0 <= index < count]:
        raise ModelError(f"full_attention_layers={outside}: the model has attention layers 0 to {count - 1}")
    pattern = replace(pattern, shift="half" if shift == "heads" else "none")
    # With a shift between layers, every other layer that is sparse at all: those with a window do not count.
    sparse = [index for index, module in enumerate(modules) if index not in chosen and not has_window(model, module)]
    shifted = sparse[1::2] if shift == "layers" else []
    return [
        FULL if index in chosen else replace(pattern, shift="all") if index in shifted else pattern
        for index in range(count)
    ]


def describe_layers(windows: Sequence[bool], patterns: Sequence[S2Pattern]) -> str:
    """One line for a person: which layers have which pattern in training.

    >>> print(describe_layers([False, False, True], [S2Pattern(8, 2), FULL, S2Pattern(8, 2)]))
    sparse in layer 0 (groups of 8, 2 sink tokens, shifted in half of the heads), full in layer 1, own window in layer 2
    """
    window = [index for index, own in enumerate(windows) if own]
    full = [index for index, own in enumerate(patterns) if own == FULL and index not in window]
    sparse = [index for index in range(len(patterns)) if index not in (*window, *full)]
    parts = []
    if sparse:
        shifts = {patterns[index].shift for index in sparse}
        where = "half of the heads" if "half" in shifts else "every other layer" if "all" in shifts else "no head"
        own = patterns[sparse[0]]
        parts.append(
            f"sparse in {_ranges(sparse)} (groups of {own.group_size}, {own.sink_tokens} sink tokens, "
            f"shifted in {where})"
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
