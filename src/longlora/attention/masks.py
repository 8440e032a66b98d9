"""Masks of one block of queries: 0 where a query sees a key, else -inf."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(queries: int, keys: int, like: Tensor, *, history: int | None = None) -> Tensor:
    """[queries, keys] in the dtype and on the device of `like`, for queries that are the last ones of the keys.

    A query sees itself and all keys before it, or only `history` keys before it.
    """
    before = keys - queries
    mask = like.new_full((queries, keys), -torch.inf).triu_(before + 1)
    if history is not None:
        mask += like.new_full((queries, keys), -torch.inf).tril_(before - history - 1)
    return mask


class WindowMasks:
    """Masks of the blocks of one window, each made once: all blocks but the last of a document have one size."""

    def __init__(self) -> None:
        self._made: dict[int, Tensor] = {}

    def get(self, size: int, history: int, like: Tensor) -> Tensor:
        """For `size` queries, and before them the `history` keys to which the window of the first reaches back."""
        if size not in self._made:
            self._made[size] = causal_mask(size, size + history, like, history=history)
        return self._made[size]
