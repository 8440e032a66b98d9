"""Masks of one block of queries: 0 where a query sees a key, else -inf."""

from __future__ import annotations

import torch
from torch import Tensor


def window_mask(size: int, history: int, like: Tensor) -> Tensor:
    """[size, size + history] in the dtype and on the device of `like`: 0 where a query sees a key, else -inf.

    The first `history` keys stand before the block; a query sees itself and the `history` keys before it.
    """
    seen = like.new_ones(size, size + history, dtype=torch.bool).triu().tril(history)
    return like.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)


def causal_mask(size: int, like: Tensor) -> Tensor:
    """[size, size] in the dtype and on the device of `like`."""
    return like.new_full((size, size), -torch.inf).triu_(1)
