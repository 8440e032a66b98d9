"""What the tests of attention share: inputs and gradients, code paths, patterns and batches, masks, emulated kernels.

B batch, T tokens, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from longlora.attention import grouped
from longlora.attention.grouped import grouped_attention, portable_attention
from longlora.attention.layout import Layout
from longlora.attention.pattern import (
    FULL,
    Pattern,
    S2Pattern,
    WindowPattern,
    may_attend,
    pattern_shift,
    shifted_heads,
)
from longlora.attention.reference import reference_attention

PATHS = ["cpu kernel", "any device", "any device, with dropout"]
BY_HEAD = "any device, a call for each query head of a group"

GROUP = 6
PATTERNS = [
    *[S2Pattern(GROUP, sinks, shift) for sinks in range(GROUP) for shift in ("half", "all", "none")],
    S2Pattern(5, 2, "none"),
    S2Pattern(64, 40),  # a group, and its sink tokens, longer than any document
    *[WindowPattern(size) for size in (1, 2, 5, 40)],
    FULL,
]
TOKENS = 13
BATCHES = [
    [[0, 5, 6, 13], [0, 13]],  # a document of one token
    [[0, 1, 2, 13], [0, 4, 8, 12, 13]],  # documents shorter than the sink tokens
    [[0, 9], [0, 13]],  # the first row has 4 tokens of padding
    [[0, 3, 7], [0]],  # the second row is padding only
    [[0, 12, 13], [0, 1, 8]],
    [[0], [0]],
]
HEADS = [(3, 1), (9, 3), (4, 4)]
"""Query and key/value heads: multi-query; a border inside the heads that share a key head; no sharing."""


def layout(
    bounds_B: Sequence[Sequence[int]],
    tokens: int,
    pattern: Pattern,
    heads: tuple[int, int] = (2, 1),
    device: str = "cpu",
) -> Layout:
    return Layout(tuple(map(tuple, bounds_B)), tokens, *heads, pattern, torch.device(device))


def all_layouts(pattern: Pattern) -> list[Layout]:
    """Every length up to three groups, and packed and padded batches with every kind of heads."""
    lengths = [layout([[0, length]], length, pattern, HEADS[0]) for length in range(1, 3 * GROUP + 2)]
    return lengths + [layout(bounds_B, TOKENS, pattern, heads) for bounds_B in BATCHES for heads in HEADS]


@cache
def seen_by_reference(of: Layout) -> Tensor:
    """bool [B, H, T, T]: the keys that have a weight when all scores are the same and the values are unit vectors."""
    B, T = len(of.bounds_B), of.tokens
    q, k = torch.zeros(B, of.query_heads, T, 1), torch.zeros(B, of.kv_heads, T, 1)
    v = torch.eye(T).expand(B, of.kv_heads, T, T)
    return (reference_attention(q, k, v, of.bounds_B, of.pattern) > 0).transpose(1, 2)


@cache
def _seen_in_document(length: int, pattern: Pattern, shifted: bool) -> Tensor:
    every = range(length)
    return torch.tensor([[may_attend(i, j, length, pattern, shifted=shifted) for j in every] for i in every])


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, of: Layout, softcap: float | None = None, sink_logits_H: Tensor | None = None
) -> Tensor:
    """What `reference_attention` computes, with T x T scores instead of loops, which take minutes."""
    border = of.query_heads - shifted_heads(of.query_heads, pattern_shift(of.pattern))
    seen = torch.zeros(len(of.bounds_B), of.query_heads, of.tokens, of.tokens, dtype=torch.bool)
    for row, bounds in enumerate(of.bounds_B):
        for start, stop in pairwise(bounds):
            for head in range(of.query_heads):
                document = _seen_in_document(stop - start, of.pattern, head >= border)
                seen[row, head, start:stop, start:stop] = document
    k, v = (x.repeat_interleave(of.query_heads // of.kv_heads, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sink_logits_H is not None:
        more = sink_logits_H.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, more], dim=-1)
    weights = scores.softmax(-1)[..., : of.tokens].masked_fill(~seen, 0)
    return (weights @ v).transpose(1, 2)


def qkv(
    B: int,
    H: int,
    K: int,
    T: int,
    D: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    value_width: int | None = None,
) -> list[Tensor]:
    """As transformers makes them: [B, T, heads, D] in memory, seen as [B, heads, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(H, D), (K, D), (K, value_width or D)]
    return [
        torch.randn(B, T, heads, width, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads, width in shapes
    ]


def grads(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return list(torch.autograd.grad((out * weight).sum(), inputs))


def assert_same(ours: Tensor, truth: Tensor, inputs: list[Tensor]) -> None:
    """Values and the gradients of all inputs: queries, keys, values, sink logits."""
    assert ours.shape == truth.shape
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    pairs = zip(grads(ours, inputs), grads(truth, inputs), strict=True)
    for number, (one, other) in enumerate(pairs):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, n=number: f"d{'qkvs'[n]}: {text}")


def run(path: str, inputs: list[Tensor], bounds: list[list[int]], pattern: Pattern, **extras: object) -> Tensor:
    """By one of `PATHS` or `BY_HEAD`; a dropout of next to nothing keeps torch from its fused kernels, too."""
    if path == "cpu kernel":
        return grouped_attention(*inputs, bounds, pattern, **extras)
    if path == "any device, with dropout":
        return grouped_attention(*inputs, bounds, pattern, dropout=1e-30, **extras)
    with mock.patch.object(grouped, "_takes_grouped_queries", return_value=path != BY_HEAD):
        return portable_attention(*inputs, bounds, pattern, **{"scaling": inputs[0].shape[-1] ** -0.5, **extras})


def assert_path_is_right(
    path: str, inputs: list[Tensor], bounds: list[list[int]], pattern: Pattern, **extras: object
) -> None:
    """Values and all gradients are those of the reference."""
    truth = reference_attention(*inputs, bounds, pattern, **extras)
    wanted = [*inputs, *(value for value in extras.values() if isinstance(value, Tensor))]
    assert_same(run(path, inputs, bounds, pattern, **extras), truth, wanted)


def visible(queries: int, keys: int, window: tuple[int, int]) -> Tensor:
    """bool [queries, keys] of one segment: aligned to the bottom right; -1 is no limit."""
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    before, after = window
    return ((distance <= before) | (before < 0)) & ((-distance <= after) | (after < 0))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """The flash-attn package's contract, slowly and with gradients, on any device; also what the kernel demands."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert q.shape[1] % k.shape[1] == 0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (cu_seqlens_q[-1], cu_seqlens_k[-1]) == (q.shape[0], k.shape[0])
    window = (window_size[0], 0) if causal else window_size
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    outputs = []
    bounds = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for (q_start, q_stop), (k_start, k_stop) in bounds:
        assert 0 < q_stop - q_start <= max_seqlen_q
        assert 0 < k_stop - k_start <= max_seqlen_k
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_stop], k[k_start:k_stop]) * softmax_scale
        scores = scores.masked_fill(~visible(q_stop - q_start, k_stop - k_start, window), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[k_start:k_stop]))
    return torch.cat(outputs)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """The same under the signature of `torch.nn.attention.varlen`, which is causal where the window says so."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    return flash_attn_varlen_func(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale, window_size=window_size
    )
