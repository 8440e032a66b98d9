"""The fast path against the reference: values and all gradients, every length, heads, rows, documents, padding."""

import pytest
import torch
from torch import Tensor

from longlora.attention.grouped import grouped_attention
from longlora.attention.pattern import S2Pattern
from longlora.attention.reference import reference_attention
from longlora.attention.rolled import rolled_attention
from longlora.errors import LongLoraError


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


def assert_same(inputs: list[Tensor], bounds: list[list[int]], pattern: S2Pattern) -> None:
    ours = grouped_attention(*inputs, bounds, pattern)
    truth = reference_attention(*inputs, bounds, pattern)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    for name, one, other in zip("qkv", grads(ours, inputs), grads(truth, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"d{name}: {text}")


@pytest.mark.parametrize("sinks", [0, 1, 3, 5])
@pytest.mark.parametrize("length", range(1, 14))
def test_every_length(length: int, sinks: int) -> None:
    assert_same(qkv(1, 3, 1, length), [[0, length]], S2Pattern(6, sinks))


@pytest.mark.parametrize(("H", "K"), [(1, 1), (2, 2), (3, 3), (4, 1), (4, 2), (9, 3), (5, 5), (6, 2)])
def test_every_head_count(H: int, K: int) -> None:
    assert_same(qkv(1, H, K, 11), [[0, 11]], S2Pattern(4, 2))


@pytest.mark.parametrize(
    "bounds",
    [
        [[0, 5, 6, 13], [0, 13]],
        [[0, 1, 2, 13], [0, 4, 8, 12, 13]],
        [[0, 9], [0, 13]],  # the first row has 4 tokens of padding
        [[0, 3, 7], [0]],  # the second row is padding only
    ],
    ids=str,
)
def test_packed_and_padded_batches(bounds: list[list[int]]) -> None:
    assert_same(qkv(2, 6, 3, 13), bounds, S2Pattern(4, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sinks", [0, 2])
def test_rounding_is_no_worse_than_full_attention_in_the_same_dtype(dtype: torch.dtype, sinks: int) -> None:
    """Distance from float64, allowed as much as the naive formula in the same dtype has."""
    inputs = qkv(2, 4, 2, 21, D=16, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    bounds, pattern = [[0, 13, 21], [0, 21]], S2Pattern(8, sinks)
    truth = reference_attention(*exact, bounds, pattern)
    naive = reference_attention(*inputs, bounds, pattern)
    ours = grouped_attention(*inputs, bounds, pattern)
    eps = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-6}[dtype]
    pairs = zip(
        [ours, *grads(ours, inputs)], [naive, *grads(naive, inputs)], [truth, *grads(truth, exact)], strict=True
    )
    for one, plain, right in pairs:
        allowed = (plain.double() - right).abs() + eps * right.abs().max()
        assert ((one.double() - right).abs() <= allowed.max()).all()


def test_group_of_the_whole_sequence_is_full_attention() -> None:
    q, k, v = qkv(2, 9, 3, 10)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(grouped_attention(q, k, v, [[0, 10]] * 2, S2Pattern(10, 2)), full.transpose(1, 2))


def test_scaling_is_used() -> None:
    q, k, v = qkv(1, 2, 2, 9)
    one = grouped_attention(q, k, v, [[0, 9]], S2Pattern(4), scaling=0.3)
    torch.testing.assert_close(one, reference_attention(q, k, v, [[0, 9]], S2Pattern(4), scaling=0.3))
    assert not torch.allclose(one, grouped_attention(q, k, v, [[0, 9]], S2Pattern(4)))


def test_later_tokens_never_reach_earlier_outputs() -> None:
    q, k, v = qkv(1, 4, 2, 19)
    out = grouped_attention(q, k, v, [[0, 19]], S2Pattern(6, 2))
    for position in range(19):
        changed = [x.detach().clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, position] += 100.0
        after = grouped_attention(*changed, [[0, 19]], S2Pattern(6, 2))
        torch.testing.assert_close(after[:, :position], out[:, :position])
        assert not torch.allclose(after[:, position], out[:, position])


def test_memory_grows_linearly_with_the_sequence() -> None:
    """Bytes allocated by forward and backward, from the profiler: 4 times the tokens, 4 times the bytes.

    A T x T mask would take 16 times.
    """

    def allocated(T: int) -> int:
        inputs = [x.detach().float().requires_grad_() for x in qkv(1, 4, 2, T, D=16)]
        with torch.profiler.profile(profile_memory=True) as profile:
            grouped_attention(*inputs, [[0, T]], S2Pattern(64, 4)).sum().backward()
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    short, long = allocated(1024), allocated(4096)
    assert long < 4.4 * short
    inputs = 4 * 4096 * (4 + 2 + 2) * 16
    assert long < 16 * inputs  # all allocations of forward and backward together, not the peak


def test_keys_and_values_are_not_repeated_for_grouped_queries() -> None:
    """With 16 query heads on one key head, an expanded copy of the keys would be 16 times as large as the keys."""
    q, k, v = (x.detach().float() for x in qkv(1, 16, 1, 512, D=16))
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        grouped_attention(q, k, v, [[0, 512]], S2Pattern(64))
    expanded = [
        event.name
        for event in profile.events()
        if event.name in ("aten::repeat_interleave", "aten::repeat", "aten::expand")
    ]
    assert not expanded


def test_wraparound_is_the_paper_and_leaks() -> None:
    """The roll agrees with the reference except in the first half group, which sees the end of the sequence."""
    q, k, v = qkv(1, 4, 2, 16)
    rolled = rolled_attention(q, k, v, group_size=8)
    truth = reference_attention(q, k, v, [[0, 16]], S2Pattern(8))
    torch.testing.assert_close(rolled[:, :12, :2], truth[:, :12, :2])
    torch.testing.assert_close(rolled[:, 4:, 2:], truth[:, 4:, 2:])
    assert not torch.allclose(rolled[:, :4, 2:], truth[:, :4, 2:])
    v_changed = v.detach().clone()
    v_changed[:, :, 15] += 1.0
    assert not torch.allclose(rolled_attention(q, k, v_changed, group_size=8)[:, :4], rolled[:, :4])


def test_wraparound_needs_a_multiple_of_the_group() -> None:
    with pytest.raises(LongLoraError, match="10 tokens are not a multiple of group_size=8"):
        rolled_attention(*qkv(1, 2, 2, 10), group_size=8)
