"""Cutting tensors into parts and putting parts together, without a copy where there is only one part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def split(x: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    """Views of `sizes` along `dim`; a split into one part would copy its gradient."""
    return (x,) if len(sizes) == 1 else x.split(list(sizes), dim)


def join(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """What `split` cut; a single part is itself."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
