"""The choice of a backend by what the card can do; plans shared and kept apart; a model by emulated flash kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import assert_same, dense_attention, layout, qkv
from torch import Tensor
from transformers import LlamaForCausalLM

import longlora
from longlora.attention import backends, flex, varlen
from longlora.attention.backends import Plans, attend, choose_backend
from longlora.attention.pattern import FULL, S2Pattern, WindowPattern
from longlora.attention.reference import reference_attention
from longlora.attention.varlen import varlen_plan
from longlora.errors import ModelError

CUDA = torch.device("cuda", 0)
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a card into this machine, by its compute capability, or an AMD one."""

    def put(major: int, minor: int, rocm: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.version, "hip", rocm)

    return put


@pytest.mark.parametrize(
    ("capability", "needs", "chosen"),
    [
        ((7, 0), {}, "grouped"),
        ((7, 5), {}, "grouped"),
        ((7, 5), {"softcap": True}, "grouped"),
        ((8, 0), {}, "varlen"),
        ((8, 0), {"softcap": True}, "flex"),
        ((8, 9), {}, "varlen"),
        ((9, 0), {"head_dims": (200, 200)}, "varlen"),
        ((12, 0), {"head_dims": (200, 200)}, "grouped"),  # neither flash kernels nor flex have a backward
        ((12, 0), {"head_dims": (256, 256)}, "varlen"),
        ((9, 0), {"head_dims": (256, 256), "softcap": True}, "flex"),  # Gemma 2
        ((8, 9), {"head_dims": (256, 256), "softcap": True}, "grouped"),
        ((8, 9), {"head_dims": (128, 128), "softcap": True}, "flex"),
    ],
)
def test_auto_looks_at_the_card(card: Any, capability: tuple[int, int], needs: dict[str, Any], chosen: str) -> None:
    card(*capability)
    for dtype in (BF16, FP16):
        assert choose_backend("auto", CUDA, dtype, **needs) == chosen
    assert choose_backend("auto", torch.device("cpu"), BF16, **needs) == "grouped"


def test_rocm_has_flex_alone(card: Any) -> None:
    card(9, 4, rocm="6.4")  # an MI300X, whose number says nothing about a CUDA card
    assert choose_backend("auto", CUDA, BF16) == "flex"
    with pytest.raises(
        ModelError, match="backend=varlen needs an NVIDIA card, torch's kernel for ROCm has other masks"
    ):
        choose_backend("varlen", CUDA, BF16)


@pytest.mark.parametrize(
    ("backend", "capability", "head_dims", "message"),
    [
        (
            "varlen",
            (7, 5),
            None,
            "varlen needs compute capability 8.0, and this is float16 on cuda of compute cap.* 7.5:",
        ),
        ("flex", (7, 0), None, "flex needs compute capability 8.0, .* 7.0: set the backend to grouped or auto"),
        (
            "flex",
            (8, 6),
            (256, 256),
            "flex takes head dims up to 128 on this card, not 256, .* compute capability 8.6:",
        ),
        ("flex", (9, 0), (16, 8), "flex takes head dims from 16 on, not 8, .* set the backend to grouped or auto"),
        ("varlen", (8, 6), (208, 208), "varlen has no backward for head dim 208 on this card, .* 8.6:"),
        ("varlen", (9, 0), (128, 264), "varlen takes head dims up to 256, not 264, .* set the backend to grouped"),
    ],
)
def test_a_demand_that_the_card_cannot_meet_is_one_line(
    card: Any, backend: Any, capability: tuple[int, int], head_dims: tuple[int, int] | None, message: str
) -> None:
    card(*capability)
    with pytest.raises(ModelError, match=message) as caught:
        choose_backend(backend, CUDA, FP16, head_dims=head_dims)
    assert "\n" not in str(caught.value)


class OnCuda:
    """A tensor's looks on a GPU, for the checks in front of the kernels."""

    device = CUDA

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        self.dtype, self.shape = dtype, (1, 2, 5, width)


@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_tensors_that_a_backend_does_not_take_are_refused_before_it_plans(card: Any, backend: Any) -> None:
    """The backends themselves know no such limits."""
    card(9, 0)

    def refusal(*tensors: Any, **options: Any) -> str:
        with pytest.raises(ModelError) as caught:
            attend(*tensors, [[0, 5]], FULL, backend=backend, **options)
        return str(caught.value)

    start = f"backend={backend} "
    assert refusal(*qkv(1, 2, 1, 5)).startswith(f"{start}needs a CUDA device, and this is float64 on cpu:")
    inputs: list[Any] = [OnCuda(BF16, 16)] * 3
    assert refusal(*inputs, dropout=0.1).startswith(f"{start}has no attention dropout, and this is bfloat16 on cuda")
    if backend == "flex":
        narrow: Any = OnCuda(BF16, 8)
        assert refusal(*inputs[:2], narrow).startswith(f"{start}takes head dims from 16 on, not 8,")
        return
    wide: Any = OnCuda(BF16, 264)
    assert refusal(*[wide] * 3).startswith(f"{start}takes head dims up to 256, not 264,")
    exact: Any = OnCuda(torch.float32, 16)
    assert refusal(*[exact] * 3).startswith(f"{start}needs bfloat16 or float16, and this is float32 on cuda")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layouts for which plans are made."""
    layouts: list[Any] = []

    def noting(make: Callable[..., Any]) -> Callable[..., Any]:
        def plan(of: Any, *more: Any) -> Any:
            layouts.append(of)
            return make(of, *more)

        return plan

    monkeypatch.setattr(varlen, "varlen_plan", noting(varlen.varlen_plan))
    monkeypatch.setattr(flex, "flex_plan", noting(flex.flex_plan))
    return layouts


PATTERNS = [FULL, S2Pattern(4, 1), S2Pattern(4, 1, "all"), S2Pattern(4, 1, "none"), S2Pattern(4), WindowPattern(3)]
BATCHES = [[[0, 5, 11], [0, 13]], [[0, 13], [0, 5, 11]], [[0, 5, 12], [0, 13]]]


@pytest.mark.usefixtures("emulated", "uncompiled", "one_thread")
@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_layers_share_a_plan_where_all_of_it_is_the_same(
    monkeypatch: pytest.MonkeyPatch, made: list[Any], backend: Any
) -> None:
    """Also over batches: not even one `Plans` for all of them gives a layer the plan of another batch."""
    monkeypatch.setattr(backends, "_obstacles", lambda *_: dict.fromkeys(["grouped", "varlen", "flex"], ""))
    plans, layers = Plans(), [(heads, pattern) for heads in ((4, 2), (4, 4), (2, 2)) for pattern in PATTERNS]
    for bounds_B in BATCHES:
        for (H, K), pattern in layers * 2:
            inputs = qkv(2, H, K, 13)
            ours = attend(*inputs, bounds_B, pattern, backend=backend, plans=plans)
            truth = reference_attention(*inputs, bounds_B, pattern)
            torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    assert len(made) == len(set(made)) == len(BATCHES) * len(layers)


def test_plans_of_two_devices_are_kept_apart() -> None:
    plans = Plans()
    for device in ("cpu", "meta", "cpu"):
        plan = plans.get(varlen_plan, layout([[0, 9]], 9, S2Pattern(4, 1), device=device), None)
        assert {index.cu_seqlens_q.device.type for _, index in plan.calls} == {device}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kernel", ["sdpa", "flash_attention_2", "kernels-community/vllm-flash-attn3"])
def test_a_model_trains_with_the_kernel_of_its_full_attention(
    monkeypatch: pytest.MonkeyPatch, emulated: list[Any], made: list[Any], tiny_llama: LlamaForCausalLM, kernel: str
) -> None:
    """Two batches, packed otherwise each: loss and gradients are those of the grouped backend, one plan a batch."""
    ids = torch.randint(128, (1, 40), generator=torch.Generator().manual_seed(1))
    batches = [torch.cat([torch.arange(length) for length in lengths])[None] for lengths in ([25, 15], [9, 31])]
    settings = {"group_size": 8, "sink_tokens": 2}

    def losses_and_gradients() -> list[Tensor]:
        results = []
        for position_ids in batches:
            tiny_llama.zero_grad()
            loss = tiny_llama(ids, position_ids=position_ids, labels=ids).loss
            loss.backward()
            results += [loss.detach(), *[weight.grad.clone() for weight in tiny_llama.parameters()]]
        return results

    vars(tiny_llama.config)["_attn_implementation_internal"] = kernel  # as if it had been loaded so
    longlora.use_s2(tiny_llama.double().train(), **settings, backend="grouped")
    expected = losses_and_gradients()
    assert emulated == made == []
    monkeypatch.setattr(backends, "_obstacles", lambda *_: dict.fromkeys(["grouped", "varlen", "flex"], ""))
    longlora.use_s2(tiny_llama, **settings, backend="varlen")
    for ours, theirs in zip(losses_and_gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    calls = [("torch" if kernel == "sdpa" else kernel, *heads) for heads in ((3, 1), (2, 1), (1, 1), (3, 1))]
    assert emulated == calls * 2 * len(batches)  # in both layers
    assert len(made) == len(batches)


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 0.7, "sink_logits_H": torch.tensor([0.3, -1.0, 2.0, 40.0]).double()}]
)
def test_the_formula_of_the_gpu_tests_is_the_reference(options: dict[str, Any]) -> None:
    inputs, bounds_B = qkv(2, 4, 2, 13), [[0, 5, 6, 13], [0, 9]]
    for pattern in (S2Pattern(4, 3), S2Pattern(4, 1, "all"), WindowPattern(3), FULL):
        truth = reference_attention(*inputs, bounds_B, pattern, **options)
        assert_same(dense_attention(*inputs, layout(bounds_B, 13, pattern, (4, 2)), **options), truth, inputs)
