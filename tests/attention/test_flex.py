"""The flex backend on the CPU: its block mask against the reference's masks, its values and gradients too.

FlexAttention runs uncompiled here; the compiled kernel needs a GPU (test_backends_gpu.py).
"""

import itertools
import shutil
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from attention_cases import BATCHES, PATTERNS, TOKENS, all_layouts, assert_same, layout, qkv, seen_by_reference
from torch import Tensor
from torch._dynamo.utils import counters

from longlora.attention import flex
from longlora.attention.flex import flex_plan, flex_s2_attention
from longlora.attention.layout import Layout
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern
from longlora.attention.reference import reference_attention
from longlora.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")
COMPILED = flex._kernel  # the fixture `uncompiled` puts another function there


def blocks(counts: Tensor, indices: Tensor) -> Tensor:
    """bool [B, H, N, N] of lists; a block that is listed twice fails."""
    N = counts.shape[-1]
    dense = torch.zeros(*counts.shape, N, dtype=torch.int32)
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    dense.scatter_add_(-1, indices.long(), listed.int())
    assert dense.max() <= 1
    assert (indices[listed].reshape(-1) < N).all()
    return dense.bool()


def assert_block_mask(of: Layout, block_size: int) -> Tensor:
    """Returns which blocks are full and which could be, both [B, H, N, N]."""
    mask, expected, tokens = flex_plan(of, block_size=block_size).block_mask, seen_by_reference(of), of.tokens
    partial, full = blocks(mask.kv_num_blocks, mask.kv_indices), blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & full).any()
    for dense, counts, indices in (
        (partial, mask.q_num_blocks, mask.q_indices),
        (full, mask.full_q_num_blocks, mask.full_q_indices),
    ):
        assert torch.equal(blocks(counts, indices), dense.transpose(-1, -2))  # what the backward pass reads

    b, h = torch.arange(len(of.bounds_B))[:, None, None, None], torch.arange(of.query_heads)[:, None, None]
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
def test_masks_are_those_of_the_reference(pattern: Pattern) -> None:
    for of in all_layouts(pattern):
        for block_size in (4,) if len(of.bounds_B) == 1 else (1, 2, 4, 8, 16):
            assert_block_mask(of, block_size)


@pytest.mark.parametrize(
    "pattern", [S2Pattern(64, 5), S2Pattern(64, 40), S2Pattern(64, 3, "all"), WindowPattern(70), FULL], ids=str
)
def test_long_sequences_have_full_blocks(pattern: Pattern) -> None:
    full, could_be = assert_block_mask(layout([[0, 200], [0, 40, 150, 190]], 200, pattern), block_size=8)
    assert torch.equal(full, could_be)
    assert full.any(-1).any(-1).all()


def test_one_list_serves_all_heads_on_one_grid() -> None:
    for pattern in (S2Pattern(4, 1, "none"), S2Pattern(4, 1, "all"), S2Pattern(8, 1), WindowPattern(3), FULL):
        mask = flex_plan(layout([[0, 8]], 8, pattern, (4, 2)), block_size=4).block_mask
        assert mask.kv_indices.shape[:2] == (1, 1)
    two_grids = flex_plan(layout([[0, 8]] * 2, 8, S2Pattern(4, 1), (4, 2)), block_size=4).block_mask
    assert two_grids.kv_indices.shape[:2] == (2, 4)
    assert two_grids.kv_indices.is_contiguous()


def test_work_and_lists_of_a_million_tokens() -> None:
    """Scores computed grow with tokens * group; the lists stay short because blocks grow with the sequence."""
    tokens, group = 2**20, 4096
    mask = flex_plan(layout([[0, tokens]], tokens, S2Pattern(group, 4))).block_mask
    assert mask.BLOCK_SIZE == (1024, 1024)
    computed = (mask.kv_num_blocks + mask.full_kv_num_blocks).sum().item() * 1024**2
    assert computed < 2 * 1.01 * tokens * (group / 2 + 1024 + 1024)  # half a group, own block, block of the sinks
    assert all(x.numel() <= 2 * 1024**2 for x in (mask.kv_indices, mask.q_indices, mask.full_q_indices))


def assert_same_as_reference(inputs: list[Tensor], bounds_B: list[list[int]], pattern: Pattern, **options: Any) -> None:
    plan = flex_plan(Layout.of(*inputs[:2], bounds_B, pattern), block_size=4)
    ours = flex_s2_attention(*inputs, plan, **options)
    wanted = [*inputs, *[x for x in options.values() if isinstance(x, Tensor)]]
    assert_same(ours, reference_attention(*inputs, bounds_B, pattern, **options), wanted)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("length", range(1, 10))
def test_every_length(length: int, sinks: int) -> None:
    assert_same_as_reference(qkv(1, 3, 1, length), [[0, length]], S2Pattern(4, sinks))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("pattern", [S2Pattern(4), S2Pattern(4, 3, "all"), WindowPattern(3), FULL], ids=str)
@pytest.mark.parametrize("bounds_B", BATCHES[:-1], ids=str)
def test_packed_and_padded_batches(bounds_B: list[list[int]], pattern: Pattern) -> None:
    assert_same_as_reference(qkv(2, 4, 2, TOKENS, D=4, value_width=6), bounds_B, pattern)


@pytest.mark.usefixtures("uncompiled")
def test_a_batch_of_padding_only_gives_zeros() -> None:
    inputs = qkv(2, 2, 1, 5)
    out = flex_s2_attention(*inputs, flex_plan(layout([[0], [0]], 5, S2Pattern(4, 1))))
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("pattern", [S2Pattern(4, 1), WindowPattern(3)], ids=str)
@pytest.mark.parametrize("sink_logits", [None, [0.3, -1.0, 2.0, 40.0]])
def test_soft_cap_and_sink_logits(pattern: Pattern, softcap: float | None, sink_logits: list[float] | None) -> None:
    inputs, bounds_B = qkv(2, 4, 2, TOKENS), [[0, 5, 11], [0, 13]]
    logits = None if sink_logits is None else torch.tensor(sink_logits, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"softcap": softcap, "sink_logits_H": logits, "scaling": 0.8}
    assert_same_as_reference(inputs, bounds_B, pattern, **options)
    plan = flex_plan(layout(bounds_B, TOKENS, pattern, (4, 2)))
    assert not torch.allclose(flex_s2_attention(*inputs, plan, **options), flex_s2_attention(*inputs, plan))


def test_many_kinds_of_batches_in_one_run(monkeypatch: pytest.MonkeyPatch, uncompiled: None) -> None:
    """More than the 8 kernels after which torch's compiler gives up; here it only traces, and counts the same."""
    torch._dynamo.reset()
    compiled = torch.compile(torch_flex.flex_attention, fullgraph=True, backend="eager")
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(flex, "_kernel", COMPILED)
    before = counters["stats"]["unique_graphs"]
    for B, pattern, softcap in itertools.product((1, 2), (S2Pattern(4), S2Pattern(4, 1), FULL), (None, 0.7)):
        inputs, bounds_B = [x.detach() for x in qkv(B, 4, 2, 9)], [[0, 9]] * B
        ours = flex_s2_attention(*inputs, flex_plan(layout(bounds_B, 9, pattern, (4, 2))), softcap=softcap)
        truth = reference_attention(*inputs, bounds_B, pattern, softcap=softcap)
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    assert counters["stats"]["unique_graphs"] - before > 8


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
@pytest.mark.parametrize("pattern", [S2Pattern(256, 200), WindowPattern(300)], ids=str)
def test_compiled_for_the_cpu(monkeypatch: pytest.MonkeyPatch, pattern: Pattern) -> None:
    """Compiled kernels compute the listed blocks only; the uncompiled function asks `mask_mod` about all pairs."""
    inputs = [x.detach().float() for x in qkv(2, 4, 2, 700, D=16)]
    plan = flex_plan(layout([[0, 700], [0, 200, 590]], 700, pattern, (4, 2)))
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "_kernel", torch_flex.flex_attention)
    eager = flex_s2_attention(*inputs, plan, softcap=2.0)
    monkeypatch.setattr(flex, "_kernel", COMPILED)
    torch.testing.assert_close(flex_s2_attention(*inputs, plan, softcap=2.0), eager)


def test_autocast_decides_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
        dtypes.extend([q.dtype, k.dtype, v.dtype])
        return q, None

    monkeypatch.setattr(flex, "_kernel", kernel)
    plan = flex_plan(layout([[0, 5]], 5, FULL))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flex_s2_attention(*[x.float() for x in qkv(1, 2, 1, 5)], plan)
    assert dtypes == [torch.bfloat16] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": 6}, r"are \(1, 6, 2, 1\), planned were \(1, 5, 2, 1\): plan every batch"),
        ({"K": 2}, r"are \(1, 5, 2, 2\), planned were \(1, 5, 2, 1\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    plan = flex_plan(layout([[0, 5]], 5, FULL))
    with pytest.raises(ModelError, match=message):
        flex_s2_attention(*qkv(**({"B": 1, "H": 2, "K": 1, "T": 5} | change)), plan)
