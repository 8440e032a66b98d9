"""The varlen backend on the CPU: its index against the reference's masks, values and gradients with emulated kernels.

The kernels themselves need a GPU (test_backends_gpu.py); `attention_cases.py` has their contract.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_cases import (
    BATCHES,
    PATTERNS,
    TOKENS,
    all_layouts,
    assert_same,
    layout,
    qkv,
    seen_by_reference,
    visible,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longlora.attention import varlen
from longlora.attention.layout import Layout
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern
from longlora.attention.reference import reference_attention
from longlora.attention.varlen import varlen_attention, varlen_plan
from longlora.attention.varlen_index import VarlenIndex, varlen_index
from longlora.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")


def seen_by_index(index: VarlenIndex, rows: int) -> Tensor:
    """bool [R, R] that the kernel's contract makes of an index; a key that is there twice for one query fails."""
    query_rows = torch.arange(rows) if index.query_rows is None else index.query_rows
    key_rows = torch.arange(rows) if index.key_rows is None else index.key_rows
    counts = torch.zeros(rows, rows, dtype=torch.int64)
    bounds = zip(pairwise(index.cu_seqlens_q.tolist()), pairwise(index.cu_seqlens_k.tolist()), strict=True)
    for (q_start, q_stop), (k_start, k_stop) in bounds:
        assert 0 < q_stop - q_start <= index.max_q
        assert 0 < k_stop - k_start <= index.max_k
        assert index.window[1] == 0
        seen = visible(q_stop - q_start, k_stop - k_start, index.window)
        places = (query_rows[q_start:q_stop, None], key_rows[None, k_start:k_stop].long().expand_as(seen))
        counts.index_put_(places, seen.long(), accumulate=True)
    assert index.cu_seqlens_q[-1] == len(query_rows)
    assert index.cu_seqlens_k[-1] == len(key_rows)
    assert counts.max() <= 1
    return counts.bool()


def assert_masks(of: Layout) -> None:
    """Of every head; and that the head gets the key head that the reference takes."""
    expected = seen_by_reference(of)
    share, head = of.query_heads // of.kv_heads, 0
    for piece, index in varlen_plan(of).calls:
        seen = seen_by_index(index, len(of.bounds_B) * of.tokens)
        for within in range(piece.query_heads):
            assert torch.equal(seen, torch.block_diag(*expected[:, head]).bool()), (of, head)
            assert piece.kv_start + within // (piece.query_heads // piece.kv_heads) == head // share
            head += 1
    assert head == of.query_heads


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masks_are_those_of_the_reference(pattern: Pattern) -> None:
    for of in all_layouts(pattern):
        assert_masks(of)


def test_index_is_a_view_where_it_can_be() -> None:
    for pattern in (S2Pattern(4), WindowPattern(3), FULL, S2Pattern(16, 3)):
        index = varlen_index(layout([[0, 16], [0, 3, 16]], 16, pattern), shifted=True)
        assert (index.query_rows, index.key_rows, index.sinks) == (None, None, None)
        assert index.cu_seqlens_q.dtype == index.cu_seqlens_k.dtype == torch.int32
    with_sinks = varlen_index(layout([[0, 16]], 16, S2Pattern(4, 1)), shifted=False)
    assert with_sinks.query_rows is None
    assert with_sinks.key_rows is not None


def test_window_as_long_as_the_documents_is_plain_causal() -> None:
    assert varlen_index(layout([[0, 4, 9]], 9, WindowPattern(5)), shifted=False).window == (-1, 0)
    assert varlen_index(layout([[0, 4, 9]], 9, WindowPattern(4)), shifted=False).window == (3, 0)


def test_the_plan_of_a_long_sequence_is_small() -> None:
    """8 bytes a token and grid: int32, and two of them. One layer's keys and values have 4096."""
    tokens, group = 2**16, 2048
    plan = varlen_plan(layout([[0, tokens]], tokens, S2Pattern(group, 4), (32, 8)))
    assert [(piece.query_heads, piece.kv_heads) for piece, _ in plan.calls] == [(16, 4), (16, 4)]
    for piece, index in plan.calls:
        segments = tokens // group + piece.shifted
        assert index.sinks is not None
        assert index.key_rows is not None
        assert len(index.cu_seqlens_q) == len(index.cu_seqlens_k) == segments + 1
        assert len(index.key_rows) == tokens + 4 * (segments - 1)
        tensors = [x for of in (index, index.sinks) for x in vars(of).values() if isinstance(x, Tensor)]
        assert sum(x.nbytes for x in tensors) < 8 * tokens + 100 * segments


def assert_same_as_reference(
    inputs: list[Tensor],
    bounds_B: list[list[int]],
    pattern: Pattern,
    scaling: float | None = None,
    full_attention: str | None = None,
) -> None:
    plan = varlen_plan(Layout.of(*inputs[:2], bounds_B, pattern), full_attention)
    ours = varlen_attention(*inputs, plan, scaling=scaling)
    assert_same(ours, reference_attention(*inputs, bounds_B, pattern, scaling=scaling), inputs)


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("length", range(1, 10))
def test_every_length(emulated: Any, length: int, sinks: int) -> None:
    assert_same_as_reference(qkv(1, 3, 1, length), [[0, length]], S2Pattern(4, sinks))


@pytest.mark.parametrize("kernel", [None, "sdpa", "flash_attention_2", "kernels-community/vllm-flash-attn3"])
@pytest.mark.parametrize("pattern", [S2Pattern(4), S2Pattern(4, 3, "all"), WindowPattern(3), FULL], ids=str)
@pytest.mark.parametrize("bounds_B", BATCHES[:-1], ids=str)
def test_packed_and_padded_batches(
    emulated: Any, bounds_B: list[list[int]], pattern: Pattern, kernel: str | None
) -> None:
    assert_same_as_reference(qkv(2, 2, 1, TOKENS), bounds_B, pattern, full_attention=kernel)
    assert {name for name, *_ in emulated} == {kernel if "flash" in str(kernel) else "torch"}


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
    assert_same_as_reference(qkv(1, H, K, 7), [[0, 6]], S2Pattern(4, 1))
    assert emulated == [("torch", *call) for call in calls]


def test_one_call_where_both_grids_are_the_same(emulated: Any) -> None:
    assert_same_as_reference(qkv(1, 9, 3, 8), [[0, 4, 7, 8]], S2Pattern(4, 1))
    assert emulated == [("torch", 9, 3)]


@pytest.mark.parametrize(("width", "value_width"), [(8, 8), (8, 4), (4, 12)])
def test_head_dims_and_scaling(emulated: Any, width: int, value_width: int) -> None:
    inputs = qkv(1, 2, 1, 9, width, value_width=value_width)
    assert_same_as_reference(inputs, [[0, 9]], S2Pattern(4, 1), scaling=0.3)
    plan = varlen_plan(layout([[0, 9]], 9, S2Pattern(4, 1)))
    assert not torch.allclose(varlen_attention(*inputs, plan), varlen_attention(*inputs, plan, scaling=0.3))


def test_a_batch_of_padding_only_gives_zeros(emulated: Any) -> None:
    plan = varlen_plan(layout([[0], [0]], 5, S2Pattern(4, 1)))
    assert not varlen_attention(*qkv(2, 2, 1, 5), plan).any()
    assert emulated == []


@pytest.mark.usefixtures("poisoned_memory")
def test_no_memory_is_read_that_was_not_written(emulated: Any) -> None:
    assert_same_as_reference(qkv(2, 6, 2, TOKENS), [[0, 5, 12], [0, 9]], S2Pattern(4, 3))


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
    index = varlen_index(layout([[0, group * groups]], group * groups, S2Pattern(group, 1, "none")), shifted=False)
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
    with torch.autocast("cpu", dtype=torch.bfloat16):
        varlen_attention(*[x.float() for x in qkv(1, 2, 1, 5)], varlen_plan(layout([[0, 5]], 5, FULL)))
    assert dtypes == [torch.bfloat16] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": 6}, r"are \(1, 6, 2, 1\), planned were \(1, 5, 2, 1\): plan every batch"),
        ({"K": 2}, r"are \(1, 5, 2, 2\), planned were \(1, 5, 2, 1\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    plan = varlen_plan(layout([[0, 5]], 5, FULL))
    with pytest.raises(ModelError, match=message):
        varlen_attention(*qkv(**({"B": 1, "H": 2, "K": 1, "T": 5} | change)), plan)


def test_a_flash_attn_build_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ModelError, match="'longlora/no-flash' cannot be loaded .*attn_implementation='sdpa'") as caught:
        varlen_plan(layout([[0, 5]], 5, FULL), "longlora/no-flash")
    assert "\n" not in str(caught.value)


def test_the_kernel_is_logged_once(emulated: Any, caplog: pytest.LogCaptureFixture) -> None:
    varlen._log_kernel.cache_clear()
    caplog.set_level("INFO", "longlora")
    for name in ("sdpa", "flash_attention_2", "sdpa", None):
        varlen_plan(layout([[0, 5]], 5, FULL), name)
    assert [record.message for record in caplog.records] == [
        "S2-Attn varlen kernel: torch.nn.attention.varlen",
        "S2-Attn varlen kernel: flash_attn_varlen_func of flash_attention_2",
    ]
