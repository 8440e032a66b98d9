"""The CUDA backends on a GPU: values and all gradients against a dense formula in float64, memory, a model's step.

UNVERIFIED ON HARDWARE: written on a machine without a GPU, where all of these tests are skipped; they have never run.
Run with ``pytest -m gpu tests/attention/test_backends_gpu.py``, from the root of the repository.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from attention_cases import dense_attention, layout
from tiny import llama_config
from torch import Tensor
from transformers import LlamaForCausalLM

import longlora
from longlora.attention.backends import attend
from longlora.attention.flex import flex_plan, flex_s2_attention
from longlora.attention.grouped import grouped_attention
from longlora.attention.layout import Layout
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern
from longlora.attention.varlen import varlen_attention, varlen_plan
from longlora.errors import ModelError

CARD = torch.cuda.get_device_capability() if torch.cuda.is_available() and torch.version.hip is None else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CARD < (8, 0), reason="needs an NVIDIA GPU of compute capability 8.0 or more"),
]
EPS = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
EPS_GROUPED = {**EPS, torch.float32: 1e-3}


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    """Every case is a new shape to the compiler, which gives up after eight of them."""
    torch._dynamo.reset()


@dataclass(frozen=True)
class Case:
    """One batch; bounds and head dims as in a model, sizes small enough for T x T scores."""

    pattern: Pattern
    bounds_B: tuple[tuple[int, ...], ...]
    tokens: int
    query_heads: int = 4
    kv_heads: int = 2
    width: int = 64
    value_width: int = 64
    softcap: float | None = None
    sink_logits: bool = False

    @property
    def layout(self) -> Layout:
        return layout(self.bounds_B, self.tokens, self.pattern, (self.query_heads, self.kv_heads), "cuda")

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and, where asked for, sink logits on the CPU, [B, T, heads, D] in memory."""
        generator = torch.Generator().manual_seed(0)
        B, T, H, K = len(self.bounds_B), self.tokens, self.query_heads, self.kv_heads
        shapes = [(B, T, H, self.width), (B, T, K, self.width), (B, T, K, self.value_width)]
        made = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
        if self.sink_logits:
            made.append(torch.linspace(-1, 2, H))
        return [x.to(dtype).requires_grad_() for x in made]


def with_gradients(inputs: list[Tensor], attention: Callable[..., Tensor], **options: Any) -> list[Tensor]:
    """Output and the gradient of every input, on the CPU in float64."""
    if len(inputs) == 4:
        options["sink_logits_H"] = inputs[3]
    out = attention(*inputs[:3], **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [x.detach().cpu().double() for x in (out, *torch.autograd.grad((out * weight).sum(), inputs))]


@cache
def by_formula(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The truth in float64 for inputs rounded to `dtype`, and the naive formula in `dtype`."""

    def formula(*inputs: Tensor, **options: Any) -> Tensor:
        return dense_attention(*inputs, case.layout, softcap=case.softcap, **options)

    inputs = case.inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    return with_gradients(exact, formula), with_gradients(inputs, formula)


def assert_no_worse(case: Case, dtype: torch.dtype, attention: Callable[..., Tensor], **options: Any) -> None:
    """Distance from float64, allowed as much as the naive formula in the same dtype has."""
    truth, naive = by_formula(case, dtype)
    inputs = [x.detach().cuda().requires_grad_() for x in case.inputs(dtype)]
    ours = with_gradients(inputs, attention, **options)
    largest = max(x.abs().max() for x in truth)
    for name, one, plain, right in zip(["out", "dq", "dk", "dv", "dsinks"], ours, naive, truth, strict=False):
        assert one.isfinite().all(), name
        # A query with one key has a gradient of exactly 0, which the naive formula finds and fused ones round.
        scale = right.abs().max() if right.any() else largest
        allowed = (plain - right).abs().max() + EPS_GROUPED[dtype] * scale
        assert (one - right).abs().max() <= allowed, name


def varlen(case: Case, full_attention: str | None = None) -> Callable[..., Tensor]:
    plan = varlen_plan(case.layout, full_attention)
    return lambda q, k, v: varlen_attention(q, k, v, plan)


def flex(case: Case) -> Callable[..., Tensor]:
    plan = flex_plan(case.layout)
    return lambda q, k, v, **options: flex_s2_attention(q, k, v, plan, softcap=case.softcap, **options)


def grouped(case: Case) -> Callable[..., Tensor]:
    bounds_B = case.bounds_B
    return lambda q, k, v, **options: grouped_attention(
        q, k, v, bounds_B, case.pattern, softcap=case.softcap, **options
    )


PACKED = ((0, 130, 131, 301), (0, 301))
PADDED = ((0, 40, 290), (0, 301))
CASES = [
    Case(S2Pattern(64), ((0, 257),), 257),
    Case(S2Pattern(64, 4), ((0, 257),), 257),
    Case(S2Pattern(64, 40), ((0, 300),), 300),  # more sinks than the first half group holds
    Case(S2Pattern(64, 4), PACKED, 301),
    Case(S2Pattern(64, 4), PADDED, 301),
    Case(S2Pattern(64, 0), ((0, 40, 290), (0,)), 301),  # a row of padding
    Case(S2Pattern(64, 4, "all"), PADDED, 301),
    Case(S2Pattern(64, 4, "none"), PACKED, 301),
    Case(S2Pattern(64, 4), ((0, 150),), 150, query_heads=9, kv_heads=3),  # the border cuts a key head
    Case(S2Pattern(64, 4), ((0, 150),), 150, query_heads=4, kv_heads=4),
    Case(S2Pattern(64, 4), ((0, 150),), 150, query_heads=4, kv_heads=1),
    Case(S2Pattern(64, 4), PADDED, 301, width=128, value_width=128),
    Case(S2Pattern(64, 4), ((0, 150),), 150, width=80, value_width=48),
    Case(S2Pattern(64, 4), ((0, 150),), 150, width=36, value_width=36),  # not a multiple of 8
    Case(S2Pattern(512), ((0, 128),), 128),
    Case(WindowPattern(50), PACKED, 301),
    Case(WindowPattern(1), PADDED, 301),
    Case(FULL, PADDED, 301),
    Case(S2Pattern(64, 4), ((0, 1, 3, 6, 150), (0, 1)), 150),  # documents of one token, and shorter than the sinks
]
FLEX_CASES = [
    *CASES,
    Case(S2Pattern(64, 4), PADDED, 301, softcap=2.0),
    Case(S2Pattern(64, 4), PADDED, 301, softcap=5.0),
    Case(S2Pattern(64, 4), PADDED, 301, sink_logits=True),
    Case(WindowPattern(50), PACKED, 301, softcap=2.0, sink_logits=True),
]


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_varlen(case: Case, dtype: torch.dtype) -> None:
    assert_no_worse(case, dtype, varlen(case))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the flash-attn package")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_varlen_with_the_flash_attn_package(case: Case) -> None:
    assert_no_worse(case, torch.bfloat16, varlen(case, "flash_attention_2"))


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("case", FLEX_CASES, ids=str)
def test_flex(case: Case, dtype: torch.dtype) -> None:
    assert_no_worse(case, dtype, flex(case))


@pytest.mark.parametrize("dtype", EPS_GROUPED, ids=str)
@pytest.mark.parametrize("case", FLEX_CASES, ids=str)
def test_grouped(case: Case, dtype: torch.dtype) -> None:
    assert_no_worse(case, dtype, grouped(case))


@pytest.mark.parametrize("make", [varlen, flex, grouped])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 96, 97, 127, 128, 129])
def test_odd_lengths(make: Callable[[Case], Callable[..., Tensor]], length: int) -> None:
    case = Case(S2Pattern(64, 4), ((0, length),), length, query_heads=3, kv_heads=1)
    assert_no_worse(case, torch.bfloat16, make(case))


@pytest.mark.parametrize("make", [varlen, flex, grouped])
def test_one_plan_serves_many_layers(make: Callable[[Case], Callable[..., Tensor]]) -> None:
    case = CASES[4]
    attention = make(case)
    q, k, v = (x.detach().cuda() for x in case.inputs(torch.bfloat16))
    assert torch.equal(attention(q, k, v), attention(q, k, v))
    assert not torch.equal(attention(q, k, v), attention(q + 1, k, v))


@pytest.mark.parametrize("make", [varlen, flex, grouped])
def test_float32_under_autocast(make: Callable[[Case], Callable[..., Tensor]]) -> None:
    case = CASES[4]
    attention = make(case)
    q, k, v = (x.detach().cuda() for x in case.inputs(torch.bfloat16))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = attention(q.float(), k.float(), v.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, attention(q, k, v))


def test_varlen_refuses_float32() -> None:
    case = CASES[0]
    with pytest.raises(ModelError, match="varlen needs bfloat16 or float16, and this is float32 on cuda"):
        attend(*[x.detach().cuda() for x in case.inputs(torch.float32)], case.bounds_B, case.pattern, backend="varlen")


def peak(
    make: Callable[[Case], Callable[..., Tensor]], pattern: Pattern, tokens: int, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Of forward and backward, in units of the queries."""
    case = Case(pattern, ((0, tokens),), tokens)
    attention = make(case)
    inputs = [x.detach().cuda().requires_grad_() for x in case.inputs(dtype)]
    attention(*inputs).sum().backward()  # compiles where it has to
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(*inputs).sum().backward()
    return (torch.cuda.max_memory_allocated() - before) / inputs[0].nbytes


@pytest.mark.parametrize("make", [varlen, flex, grouped])
@pytest.mark.parametrize("pattern", [S2Pattern(1024, 4), WindowPattern(1024)], ids=str)
def test_memory_grows_linearly_with_the_sequence(
    make: Callable[[Case], Callable[..., Tensor]], pattern: Pattern
) -> None:
    """4 times the tokens, 4 times the bytes; a T x T mask would take 16 times."""
    assert peak(make, pattern, 32768) < 1.1 * peak(make, pattern, 8192)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", [S2Pattern(1024, 4), WindowPattern(1024)], ids=str)
def test_grouped_keeps_no_scores(pattern: Pattern, dtype: torch.dtype) -> None:
    """Scores in groups of 1024 are 16 units, and the formula keeps several tensors of them.

    Without them forward and backward take about 11 units on the CPU (test_grouped_memory.py).
    """
    assert peak(grouped, pattern, 8192, dtype) < 20


def loss_and_gradient(backend: str, dtype: torch.dtype, device: str = "cuda") -> tuple[float, Tensor]:
    """Of one packed batch and a small model in training."""
    torch.manual_seed(0)
    config = llama_config(hidden_size=576, head_dim=64, max_position_embeddings=1024, initializer_range=0.02)
    model = LlamaForCausalLM(config).to(device, dtype).train()
    longlora.use_s2(model, group_size=64, sink_tokens=4, backend=backend)
    ids = torch.randint(128, (2, 600), generator=torch.Generator().manual_seed(1)).to(device)
    position_ids = torch.cat([torch.arange(n) for n in (250, 1, 349)]).expand(2, 600).to(device)
    loss = model(ids, position_ids=position_ids, labels=ids).loss
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten().double() for weight in model.parameters()])


@pytest.mark.parametrize("backend", ["varlen", "flex", "auto"])
def test_a_model_s_gradients(backend: str) -> None:
    """No further from float32 than those of the grouped backend in the same dtype, and a bit."""
    loss, truth = loss_and_gradient("grouped", torch.float32)
    _, plain = loss_and_gradient("grouped", torch.bfloat16)
    our_loss, ours = loss_and_gradient(backend, torch.bfloat16)
    assert our_loss == pytest.approx(loss, rel=1e-2)
    assert (ours - truth).norm() <= 1.2 * (plain - truth).norm() + 1e-2 * truth.norm()
