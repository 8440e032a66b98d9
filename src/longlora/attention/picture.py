"""A picture of what attention sees in a model: one head of each kind, read off the real thing.

On the way into the attention function the values of each layer are replaced by an identity matrix, so that its output
is the attention weights themselves, whatever computes them, and the queries by zeros, so that all that is seen has the
same weight. T tokens, H query heads, K key/value heads.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longlora.attention.layers import attention_modules, has_window, layer_numbers
from longlora.attention.pattern import FULL, shifted_heads
from longlora.attention.probing import (
    ProbeSettings,
    as_it_was,
    attention_function,
    logits,
    training_with,
    vocabulary,
)
from longlora.attention.registry import s2_attention_forward, settings_of

_SMALL = ProbeSettings()
# Of Okabe and Ito, told apart by the colour-blind; a leak is marked besides.
_MEANINGS = {
    "later": "#ffffff",
    "earlier, not seen": "#e4e4e4",
    "seen": "#0072b2",
    "seen: a sink token": "#56b4e9",
    "later, but seen: a leak": "#d55e00",
}
_LATER, _EARLIER, _SEEN, _SINK, _LEAK = range(len(_MEANINGS))
_INK = "#333333"


@dataclass(frozen=True)
class HeadWeights:
    """Attention weights [T, T] of one head on packed `documents` of so many tokens; `title` says which head."""

    title: str
    weights_TT: Tensor
    documents: tuple[int, ...]
    group_size: int
    sink_tokens: int
    grouped: bool
    """Whether this head has groups and sink tokens."""


def head_weights(model: PreTrainedModel, settings: ProbeSettings = _SMALL) -> list[HeadWeights]:
    """One head of each kind that the model has in training, on two packed documents of some groups; see `draw_heads`.

    Leaves the model as it was, but with full attention.
    """
    settings = settings.for_float32()
    group = settings.group_size
    documents = (3 * group + 5, group + 6)
    ids = torch.arange(sum(documents), device=model.device)[None] % vocabulary(model)
    positions = torch.cat([torch.arange(length) for length in documents])[None].to(model.device)
    found: dict[str, HeadWeights] = {}
    with as_it_was(model), training_with(model, settings):
        with _recorded() as weights_HTT:
            logits(model, ids, position_ids=positions)
        modules = attention_modules(model)
        for layer, module in zip(layer_numbers(modules), modules, strict=True):
            for kind, head, grouped in _kinds(model, module, len(weights_HTT[module])):
                found.setdefault(
                    kind,
                    HeadWeights(
                        title=f"layer {layer}, head {head}: {kind}",
                        weights_TT=weights_HTT[module][head],
                        documents=documents,
                        group_size=group,
                        sink_tokens=settings.sink_tokens,
                        grouped=grouped,
                    ),
                )
    return list(found.values())


def draw_heads(heads: list[HeadWeights]) -> bytes:
    """A PNG, a row a query and a column a key, both counted from the beginning of their document."""
    figure = Figure(figsize=(4.2 * len(heads), 5.2), layout="constrained")
    for axes, head in zip(figure.subplots(1, len(heads), squeeze=False)[0], heads, strict=True):
        _draw(axes, head)
    grouped = next((head for head in heads if head.grouped), None)
    if grouped is not None:
        sinks = f"{grouped.sink_tokens} sink {'token' if grouped.sink_tokens == 1 else 'tokens'}"
        title = f"Attention in training, drawn with groups of {grouped.group_size} and {sinks}, on two packed documents"
        figure.suptitle("\n".join(textwrap.wrap(title, 50 * len(heads))), fontsize=11, color=_INK)
    patches = [Patch(facecolor=colour, edgecolor=_INK, linewidth=0.5) for colour in _MEANINGS.values()]
    figure.legend(patches, _MEANINGS, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    png = io.BytesIO()
    figure.savefig(png, dpi=150, format="png")
    return png.getvalue()


def _draw(axes: Axes, head: HeadWeights) -> None:
    axes.imshow(
        _cells(head), cmap=ListedColormap(list(_MEANINGS.values())), vmin=0, vmax=len(_MEANINGS) - 1,
        interpolation="nearest",
    )  # fmt: skip
    border = head.documents[0] - 0.5
    axes.axhline(border, color=_INK, linewidth=0.8, linestyle="--")
    axes.axvline(border, color=_INK, linewidth=0.8, linestyle="--")
    # Ticks where the groups of an unshifted head begin, in each document again.
    step = head.group_size
    starts = [0, head.documents[0]]
    ticks = [
        (start + at, at) for start, length in zip(starts, head.documents, strict=True) for at in range(0, length, step)
    ]
    places, names = zip(*ticks, strict=True)
    axes.set_xticks(places, names)
    axes.set_yticks(places, names)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.set_title(head.title, fontsize=10, color=_INK)
    axes.set_xlabel("key, from the beginning of its document", fontsize=9, color=_INK)
    axes.set_ylabel("query, from the beginning of its document", fontsize=9, color=_INK)


def _cells(head: HeadWeights) -> np.ndarray[Any, Any]:
    """What each pair of query and key is: an index of `_MEANINGS`."""
    seen_TT = head.weights_TT.numpy() > 0
    earlier_TT = np.tri(len(seen_TT), dtype=bool)
    position_T = np.concatenate([np.arange(length) for length in head.documents])
    sink_TT = np.broadcast_to((position_T < head.sink_tokens) & head.grouped, seen_TT.shape)
    cells_TT = np.where(earlier_TT, _EARLIER, _LATER)
    cells_TT[seen_TT] = _SEEN
    cells_TT[seen_TT & sink_TT] = _SINK
    cells_TT[seen_TT & ~earlier_TT] = _LEAK
    return cells_TT


@contextmanager
def _recorded() -> Iterator[dict[nn.Module, Tensor]]:
    """Attention weights [H, T, T] of each module that runs inside; the model's own output stays what it is."""
    weights: dict[nn.Module, Tensor] = {}

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        identity = torch.eye(key.shape[2], dtype=value.dtype, device=value.device).expand(*value.shape[:2], -1, -1)
        # All scores 0, so that no weight is too small to be seen.
        output, _ = s2_attention_forward(module, torch.zeros_like(query), key, identity, mask, **options)
        weights[module] = output[0].transpose(0, 1).float().cpu()
        return s2_attention_forward(module, query, key, value, mask, **options)

    with attention_function(forward):
        yield weights


def _kinds(model: PreTrainedModel, module: nn.Module, query_heads: int) -> list[tuple[str, int, bool]]:
    """Kinds of heads in a layer, each with the first such head, and whether it has groups."""
    if has_window(model, module):
        return [("its own window", 0, False)]
    pattern = settings_of(module).pattern
    if pattern == FULL:
        return [("full attention", 0, False)]
    border = query_heads - shifted_heads(query_heads, pattern.shift)
    kinds = [("groups", 0, True)] if border else []
    return kinds + ([("shifted groups", border, True)] if border < query_heads else [])
