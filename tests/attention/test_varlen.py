"""The varlen backend on the CPU: its index against the definition, and all around the kernel against the reference.

The kernel itself needs a GPU (test_backends_gpu.py); `emulated_kernel` stands for its contract here.
"""

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longlora.attention import varlen
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern, may_attend, pattern_shift
from longlora.attention.reference import reference_attention
from longlora.attention.varlen import VarlenIndex, varlen_attention, varlen_index, varlen_plan
from longlora.errors import ModelError

GROUP = 6
PATTERNS = [
    *[S2Pattern(GROUP, sinks, shift) for sinks in range(GROUP) for shift in ("half", "all", "none")],
    S2Pattern(5, 2, "none"),
    *[WindowPattern(size) for size in (1, 2, 5, 40)],
    FULL,
]
BATCHES = [
    [[0, 5, 6, 13], [0, 13]],
    [[0, 1, 2, 13], [0, 4, 8, 12, 13]],
    [[0, 9], [0, 13]],  # the first row has 4 tokens of padding
    [[0, 3, 7], [0]],  # the second row is padding only
    [[0, 12, 13], [0, 1, 8]],
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: waiting for a second thread would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def seen_in_document(length: int, pattern: Pattern, shifted: bool) -> Tensor:
    """bool [length, length] by the definition."""
    every = range(length)
    return torch.tensor([[may_attend(i, j, length, pattern, shifted=shifted) for j in every] for i in every])


def seen_by_definition(bounds_B: list[list[int]], tokens: int, pattern: Pattern, shifted: bool) -> Tensor:
    """bool [R, R] of the flattened batch."""
    seen = torch.zeros(len(bounds_B) * tokens, len(bounds_B) * tokens, dtype=torch.bool)
    for row, bounds in enumerate(bounds_B):
        for start, stop in pairwise(bounds):
            document = slice(row * tokens + start, row * tokens + stop)
            seen[document, document] = seen_in_document(stop - start, pattern, shifted)
    return seen


def visible(queries: int, keys: int, window: tuple[int, int]) -> Tensor:
    """bool [queries, keys] of one segment: causal, aligned to the bottom right, within the window."""
    assert window[1] == 0
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    return (distance >= 0) & ((distance <= window[0]) | (window[0] < 0))


def seen_by_index(index: VarlenIndex, rows: int) -> Tensor:
    """bool [R, R] that the kernel's contract makes of an index; a key that is there twice for one query fails."""
    query_rows = torch.arange(rows) if index.query_rows is None else index.query_rows
    key_rows = torch.arange(rows) if index.key_rows is None else index.key_rows
    counts = torch.zeros(rows, rows, dtype=torch.int64)
    bounds = zip(pairwise(index.cu_seqlens_q.tolist()), pairwise(index.cu_seqlens_k.tolist()), strict=True)
    for (q_start, q_stop), (k_start, k_stop) in bounds:
        assert 0 < q_stop - q_start <= index.max_q
        assert 0 < k_stop - k_start <= index.max_k
        seen = visible(q_stop - q_start, k_stop - k_start, index.window)
        places = (query_rows[q_start:q_stop, None], key_rows[None, k_start:k_stop].expand_as(seen))
        counts.index_put_(places, seen.long(), accumulate=True)
    assert index.cu_seqlens_q[-1] == len(query_rows)
    assert index.cu_seqlens_k[-1] == len(key_rows)
    assert counts.max() <= 1
    return counts.bool()


def assert_index(bounds_B: list[list[int]], tokens: int, pattern: Pattern) -> None:
    for shifted in {"half": (False, True), "all": (True,), "none": (False,)}[pattern_shift(pattern)]:
        index = varlen_index(bounds_B, tokens, pattern, shifted=shifted)
        expected = seen_by_definition(bounds_B, tokens, pattern, shifted)
        assert torch.equal(seen_by_index(index, len(expected)), expected), (bounds_B, pattern, shifted)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_index_says_what_the_definition_says(pattern: Pattern) -> None:
    for length in range(1, 3 * GROUP + 2):
        assert_index([[0, length]], length, pattern)
    for bounds_B in BATCHES:
        assert_index(bounds_B, 13, pattern)


def test_index_is_a_view_where_it_can_be() -> None:
    for pattern in (S2Pattern(4), WindowPattern(3), FULL, S2Pattern(16, 3)):
        index = varlen_index([[0, 16], [0, 3, 16]], 16, pattern, shifted=True)
        assert (index.query_rows, index.key_rows, index.sinks) == (None, None, None)
        assert index.cu_seqlens_q.dtype == index.cu_seqlens_k.dtype == torch.int32
    assert varlen_index([[0, 16]], 16, S2Pattern(4, 1), shifted=False).query_rows is None
    assert varlen_index([[0, 16]], 16, S2Pattern(4, 1), shifted=False).key_rows is not None


def test_window_as_long_as_the_documents_is_plain_causal() -> None:
    assert varlen_index([[0, 4, 9]], 9, WindowPattern(5), shifted=False).window == (-1, 0)
    assert varlen_index([[0, 4, 9]], 9, WindowPattern(4), shifted=False).window == (3, 0)


def test_index_of_a_million_tokens() -> None:
    tokens, group = 2**20, 1024
    index = varlen_index([[0, tokens]], tokens, S2Pattern(group, 4), shifted=True)
    assert index.key_rows is not None
    assert len(index.cu_seqlens_q) == tokens // group + 2
    assert len(index.key_rows) == tokens + 4 * (tokens // group)


def emulated_kernel(q: Tensor, k: Tensor, v: Tensor, index: VarlenIndex, scaling: float, flash: Any) -> Tensor:
    """What the flash kernels promise, slowly; also what they demand."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert q.shape[1] % k.shape[1] == 0
    assert index.cu_seqlens_q.dtype == index.cu_seqlens_k.dtype == torch.int32
    assert (index.cu_seqlens_q[-1], index.cu_seqlens_k[-1]) == (q.shape[0], k.shape[0])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    outputs = []
    bounds = zip(pairwise(index.cu_seqlens_q.tolist()), pairwise(index.cu_seqlens_k.tolist()), strict=True)
    for (q_start, q_stop), (k_start, k_stop) in bounds:
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_stop], k[k_start:k_stop]) * scaling
        scores = scores.masked_fill(~visible(q_stop - q_start, k_stop - k_start, index.window), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[k_start:k_stop]))
    return torch.cat(outputs)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Puts the emulation in the kernel's place; the list fills with (query heads, key heads) of the calls."""
    calls = []

    def kernel(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        calls.append((q.shape[1], k.shape[1]))
        return emulated_kernel(q, k, *rest)

    monkeypatch.setattr(varlen, "_kernel", kernel)
    return calls


def qkv(B: int, H: int, K: int, T: int, D: int = 4, value_width: int | None = None) -> list[Tensor]:
    """As transformers makes them: [B, T, heads, D] in memory, seen as [B, heads, T, D]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(H, D), (K, D), (K, value_width or D)]
    return [
        torch.randn(B, T, heads, width, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for heads, width in shapes
    ]


def grads(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return list(torch.autograd.grad((out * weight).sum(), inputs))


def assert_same(
    inputs: list[Tensor], bounds_B: list[list[int]], pattern: Pattern, scaling: float | None = None
) -> None:
    q, k, _ = inputs
    plan = varlen_plan(bounds_B, q.shape[2], q.shape[1], k.shape[1], pattern, "cpu")
    ours = varlen_attention(*inputs, plan, scaling=scaling)
    truth = reference_attention(*inputs, bounds_B, pattern, scaling=scaling)
    assert ours.shape == truth.shape
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    for name, one, other in zip("qkv", grads(ours, inputs), grads(truth, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"d{name}: {text}")


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("length", range(1, 10))
def test_every_length(emulated: Any, length: int, sinks: int) -> None:
    assert_same(qkv(1, 3, 1, length), [[0, length]], S2Pattern(4, sinks))


@pytest.mark.parametrize("pattern", [S2Pattern(4), S2Pattern(4, 3, "all"), WindowPattern(3), FULL], ids=str)
@pytest.mark.parametrize("bounds_B", BATCHES, ids=str)
def test_packed_and_padded_batches(emulated: Any, bounds_B: list[list[int]], pattern: Pattern) -> None:
    assert_same(qkv(2, 2, 1, 13), bounds_B, pattern)


@pytest.mark.parametrize(
    ("H", "K", "calls"),
    [
        (1, 1, [(1, 1)]),
        (2, 2, [(1, 1), (1, 1)]),
        (4, 2, [(2, 1), (2, 1)]),
        (4, 1, [(2, 1), (2, 1)]),
        (9, 3, [(3, 1), (2, 1), (1, 1), (3, 1)]),
        (6, 2, [(3, 1), (3, 1)]),
    ],
)
def test_heads_are_cut_once_and_never_repeated(emulated: Any, H: int, K: int, calls: list[tuple[int, int]]) -> None:
    assert_same(qkv(1, H, K, 7), [[0, 6]], S2Pattern(4, 1))
    assert emulated == calls


def test_one_call_where_both_grids_are_the_same(emulated: Any) -> None:
    assert_same(qkv(1, 9, 3, 8), [[0, 4, 7, 8]], S2Pattern(4, 1))
    assert emulated == [(9, 3)]


@pytest.mark.parametrize(("width", "value_width"), [(8, 8), (8, 4), (4, 12)])
def test_head_dims_and_scaling(emulated: Any, width: int, value_width: int) -> None:
    assert_same(qkv(1, 2, 1, 9, width, value_width), [[0, 9]], S2Pattern(4, 1), scaling=0.3)
    q, k, v = qkv(1, 2, 1, 9, width, value_width)
    plan = varlen_plan([[0, 9]], 9, 2, 1, S2Pattern(4, 1), "cpu")
    assert not torch.allclose(varlen_attention(q, k, v, plan), varlen_attention(q, k, v, plan, scaling=0.3))


def test_a_batch_of_padding_only_gives_zeros(emulated: Any) -> None:
    plan = varlen_plan([[0], [0]], 5, 2, 1, S2Pattern(4, 1), "cpu")
    assert not varlen_attention(*qkv(2, 2, 1, 5), plan).any()
    assert emulated == []


@pytest.mark.usefixtures("poisoned_memory")
def test_no_memory_is_read_that_was_not_written(emulated: Any) -> None:
    assert_same(qkv(2, 6, 2, 13), [[0, 5, 12], [0, 9]], S2Pattern(4, 3))


class AddedIn(TorchDispatchMode):
    """Notes the dtypes in which rows are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.index_add_, torch.ops.aten.index_add):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_gradients_of_sinks_are_added_in_float32() -> None:
    """A GPU adds bfloat16 rows in bfloat16, and from 256 on adding 1 changes nothing; a CPU does not show it."""
    group, groups = 2, 600
    index = varlen_index([[0, group * groups]], group * groups, S2Pattern(group, 1, "none"), shifted=False)
    x = torch.zeros(group * groups, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    keys = varlen._key_rows(x, index)
    with AddedIn() as added:
        keys.sum().backward()
    assert added.dtypes == [torch.float32]
    assert x.grad is not None
    assert x.grad[0, 0, 0] == groups
    assert (x.grad[1:] == 1).all()


def test_autocast_decides_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        dtypes.extend([q.dtype, k.dtype, v.dtype])
        return q

    monkeypatch.setattr(varlen, "_kernel", kernel)
    plan = varlen_plan([[0, 5]], 5, 2, 1, FULL, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        varlen_attention(*[x.float() for x in qkv(1, 2, 1, 5)], plan)
    assert dtypes == [torch.bfloat16] * 3


def test_flash_attn_builds_get_the_same_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_check_tensors", lambda *tensors: None)
    given: list[dict[str, Any]] = []

    def flash(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Tensor, str]:
        given.append(arguments)
        return q, "logsumexp"

    monkeypatch.setattr(varlen, "_load_flash", lambda name: flash)
    for pattern in (WindowPattern(3), FULL):
        plan = varlen_plan([[0, 5]], 5, 2, 1, pattern, "cpu", implementation="flash_attention_2")
        varlen_attention(*qkv(1, 2, 1, 5), plan, scaling=0.3)
    for arguments in given:
        assert arguments.pop("cu_seqlens_q").tolist() == arguments.pop("cu_seqlens_k").tolist() == [0, 5]
    shared = {"max_seqlen_q": 5, "max_seqlen_k": 5, "softmax_scale": 0.3, "causal": True}
    assert given == [shared | {"window_size": (2, 0)}, shared]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "backend varlen needs a CUDA device, the tensors are on cpu: use backend=grouped"),
        ({"T": 6}, r"are \(1, 6, 2, 1\), planned were \(1, 5, 2, 1\): plan every batch"),
        ({"K": 2}, r"are \(1, 5, 2, 2\), planned were \(1, 5, 2, 1\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    plan = varlen_plan([[0, 5]], 5, 2, 1, FULL, "cpu")
    with pytest.raises(ModelError, match=message):
        varlen_attention(*qkv(**({"B": 1, "H": 2, "K": 1, "T": 5} | change)), plan)


class OnCuda:
    """A tensor's looks on a GPU, for the checks in front of the kernel."""

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        self.device, self.dtype, self.shape = torch.device("cuda"), dtype, (4, 2, width)


@pytest.mark.parametrize(
    ("dtypes", "width", "message"),
    [
        ([torch.float32] * 3, 8, "needs bfloat16 or float16, the tensors are float32: load the model in bfloat16"),
        ([torch.bfloat16, torch.float16, torch.bfloat16], 8, "the tensors are bfloat16, float16"),
        ([torch.bfloat16] * 3, 264, "takes head dims up to 256, the tensors have 264: use backend=grouped"),
        ([torch.bfloat16] * 3, 256, None),
    ],
)
def test_the_kernel_s_demands_are_checked(dtypes: list[torch.dtype], width: int, message: str | None) -> None:
    tensors: list[Any] = [OnCuda(dtype, width) for dtype in dtypes]
    if message is None:
        varlen._check_tensors(*tensors)
        return
    with pytest.raises(ModelError, match=message):
        varlen._check_tensors(*tensors)


def test_a_kernel_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ModelError, match="'longlora/none' cannot be loaded") as caught:
        varlen_plan([[0, 5]], 5, 2, 1, FULL, "cpu", implementation="longlora/none")
    assert "\n" not in str(caught.value)


def test_bad_bounds_are_refused() -> None:
    with pytest.raises(ModelError, match=re.escape("document bounds [0, 9]")):
        varlen_plan([[0, 9]], 8, 2, 1, FULL, "cpu")
