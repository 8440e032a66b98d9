"""The fast path against the reference: values and all gradients, every length, heads, rows, documents, padding."""

from typing import Any

import pytest
import torch
from attention_cases import BY_HEAD, PATHS, assert_path_is_right, grads, qkv, run
from torch import Tensor

from longlora.attention import grouped, masks, softcap
from longlora.attention.grouped import grouped_attention
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern
from longlora.attention.reference import reference_attention
from longlora.attention.rolled import rolled_attention
from longlora.errors import LongLoraError

PATTERNS = [
    *(S2Pattern(6, sinks) for sinks in (0, 1, 3, 5)), S2Pattern(6, 3, "all"), S2Pattern(5, 2, "none"), FULL,
    WindowPattern(1), WindowPattern(4),
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("length", range(1, 20))
def test_every_length(length: int, pattern: Pattern, path: str) -> None:
    """Up to more than three groups: the first and last segments, alone and together, shorter and longer than sinks."""
    assert_path_is_right(path, qkv(1, 3, 1, length), [[0, length]], pattern)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("H", "K"), [(1, 1), (2, 2), (3, 3), (4, 1), (4, 2), (9, 3), (5, 5), (6, 2)])
def test_every_head_count(H: int, K: int, path: str) -> None:
    assert_path_is_right(path, qkv(1, H, K, 11), [[0, 11]], S2Pattern(4, 2))


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
    assert_path_is_right(path, qkv(2, 6, 3, 13), bounds, pattern)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [20, 37])
def test_windows_of_several_blocks(window: int, path: str) -> None:
    """Longer than the smallest block of queries, so that blocks reach back over others."""
    assert_path_is_right(path, qkv(1, 2, 1, 90), [[0, 90]], WindowPattern(window))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", [S2Pattern(6, 2), S2Pattern(6, 0, "none"), WindowPattern(4), FULL], ids=str)
@pytest.mark.parametrize("D_v", [2, 4, 7])
def test_learned_sinks_and_values_of_another_size(D_v: int, pattern: Pattern, path: str) -> None:
    q, k, _ = qkv(2, 6, 3, 19)
    v = torch.randn(2, 3, 19, D_v, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    logits = torch.linspace(-2, 3, 6, dtype=torch.float64).requires_grad_()
    assert_path_is_right(path, [q, k, v], [[0, 11, 19], [0, 17]], pattern, sink_logits_H=logits)
    assert not torch.allclose(
        run(path, [q, k, v], [[0, 19]] * 2, pattern, sink_logits_H=logits), run(path, [q, k, v], [[0, 19]] * 2, pattern)
    )


@pytest.mark.parametrize("pattern", [S2Pattern(6, 2), S2Pattern(6, 2, "all"), WindowPattern(4), FULL], ids=str)
@pytest.mark.parametrize(("H", "K"), [(6, 2), (9, 3), (4, 1), (3, 3)])
@pytest.mark.parametrize("learned_sinks", [False, True])
def test_a_call_for_each_query_head_of_a_group(
    monkeypatch: pytest.MonkeyPatch, learned_sinks: bool, H: int, K: int, pattern: Pattern
) -> None:
    """As on CUDA where flash does not run: the kernel never gets fewer key than query heads."""
    attention = torch.nn.functional.scaled_dot_product_attention
    shared: list[bool] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        shared.append(options.get("enable_gqa", False) or q.shape[1] != k.shape[1])
        return attention(q, k, v, **options)

    monkeypatch.setattr(grouped.F, "scaled_dot_product_attention", kernel)
    logits = torch.linspace(-1, 1, H, dtype=torch.float64).requires_grad_()
    extras = {"sink_logits_H": logits} if learned_sinks else {}
    assert_path_is_right(BY_HEAD, qkv(2, H, K, 19), [[0, 14, 19], [0, 17]], pattern, **extras)
    assert shared
    assert not any(shared)


def test_torch_is_asked_which_kernel_it_has_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(grouped, "SDPAParams", lambda *params: params)
    monkeypatch.setattr(grouped, "can_use_flash_attention", lambda params: asked.append(params) or params[3] is None)
    q, k, v = qkv(1, 4, 2, 5)
    assert grouped._takes_grouped_queries(q, k, v, q, 0.0)  # the CPU's kernel takes masks
    assert asked == []

    class OnCuda:
        device = torch.device("cuda")

    on_cuda: Any = OnCuda()
    assert grouped._takes_grouped_queries(on_cuda, k, v, None, 0.1)
    assert not grouped._takes_grouped_queries(on_cuda, k, v, q, 0.0)
    assert asked == [(on_cuda, k, v, None, 0.1, True, True), (on_cuda, k, v, q, 0.0, False, True)]


@pytest.mark.parametrize("path", PATHS[:2])
def test_gradients_of_learned_sinks_of_many_pieces_in_bfloat16(path: str) -> None:
    """Parts of one sign from 510 blocks: a sum in bfloat16 stops growing when a part is under 1/512 of it."""
    q, k, v = (x.detach() for x in qkv(1, 4, 2, 8192, D=8, dtype=torch.bfloat16))
    logits = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.bfloat16)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        own = logits.to(dtype).requires_grad_()
        out = run(
            path, [q.to(dtype), k.to(dtype), v.abs().to(dtype)], [[0, 8192]], WindowPattern(32), sink_logits_H=own
        )
        found += torch.autograd.grad(out.sum(), own)
    assert found[0].dtype is torch.bfloat16
    torch.testing.assert_close(found[0].double(), found[1], rtol=5e-3, atol=0.0)


def test_learned_sinks_rescale_with_one_rounding() -> None:
    """A factor that is rounded as well would double the largest error, half a unit in the last place."""
    q, k, v = (x.detach() for x in qkv(1, 2, 2, 1024, D=8, dtype=torch.bfloat16))
    logits = torch.tensor([0.5, 3.0])
    bounds = [[0, 1024]]
    ours = grouped_attention(0 * q, k, v, bounds, FULL, sink_logits_H=logits.bfloat16())
    seen_T1 = torch.arange(1, 1025, dtype=torch.float64)[:, None]  # keys of score 0
    factor_TH1 = (seen_T1 / (seen_T1 + logits.double().exp()))[..., None]
    exact = grouped_attention(0 * q, k, v, bounds, FULL).double() * factor_TH1
    torch.testing.assert_close(ours.double(), exact, rtol=2.0**-8 * 1.02, atol=0.0)


@pytest.fixture(
    params=[(2**22, 64, 1), (2 * 4 * 8 * 8, 1, 1), (1, 5, 1), (2**22, 1, 4)],
    ids=["one block", "two groups", "five rows", "quarters"],
)
def blocks_of_scores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How much soft-capped attention computes at a time, for 4 heads."""
    scores, rows, blocks = request.param
    monkeypatch.setattr(softcap, "_SCORES", scores)
    monkeypatch.setattr(softcap, "_MIN_ROWS", rows)
    monkeypatch.setattr(softcap, "_BLOCKS", blocks)


@pytest.mark.usefixtures("blocks_of_scores")
@pytest.mark.parametrize("pattern", [S2Pattern(6, 2), WindowPattern(20), FULL], ids=str)
def test_soft_capped_scores(pattern: Pattern) -> None:
    inputs = qkv(1, 4, 2, 33)
    assert_path_is_right("any device", inputs, [[0, 28, 32]], pattern, softcap=1.5)
    capped = grouped_attention(*inputs, [[0, 33]], pattern, softcap=1.5)
    assert not torch.allclose(capped, grouped_attention(*inputs, [[0, 33]], pattern))


@pytest.mark.usefixtures("blocks_of_scores")
@pytest.mark.parametrize("pattern", [S2Pattern(6, 2), WindowPattern(4), FULL], ids=str)
def test_soft_capped_scores_with_learned_sinks(pattern: Pattern) -> None:
    """The sink's own score isn't capped: two of them are above the cap here."""
    logits = torch.tensor([-2.0, 0.0, 2.0, 3.0], dtype=torch.float64).requires_grad_()
    assert_path_is_right("any device", qkv(1, 4, 2, 19), [[0, 14, 17]], pattern, softcap=1.5, sink_logits_H=logits)


@pytest.fixture
def poisoned_buffers(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Tensor.new_empty` gives NaN, too."""
    original = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size, **how: original(self, *size, **how).fill_(torch.nan))


@pytest.mark.usefixtures("poisoned_buffers")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("learned_sinks", [False, True])
@pytest.mark.parametrize(
    "pattern", [S2Pattern(6), S2Pattern(6, 2), S2Pattern(6, 5), S2Pattern(6, 2, "all"), WindowPattern(4)], ids=str
)
@pytest.mark.parametrize(("H", "K"), [(9, 3), (3, 1)])
def test_nothing_is_read_that_was_not_written(H: int, K: int, pattern: Pattern, learned_sinks: bool, path: str) -> None:
    """Padding in each row, documents from one token to almost three groups, one row of padding alone."""
    logits = torch.linspace(-1, 1, H, dtype=torch.float64).requires_grad_()
    assert torch.ones(()).new_empty(3).isnan().all()
    extras = {"sink_logits_H": logits} if learned_sinks else {}
    assert_path_is_right(path, qkv(2, H, K, 21), [[0, 1, 18, 20], [0]], pattern, **extras)


@pytest.mark.parametrize("path", PATHS[:2])
def test_masks_of_a_window_are_built_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16, and two documents that end in a block of 5 and of 9, over two rows."""
    built = []
    original = masks.causal_mask
    monkeypatch.setattr(masks, "causal_mask", lambda *args, **how: built.append(args[0]) or original(*args, **how))
    run(path, qkv(2, 2, 1, 200), [[0, 105, 200], [0, 105, 200]], WindowPattern(20))
    assert sorted(built) == [5, 11, 16]


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


@pytest.mark.parametrize("extras", [{}, {"dropout": 1e-30}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("values", [torch.bfloat16, torch.float32])
def test_autocast_decides_the_dtype(values: torch.dtype, extras: dict[str, float]) -> None:
    """Norms of queries and keys that are trained in float32 give float32; padding decides nothing."""
    q, k, v = (x.detach().float().requires_grad_() for x in qkv(1, 4, 2, 21, D=16))
    low = [x.detach().bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_attention(q, k, v.to(values), [[0, 20]], S2Pattern(8, 2), **extras)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, grouped_attention(*low, [[0, 20]], S2Pattern(8, 2), **extras))
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


def assert_compiles(
    path: str, inputs: list[Tensor], bounds: list[list[int]], pattern: Pattern, **extras: object
) -> None:
    """To one graph. It is functionalized, as for a compiler: writing through some views goes wrong there."""
    wanted = [*inputs, *(value for value in extras.values() if isinstance(value, Tensor))]

    def attention(*qkv: Tensor) -> Tensor:
        if path == "cpu kernel":
            return grouped_attention(*qkv, bounds, pattern, **extras)
        return grouped.portable_attention(*qkv, bounds, pattern, scaling=0.3, **extras)

    torch.compiler.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    plain, ours = attention(*inputs), compiled(*inputs)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(grads(ours, wanted), grads(plain, wanted))


# Whole groups, half a group left, a part of one; each with sinks and without, with an odd number of heads and an even.
@pytest.mark.parametrize(
    ("length", "H", "K", "sinks"),
    [(32, 4, 1, 0), (32, 9, 3, 2), (43, 9, 3, 0), (43, 4, 1, 2), (48, 9, 3, 2), (48, 4, 1, 0)],
)
def test_torch_compile_breaks_no_graph_and_no_gradient(length: int, H: int, K: int, sinks: int) -> None:
    inputs = [x.detach().float().requires_grad_() for x in qkv(1, H, K, length, D=8)]
    assert_compiles("cpu kernel", inputs, [[0, length]], S2Pattern(16, sinks))


SINK_LOGITS = torch.linspace(-1, 1, 4).requires_grad_()


@pytest.mark.parametrize(
    ("path", "extras"),
    [
        (PATHS[0], {}),
        (PATHS[0], {"sink_logits_H": SINK_LOGITS}),
        (PATHS[1], {}),
        (PATHS[1], {"sink_logits_H": SINK_LOGITS}),
        (PATHS[1], {"dropout": 1e-30}),
        (PATHS[1], {"softcap": 2.0}),  # a checkpoint inside
        (BY_HEAD, {}),
    ],
    ids=["cpu", "cpu, learned sinks", "any device", "any device, learned sinks", "dropout", "soft cap", "by head"],
)
@pytest.mark.parametrize("pattern", [S2Pattern(8, 2), WindowPattern(4)], ids=str)
def test_torch_compile_on_each_path(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern, path: str, extras: dict[str, Any]
) -> None:
    if path == BY_HEAD:
        monkeypatch.setattr(grouped, "_takes_grouped_queries", lambda *_: False)
    inputs = [x.detach().float().requires_grad_() for x in qkv(1, 4, 2, 21, D=8)]
    assert_compiles(path, inputs, [[0, 19]], pattern, **extras)


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
