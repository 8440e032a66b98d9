"""The fast path against the reference: values and all gradients, every length, heads, rows, documents, padding."""

import pytest
import torch
from torch import Tensor

from longlora.attention.grouped import grouped_attention
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern
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


PATHS = ["cpu kernel", "any device"]


def run(path: str, inputs: list[Tensor], bounds: list[list[int]], pattern: Pattern, **extras: object) -> Tensor:
    """`grouped_attention`; a dropout of next to nothing keeps it from the CPU's own kernel."""
    return grouped_attention(*inputs, bounds, pattern, dropout=1e-30 if path == "any device" else 0.0, **extras)


def assert_same(path: str, inputs: list[Tensor], bounds: list[list[int]], pattern: Pattern, **extras: object) -> None:
    ours = run(path, inputs, bounds, pattern, **extras)
    truth = reference_attention(*inputs, bounds, pattern, **extras)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    wanted = [*inputs, *(value for value in extras.values() if isinstance(value, Tensor))]
    for name, one, other in zip(
        ["dq", "dk", "dv", "d sink logits"], grads(ours, wanted), grads(truth, wanted), strict=False
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


PATTERNS = [
    *(S2Pattern(6, sinks) for sinks in (0, 1, 3, 5)), S2Pattern(6, 3, "all"), S2Pattern(5, 2, "none"), FULL,
    WindowPattern(1), WindowPattern(4),
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("length", range(1, 20))
def test_every_length(length: int, pattern: Pattern, path: str) -> None:
    """Up to more than three groups: the first and last segments, alone and together, shorter and longer than sinks."""
    assert_same(path, qkv(1, 3, 1, length), [[0, length]], pattern)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("H", "K"), [(1, 1), (2, 2), (3, 3), (4, 1), (4, 2), (9, 3), (5, 5), (6, 2)])
def test_every_head_count(H: int, K: int, path: str) -> None:
    assert_same(path, qkv(1, H, K, 11), [[0, 11]], S2Pattern(4, 2))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", [S2Pattern(4, 1), S2Pattern(4, 3, "all"), WindowPattern(3), FULL], ids=str)
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
def test_packed_and_padded_batches(bounds: list[list[int]], pattern: Pattern, path: str) -> None:
    assert_same(path, qkv(2, 6, 3, 13), bounds, pattern)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [20, 37])
def test_windows_of_several_blocks(window: int, path: str) -> None:
    """Longer than the smallest block of queries, so that blocks reach back over others."""
    assert_same(path, qkv(1, 2, 1, 90), [[0, 90]], WindowPattern(window))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", [S2Pattern(6, 2), S2Pattern(6, 0, "none"), WindowPattern(4), FULL], ids=str)
@pytest.mark.parametrize("D_v", [2, 4, 7])
def test_learned_sinks_and_values_of_another_size(D_v: int, pattern: Pattern, path: str) -> None:
    q, k, _ = qkv(2, 6, 3, 19)
    v = torch.randn(2, 3, 19, D_v, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    logits = torch.linspace(-2, 3, 6, dtype=torch.float64).requires_grad_()
    assert_same(path, [q, k, v], [[0, 11, 19], [0, 17]], pattern, sink_logits_H=logits)
    assert not torch.allclose(
        run(path, [q, k, v], [[0, 19]] * 2, pattern, sink_logits_H=logits), run(path, [q, k, v], [[0, 19]] * 2, pattern)
    )


@pytest.mark.parametrize("pattern", [S2Pattern(6, 2), WindowPattern(4), FULL], ids=str)
def test_soft_capped_scores(pattern: Pattern) -> None:
    inputs = qkv(2, 6, 3, 19)
    assert_same("any device", inputs, [[0, 11, 19], [0, 17]], pattern, softcap=1.5)
    capped = grouped_attention(*inputs, [[0, 19]] * 2, pattern, softcap=1.5)
    assert not torch.allclose(capped, grouped_attention(*inputs, [[0, 19]] * 2, pattern))
    with pytest.raises(LongLoraError, match="soft-capped scores with learned sinks"):
        grouped_attention(*inputs, [[0, 19]] * 2, pattern, softcap=1.5, sink_logits_H=torch.zeros(6))


def test_dropout_drops() -> None:
    q, k, v = qkv(1, 2, 2, 400)
    ones = torch.ones_like(v)
    torch.manual_seed(0)
    dropped = grouped_attention(q, k, ones, [[0, 400]], S2Pattern(64, 2), dropout=0.5)
    assert 0.4 < (dropped - 1).abs().mean() < 1.0 or dropped.std() > 0.05
    assert abs(dropped.mean().item() - 1) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("path", PATHS)
def test_rounding_is_no_worse_than_the_formula_in_the_same_dtype(dtype: torch.dtype, sinks: int, path: str) -> None:
    """Distance from float64, allowed as much as the naive formula in the same dtype has."""
    inputs = qkv(2, 4, 2, 21, D=16, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    bounds, pattern = [[0, 13, 21], [0, 21]], S2Pattern(8, sinks)
    truth = reference_attention(*exact, bounds, pattern)
    naive = reference_attention(*inputs, bounds, pattern)
    ours = run(path, inputs, bounds, pattern)
    eps = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-6}[dtype]
    pairs = zip(
        [ours, *grads(ours, inputs)], [naive, *grads(naive, inputs)], [truth, *grads(truth, exact)], strict=True
    )
    for one, plain, right in pairs:
        allowed = (plain.double() - right).abs() + eps * right.abs().max()
        assert ((one.double() - right).abs() <= allowed.max()).all()


@pytest.mark.parametrize("path", PATHS)
def test_autocast_decides_the_dtype(path: str) -> None:
    """Norms of queries and keys that are trained in float32 give float32, beside values in bfloat16."""
    q, k, v = (x.detach().float().requires_grad_() for x in qkv(1, 4, 2, 21, D=16))
    low = [x.detach().bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = run(path, [q, k, v.bfloat16()], [[0, 21]], S2Pattern(8, 2))
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, run(path, low, [[0, 21]], S2Pattern(8, 2)))
    assert all(grad.dtype is torch.float32 for grad in grads(out, [q, k, v]))


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


def allocated(inputs: list[Tensor], pattern: S2Pattern) -> tuple[int, int]:
    """Bytes that forward and backward allocate in all, freed or not."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    T = q.shape[2]
    grad = torch.zeros(1, T, q.shape[1], q.shape[3], dtype=q.dtype)

    def total(profile: torch.profiler.profile) -> int:
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())

    with torch.profiler.profile(profile_memory=True) as forward:
        out = grouped_attention(q, k, v, [[0, T]], pattern)
    with torch.profiler.profile(profile_memory=True) as backward:
        torch.autograd.grad(out, (q, k, v), grad)
    return total(forward), total(backward)


@pytest.mark.parametrize("sinks", [0, 4])
def test_memory_budget(sinks: int) -> None:
    """In units of the queries, for 4 query heads to 1 key/value head, so keys and values are a quarter each.

    Forward: the kernel's output and the whole output (2). Backward: the kernel's gradients and the whole gradients (3),
    and the kernel's own scratch (1). Sinks add one copy of queries, keys and values to the forward pass (1.5), and to
    the backward pass that and one of the output and of its gradient (3.5). A tenth is for the rows of the sinks and for
    sums of exponentials.
    """
    inputs = [x.detach().float() for x in qkv(1, 8, 2, 8192, D=32)]
    unit = inputs[0].numel() * 4
    forward, backward = allocated(inputs, S2Pattern(64, sinks))
    assert forward / unit < 1.1 * (2 + (1.5 if sinks else 0))
    assert backward / unit < 1.1 * (4 + (3.5 if sinks else 0))


def test_memory_grows_linearly_with_the_sequence() -> None:
    """4 times the tokens, 4 times the bytes; a T x T mask would take 16 times."""
    short, long = (sum(allocated([x.float() for x in qkv(1, 4, 2, T, D=16)], S2Pattern(64, 4))) for T in (1024, 4096))
    assert long < 4.4 * short


def test_keys_and_values_are_not_repeated_for_grouped_queries() -> None:
    """With 16 query heads on one key head, a copy of keys and values for each would be 32 times the keys."""
    inputs = [x.detach().float() for x in qkv(1, 16, 1, 4096, D=16)]
    forward, _ = allocated(inputs, S2Pattern(64))
    keys = inputs[1].numel() * 4
    assert forward < (2 * 16 + 6) * keys


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize(("H", "K"), [(4, 1), (9, 3)])
@pytest.mark.parametrize("length", [32, 43, 48])
def test_torch_compile_breaks_no_graph_and_no_gradient(length: int, H: int, K: int, sinks: int) -> None:
    """Functionalized, as for a compiler: writing through some views goes wrong there."""
    inputs = [x.detach().float().requires_grad_() for x in qkv(1, H, K, length, D=8)]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return grouped_attention(q, k, v, [[0, length]], S2Pattern(16, sinks))

    torch.compiler.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    plain, ours = attention(*inputs), compiled(*inputs)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grads(ours, inputs), grads(plain, inputs))


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
