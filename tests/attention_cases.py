"""What the tests of the attention functions share: inputs, gradients, code paths, the comparison with the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from longlora.attention.grouped import grouped_attention, portable_attention
from longlora.attention.pattern import Pattern
from longlora.attention.reference import reference_attention

PATHS = ["cpu kernel", "any device", "any device, with dropout"]


def qkv(B: int, H: int, K: int, T: int, D: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """As transformers makes them: [B, T, heads, D] in memory, seen as [B, heads, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(B, T, heads, D, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (H, K, K)
    ]


def grads(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return list(torch.autograd.grad((out * weight).sum(), inputs))


def run(path: str, inputs: list[Tensor], bounds: list[list[int]], pattern: Pattern, **extras: object) -> Tensor:
    """By one of `PATHS`; a dropout of next to nothing keeps torch from its fused kernels, too."""
    if path == "cpu kernel":
        return grouped_attention(*inputs, bounds, pattern, **extras)
    if path == "any device":
        return portable_attention(*inputs, bounds, pattern, **{"scaling": inputs[0].shape[-1] ** -0.5, **extras})
    return grouped_attention(*inputs, bounds, pattern, dropout=1e-30, **extras)


def assert_same(path: str, inputs: list[Tensor], bounds: list[list[int]], pattern: Pattern, **extras: object) -> None:
    """Values and all gradients are those of the reference."""
    ours = run(path, inputs, bounds, pattern, **extras)
    truth = reference_attention(*inputs, bounds, pattern, **extras)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    wanted = [*inputs, *(value for value in extras.values() if isinstance(value, Tensor))]
    names = ["dq", "dk", "dv", "d sink logits"]
    for name, one, other in zip(names, grads(ours, wanted), grads(truth, wanted), strict=False):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
