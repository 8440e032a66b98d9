"""A picture of what attention sees in a model: one head of each kind, read off the real thing.

On the way into the attention function the values of each layer are replaced by an identity matrix, so that its output
is the attention weights themselves, whatever computes them, and the queries by zeros, so that all that is seen has the
same weight. T tokens, H query heads, K key/value heads.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from longlora.attention.layers import attention_modules, has_window
from longlora.attention.pattern import FULL, shifted_heads
from longlora.attention.registry import S2_ATTENTION, s2_attention_forward, settings_of, use_full, use_s2

_GROUP, _SINKS = 16, 2
_DOCUMENTS = (3 * _GROUP + 5, _GROUP + 6)
_COLOURS = ListedColormap(["#ffffff", "#e4e4e4", "#0072b2"])  # Okabe and Ito's blue


@dataclass(frozen=True)
class HeadWeights:
    """Attention weights [T, T] of one head; `title` says which."""

    title: str
    weights_TT: Tensor


def head_weights(model: PreTrainedModel, **settings: Any) -> list[HeadWeights]:
    """One head of each kind that the model has, on two packed documents of 53 and 22 tokens.

    Args:
        settings: of `use_s2`; groups of 16 and 2 sink tokens unless given.
    """
    base_settings = {"group_size": _GROUP, "sink_tokens": _SINKS, **settings}
    ids = torch.arange(sum(_DOCUMENTS), device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    positions = torch.cat([torch.arange(length) for length in _DOCUMENTS])[None].to(model.device)
    model.eval()
    use_s2(model, sparse_in_evaluation=True, **base_settings)
    try:
        with _recorded() as weights_HTT, torch.no_grad():
            model(input_ids=ids, position_ids=positions, use_cache=False)
        found: dict[str, HeadWeights] = {}
        for layer, module in enumerate(attention_modules(model)):
            for kind, head in _kinds(model, module, len(weights_HTT[module])):
                found.setdefault(kind, HeadWeights(f"layer {layer}, head {head}: {kind}", weights_HTT[module][head]))
        return list(found.values())
    finally:
        use_full(model)


def draw_heads(heads: list[HeadWeights]) -> bytes:
    """A PNG, a row a query and a column a key: blue is seen, grey earlier and not seen, white later, red a leak."""
    figure = Figure(figsize=(3.4 * len(heads), 3.6), layout="constrained")
    for axes, head in zip(figure.subplots(1, len(heads), squeeze=False)[0], heads, strict=True):
        seen_TT = head.weights_TT.numpy() > 0
        earlier_TT = np.tri(len(seen_TT))
        axes.imshow(earlier_TT + seen_TT, cmap=_COLOURS, vmin=0, vmax=2, interpolation="nearest")
        query, key = np.nonzero(seen_TT & (earlier_TT == 0))
        axes.plot(key, query, "rx", markersize=4)  # a leak
        axes.set_title(head.title, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("key", fontsize=7)
        axes.set_ylabel("query", fontsize=7)
    png = io.BytesIO()
    figure.savefig(png, dpi=150, format="png")
    return png.getvalue()


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

    AttentionInterface.register(S2_ATTENTION, forward)
    try:
        yield weights
    finally:
        AttentionInterface.register(S2_ATTENTION, s2_attention_forward)


def _kinds(model: PreTrainedModel, module: nn.Module, query_heads: int) -> list[tuple[str, int]]:
    """Kinds of heads in a layer, each with the first such head."""
    if has_window(model, module):
        return [("its own window", 0)]
    pattern = settings_of(module).pattern
    if pattern == FULL:
        return [("full attention", 0)]
    border = query_heads - shifted_heads(query_heads, pattern.shift)
    kinds = [("groups", 0)] if border else []
    return kinds + ([("shifted groups", border)] if border < query_heads else [])
