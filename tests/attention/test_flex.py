"""The flex backend on the CPU: its block mask against the definition, its values and gradients against the reference.

FlexAttention runs uncompiled here; the compiled kernel needs a GPU (test_backends_gpu.py).
"""

import shutil
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor

from longlora.attention import flex
from longlora.attention.flex import flex_plan, flex_s2_attention
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern, may_attend, pattern_shift, shifted_heads
from longlora.attention.reference import reference_attention
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


def seen_by_definition(bounds_B: list[list[int]], tokens: int, heads: int, pattern: Pattern) -> Tensor:
    """bool [B, H, T, T]."""
    border = heads - shifted_heads(heads, pattern_shift(pattern))
    seen = torch.zeros(len(bounds_B), heads, tokens, tokens, dtype=torch.bool)
    for row, bounds in enumerate(bounds_B):
        for start, stop in pairwise(bounds):
            for head in range(heads):
                document = seen_in_document(stop - start, pattern, head >= border)
                seen[row, head, start:stop, start:stop] = document
    return seen


def blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """bool [B, H, N, N] of lists; a block that is listed twice fails."""
    N = counts.shape[-1]
    dense = torch.zeros(*counts.shape, N, dtype=torch.int32)
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    dense.scatter_add_(-1, indices.long(), listed.int())
    assert dense.max() <= 1
    assert (indices[listed].reshape(-1) < N).all()
    return dense.bool()


def assert_block_mask(bounds_B: list[list[int]], tokens: int, pattern: Pattern, block_size: int) -> Tensor:
    """Returns which blocks are full and which could be, both [B, H, N, N]."""
    heads = 3
    plan = flex_plan(bounds_B, tokens, heads, 1, pattern, "cpu", block_size=block_size)
    mask = plan.block_mask
    expected = seen_by_definition(bounds_B, tokens, heads, pattern)
    partial, full = blocks(mask.kv_num_blocks, mask.kv_indices), blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & full).any()
    for dense, counts, indices in (
        (partial, mask.q_num_blocks, mask.q_indices),
        (full, mask.full_q_num_blocks, mask.full_q_indices),
    ):
        assert torch.equal(blocks(counts, indices), dense.transpose(-1, -2))  # what the backward pass reads

    b, h = torch.arange(len(bounds_B))[:, None, None, None], torch.arange(heads)[:, None, None]
    position = torch.arange(tokens)
    asked = mask.mask_mod(b, h, position[:, None], position)
    assert torch.equal(asked, expected)
    every_token = expected.new_zeros(*expected.shape[:2], *[partial.shape[-1] * block_size] * 2)
    every_token[..., :tokens, :tokens] = expected
    tiles = every_token.unflatten(-1, (-1, block_size)).unflatten(-3, (-1, block_size)).transpose(-2, -3)
    assert torch.equal((partial | full).expand(tiles.shape[:4]), tiles.any(-1).any(-1)), "blocks with something to see"
    assert tiles[full.expand(tiles.shape[:4])].all(), "a full block with something hidden"
    return torch.stack([full.expand(tiles.shape[:4]), tiles.all(-1).all(-1)])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_block_mask_says_what_the_definition_says(pattern: Pattern) -> None:
    for length in range(1, 3 * GROUP + 2):
        assert_block_mask([[0, length]], length, pattern, block_size=4)
    for bounds_B in BATCHES:
        for block_size in (1, 2, 4, 8, 16):
            assert_block_mask(bounds_B, 13, pattern, block_size)


@pytest.mark.parametrize(
    "pattern", [S2Pattern(64, 5), S2Pattern(64, 40), S2Pattern(64, 3, "all"), WindowPattern(70), FULL], ids=str
)
def test_long_sequences_have_full_blocks(pattern: Pattern) -> None:
    bounds_B = [[0, 200], [0, 40, 150, 190]]
    full, could_be = assert_block_mask(bounds_B, 200, pattern, block_size=8)
    assert torch.equal(full, could_be)
    assert full.any(-1).any(-1).all()


def test_one_list_serves_all_heads_on_one_grid() -> None:
    for pattern in (S2Pattern(4, 1, "none"), S2Pattern(4, 1, "all"), S2Pattern(8, 1), WindowPattern(3), FULL):
        assert flex_plan([[0, 8]], 8, 4, 2, pattern, "cpu", block_size=4).block_mask.kv_indices.shape[:2] == (1, 1)
    two_grids = flex_plan([[0, 8]] * 2, 8, 4, 2, S2Pattern(4, 1), "cpu", block_size=4).block_mask
    assert two_grids.kv_indices.shape[:2] == (2, 4)
    assert two_grids.kv_indices.is_contiguous()


def test_work_and_lists_of_a_million_tokens() -> None:
    """Scores computed grow with tokens * group; the lists stay short because blocks grow with the sequence."""
    tokens, group = 2**20, 4096
    mask = flex_plan([[0, tokens]], tokens, 2, 1, S2Pattern(group, 4), "cpu").block_mask
    assert mask.BLOCK_SIZE == (1024, 1024)
    computed = (mask.kv_num_blocks + mask.full_kv_num_blocks).sum().item() * 1024**2
    assert computed < 2 * 1.01 * tokens * (group / 2 + 1024 + 1024)  # half a group, own block, block of the sinks
    assert all(x.numel() <= 2 * 1024**2 for x in (mask.kv_indices, mask.q_indices, mask.full_q_indices))


def qkv(B: int, H: int, K: int, T: int, D: int = 4, value_width: int | None = None) -> list[Tensor]:
    """As transformers makes them: [B, T, heads, D] in memory, seen as [B, heads, T, D]."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(H, D), (K, D), (K, value_width or D)]
    return [
        torch.randn(B, T, heads, width, generator=generator, dtype=torch.float64).transpose(1, 2)
        for heads, width in shapes
    ]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_kernel", torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def assert_same(inputs: list[Tensor], bounds_B: list[list[int]], pattern: Pattern, **options: Any) -> None:
    q, k, _ = inputs
    plan = flex_plan(bounds_B, q.shape[2], q.shape[1], k.shape[1], pattern, "cpu", block_size=4)
    ours = flex_s2_attention(*inputs, plan, **options)
    truth = reference_attention(*inputs, bounds_B, pattern, **options)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("length", range(1, 10))
def test_every_length(length: int, sinks: int) -> None:
    assert_same(qkv(1, 3, 1, length), [[0, length]], S2Pattern(4, sinks))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("pattern", [S2Pattern(4), S2Pattern(4, 3, "all"), WindowPattern(3), FULL], ids=str)
@pytest.mark.parametrize("bounds_B", BATCHES, ids=str)
def test_packed_and_padded_batches(bounds_B: list[list[int]], pattern: Pattern) -> None:
    assert_same(qkv(2, 4, 2, 13, D=4, value_width=6), bounds_B, pattern)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sink_logits_H", [None, torch.tensor([0.3, -1.0, 2.0, 40.0], dtype=torch.float64)])
def test_soft_cap_and_sink_logits(softcap: float | None, sink_logits_H: Tensor | None) -> None:
    inputs, bounds_B, pattern = qkv(2, 4, 2, 13), [[0, 5, 11], [0, 13]], S2Pattern(4, 1)
    options = {"softcap": softcap, "sink_logits_H": sink_logits_H, "scaling": 0.8}
    assert_same(inputs, bounds_B, pattern, **options)
    plan = flex_plan(bounds_B, 13, 4, 2, pattern, "cpu")
    changed = flex_s2_attention(*inputs, plan, **options)
    assert not torch.allclose(changed, flex_s2_attention(*inputs, plan))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
@pytest.mark.parametrize("pattern", [S2Pattern(256, 200), WindowPattern(300)], ids=str)
def test_compiled_for_the_cpu(monkeypatch: pytest.MonkeyPatch, pattern: Pattern) -> None:
    """Compiled kernels compute the listed blocks only; the uncompiled function asks `mask_mod` about all pairs."""
    inputs = [x.float() for x in qkv(2, 4, 2, 700, D=16)]
    plan = flex_plan([[0, 700], [0, 200, 590]], 700, 4, 2, pattern, "cpu")
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_kernel", torch_flex.flex_attention)
    eager = flex_s2_attention(*inputs, plan, softcap=2.0)
    monkeypatch.setattr(flex, "_kernel", lambda *tensors, **arguments: flex._compiled()(*tensors, **arguments))
    torch.testing.assert_close(flex_s2_attention(*inputs, plan, softcap=2.0), eager)


@pytest.mark.parametrize("pattern", [S2Pattern(4, 1), WindowPattern(3)], ids=str)
def test_gradients(monkeypatch: pytest.MonkeyPatch, uncompiled: None, pattern: Pattern) -> None:
    """The uncompiled backward exists on the CPU; only a check in front of it says otherwise."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    inputs = [x.requires_grad_() for x in qkv(2, 4, 2, 13)]
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    bounds_B = [[0, 5, 11], [0, 13]]
    plan = flex_plan(bounds_B, 13, 4, 2, pattern, "cpu", block_size=4)
    ours = flex_s2_attention(*inputs, plan, softcap=0.7, sink_logits_H=logits)
    truth = reference_attention(*inputs, bounds_B, pattern, softcap=0.7, sink_logits_H=logits)
    weight = torch.randn(truth.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    wanted = [*inputs, logits]
    pairs = zip(*(torch.autograd.grad((out * weight).sum(), wanted) for out in (ours, truth)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_autocast_decides_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
        dtypes.extend([q.dtype, k.dtype, v.dtype])
        return q, None

    monkeypatch.setattr(flex, "_kernel", kernel)
    plan = flex_plan([[0, 5]], 5, 2, 1, FULL, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flex_s2_attention(*[x.float() for x in qkv(1, 2, 1, 5)], plan)
    assert dtypes == [torch.bfloat16] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "backend flex needs a CUDA device, the tensors are on cpu: use backend=grouped"),
        ({"T": 6}, r"are \(1, 6, 2, 1\), planned were \(1, 5, 2, 1\): plan every batch"),
        ({"K": 2}, r"are \(1, 5, 2, 2\), planned were \(1, 5, 2, 1\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    plan = flex_plan([[0, 5]], 5, 2, 1, FULL, "cpu")
    with pytest.raises(ModelError, match=message):
        flex_s2_attention(*qkv(**({"B": 1, "H": 2, "K": 1, "T": 5} | change)), plan)


class OnCuda:
    """A tensor's looks on a GPU, for the checks in front of the kernel."""

    def __init__(self, width: int) -> None:
        self.device, self.shape = torch.device("cuda"), (1, 2, 5, width)


def test_small_head_dims_are_refused() -> None:
    tensors: list[Any] = [OnCuda(16), OnCuda(16), OnCuda(8)]
    with pytest.raises(ModelError, match="takes head dims from 16 on, the tensors have 8: use backend=grouped"):
        flex._kernel(*tensors)


def test_bad_bounds_are_refused() -> None:
    with pytest.raises(ModelError, match="document bounds"):
        flex_plan([[0, 9]], 8, 2, 1, FULL, "cpu")
