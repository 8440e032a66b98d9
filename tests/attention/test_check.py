"""The self-check finds what it is for: every check fails on an attention that is broken in its way.

`broken` puts another function in the place of `attend`, below the seam to transformers, as a bug of ours would.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from rich.console import Console
from tiny import llama_config
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from longlora.attention import backends, check, check_gradients, registry
from longlora.attention.check import CheckResult, check_model, keeps_documents_apart
from longlora.attention.pattern import FULL
from longlora.attention.picture import draw_heads, head_weights
from longlora.attention.probing import (
    ProbeSettings,
    as_it_was,
    backends_in_training,
    routes_tokens,
    training_with,
    without_noise,
    worst_token,
)
from longlora.attention.registry import is_sparse, use_s2
from longlora.attention.rolled import rolled_attention
from longlora.cli import check as cli_check
from longlora.config import AttentionConfig
from longlora.errors import LongLoraError
from longlora.model import attention as model_attention
from longlora.model.check import check_full_phase, probe_settings

LEAK = "no token sees a later one"
OTHER_LEAK = "nor with other shifts and layers of full attention"
IN_EFFECT = "sparse attention is in effect"
LONG_GROUP = "a group as long as the sequence is full attention"
IS_FULL = "training is full attention"
PACKED = "packed documents do not see each other"
PADDED = "right padding changes nothing"
EVALUATION = "evaluation is full attention"
REACH = "gradients are finite and reach all layers"
RIGHT = "gradients are those of the loss"
IN_FLOAT32 = [LEAK, OTHER_LEAK, IN_EFFECT, LONG_GROUP, PACKED, PADDED, EVALUATION, REACH, RIGHT]
LEAK_16, PACKED_16, PADDED_16, REACH_16 = (f"in bfloat16 {name}" for name in (LEAK, PACKED, PADDED, REACH))
GRADIENTS_16 = "in bfloat16 gradients are those of the grouped backend"
LOGITS_16 = "in bfloat16 logits are as exact as with full attention"
IN_BFLOAT16 = [LEAK_16, PACKED_16, PADDED_16, REACH_16, GRADIENTS_16, LOGITS_16]

Attend = Callable[..., Tensor]


def failed(model: PreTrainedModel, settings: ProbeSettings | None = ProbeSettings()) -> set[str]:  # noqa: B008
    return {result.name for result in check_model(model, settings, bfloat16=True) if result.passed is False}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], None]:
    """Put ``function(attend, q, k, v, bounds_B, pattern, **options)`` in the place of `attend`."""
    attend = registry.attend

    def put(function: Callable[..., Tensor]) -> None:
        monkeypatch.setattr(
            registry, "attend", lambda q, k, v, bounds, pattern, **o: function(attend, q, k, v, bounds, pattern, **o)
        )

    return put


def architecture(model_type: str) -> PreTrainedModel:
    return next(each for each in ARCHITECTURES if each.model_type == model_type).build()


def test_everything_passes_on_a_good_model(tiny_llama: LlamaForCausalLM) -> None:
    results = list(check_model(tiny_llama, bfloat16=True))
    assert [result.name for result in results] == IN_FLOAT32 + IN_BFLOAT16
    assert all(result.passed for result in results), results


@pytest.mark.parametrize(
    "settings",
    [
        ProbeSettings(shift="layers"),
        ProbeSettings(shift="none", sink_tokens=0),
        ProbeSettings(full_attention_layers=(0,)),
        ProbeSettings(group_size=2, sink_tokens=1),
        ProbeSettings(sink_tokens=15),
        ProbeSettings(group_size=10, sink_tokens=0),
    ],
    ids=repr,
)
def test_the_settings_of_a_recipe_are_checked(tiny_llama: LlamaForCausalLM, settings: ProbeSettings) -> None:
    results = list(check_model(tiny_llama, settings))
    assert [result.name for result in results] == IN_FLOAT32
    assert all(result.passed for result in results), results


@pytest.mark.parametrize("layers", ["all", (0, 1)])
def test_without_groups_what_still_applies_is_checked(tiny_llama: LlamaForCausalLM, layers: Any) -> None:
    results = list(check_model(tiny_llama, ProbeSettings(full_attention_layers=layers)))
    assert [result.name for result in results] == [LEAK, IS_FULL, PACKED, PADDED, EVALUATION, REACH, RIGHT]
    assert all(result.passed for result in results), results


def test_a_models_own_attention_is_checked_where_s2_is_unsupported() -> None:
    bloom = architecture("bloom")
    results = {result.name: result.passed for result in check_model(bloom, None)}
    # transformers tells ALiBi nothing of packed documents.
    assert results == {LEAK: True, PACKED: False, PADDED: True, REACH: True, RIGHT: True}
    assert not keeps_documents_apart(bloom)


# What is broken, in which way.


def roll(attend: Attend, q: Tensor, k: Tensor, v: Tensor, bounds: Any, pattern: Any, **options: Any) -> Tensor:
    """The paper's Algorithm 1: the end of the row meets its beginning."""
    if pattern == FULL or pattern.shift != "half":
        return attend(q, k, v, bounds, pattern, **options)
    extra = -q.shape[2] % pattern.group_size
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, extra)) for x in (q, k, v))
    return rolled_attention(q, k, v, pattern.group_size, options["scaling"])[:, : q.shape[2] - extra]


def see_all(attend: Attend, q: Tensor, k: Tensor, v: Tensor, bounds: Any, pattern: Any, **options: Any) -> Tensor:
    """No causal mask."""
    scale = options["scaling"]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)


def leak_where_all_heads_shift(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, bounds: Any, pattern: Any, **options: Any
) -> Tensor:
    """Right in the paper's form, wrong in layers that are shifted as a whole."""
    if pattern.shift != "all":
        return attend(q, k, v, bounds, pattern, **options)
    return see_all(attend, q, k, v, bounds, pattern, **options)


def always_full(attend: Attend, q: Tensor, k: Tensor, v: Tensor, bounds: Any, pattern: Any, **options: Any) -> Tensor:
    return attend(q, k, v, bounds, FULL, **options)


def never_full(attend: Attend, q: Tensor, k: Tensor, v: Tensor, bounds: Any, pattern: Any, **options: Any) -> Tensor:
    return attend(q, k, v, bounds, replace(pattern, group_size=16, shift="half"), **options)


def smaller_groups(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, bounds: Any, pattern: Any, **options: Any
) -> Tensor:
    """A document no longer than a group is cut nevertheless."""
    small = pattern if pattern == FULL else replace(pattern, group_size=pattern.group_size // 2)
    return attend(q, k, v, bounds, small, **options)


def one_document(attend: Attend, q: Tensor, k: Tensor, v: Tensor, bounds: Any, pattern: Any, **options: Any) -> Tensor:
    return attend(q, k, v, [[0, row[-1]] for row in bounds], pattern, **options)


def no_padding(attend: Attend, q: Tensor, k: Tensor, v: Tensor, bounds: Any, pattern: Any, **options: Any) -> Tensor:
    whole = [[*row[:-1], q.shape[2]] for row in bounds]
    return attend(q, k, v, whole, pattern, **options)


def detached(attend: Attend, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    return attend(q, k, v.detach(), *args, **options)


class Backward(torch.autograd.Function):
    """The identity, with a gradient that `change` makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None


def nan_gradient(attend: Attend, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    return attend(Backward.apply(q, lambda grad: grad * torch.nan), k, v, *args, **options)


def larger_gradient(attend: Attend, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    return attend(q, k, Backward.apply(v, lambda grad: 1.1 * grad), *args, **options)


def no_gradient_of_sinks(attend: Attend, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    sinks = args[1].sink_tokens

    def drop(grad: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(grad[:, :, :sinks]), grad[:, :, sinks:]], dim=2)

    return attend(q, Backward.apply(k, drop), Backward.apply(v, drop), *args, **options)


def no_gradient_of_queries(attend: Attend, q: Tensor, *args: Any, **options: Any) -> Tensor:
    return attend(Backward.apply(q, lambda grad: 0.5 * grad), *args, **options)


def coarse(attend: Attend, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
    return attend(q, k, (v * 4).round() / 4, *args, **options)


def coarse_for_a_few_tokens(attend: Attend, *args: Any, **options: Any) -> Tensor:
    """Far fewer than a quarter, which a quantile would hide."""
    out = attend(*args, **options)
    return torch.cat([out[:, :-3], (out[:, -3:] * 2).round() / 2], dim=1)


def in_16_bits(function: Attend) -> Attend:
    """`function` only where float32 is not computed: what the checks in float32 can't see, such as varlen."""

    def attend_in_16_bits(attend: Attend, *args: Any, **options: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            return function(attend, *args, **options)
        return attend(*args, **options)

    return attend_in_16_bits


def of_the_backend(function: Attend) -> Attend:
    """`function` in every backend but `grouped`."""

    def attend_of_the_backend(attend: Attend, *args: Any, **options: Any) -> Tensor:
        if options["backend"] != "grouped":
            return function(attend, *args, **options)
        return attend(*args, **options)

    return attend_of_the_backend


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (roll, {LEAK, PACKED}),
        (see_all, {LEAK, OTHER_LEAK, LONG_GROUP, PACKED, PADDED}),
        (leak_where_all_heads_shift, {OTHER_LEAK}),
        (always_full, {IN_EFFECT}),
        (smaller_groups, {LONG_GROUP}),
        (one_document, {PACKED}),
        (no_padding, {PADDED}),
        (detached, {REACH, RIGHT}),
        (nan_gradient, {REACH, RIGHT}),
        (larger_gradient, {RIGHT}),
        (no_gradient_of_sinks, {RIGHT}),
        (no_gradient_of_queries, {RIGHT}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_broken_is_found(
    tiny_llama: LlamaForCausalLM, broken: Callable[..., None], function: Attend, found: set[str]
) -> None:
    """`found` fails; what else may fail with it is its consequence."""
    broken(function)
    assert found <= failed(tiny_llama)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (roll, {LEAK_16, PACKED_16}),
        (see_all, {LEAK_16, PACKED_16, PADDED_16}),
        (one_document, {PACKED_16}),
        (no_padding, {PADDED_16}),
        (detached, {REACH_16, GRADIENTS_16}),
        (nan_gradient, {REACH_16, GRADIENTS_16}),
        (larger_gradient, {GRADIENTS_16}),
        (no_gradient_of_sinks, {GRADIENTS_16}),
        (no_gradient_of_queries, {GRADIENTS_16}),
        (coarse, {LOGITS_16}),
        (coarse_for_a_few_tokens, {LOGITS_16}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_broken_in_bfloat16_alone_is_found(
    tiny_llama: LlamaForCausalLM, broken: Callable[..., None], function: Attend, found: set[str]
) -> None:
    """In all backends but `grouped`. The checks in float32 pass, and without these all would."""
    broken(of_the_backend(in_16_bits(function)))
    names = failed(tiny_llama)
    assert found <= names
    assert names <= set(IN_BFLOAT16)


def test_bfloat16_is_checked_with_the_backend_of_training(
    tiny_llama: LlamaForCausalLM, broken: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """varlen in bfloat16, what computes float32 else; on CUDA without being asked for."""
    asked: set[tuple[bool, str]] = set()

    def note(attend: Attend, *args: Any, backend: str, **options: Any) -> Tensor:
        asked.add((torch.is_autocast_enabled("cpu"), backend))
        return attend(*args, backend="grouped", **options)

    broken(note)
    monkeypatch.setattr(backends, "_obstacles", lambda *_: dict.fromkeys(["grouped", "varlen", "flex"], ""))
    results = list(check_model(tiny_llama, ProbeSettings(backend="varlen"), bfloat16=True))
    assert all(result.passed for result in results), results
    assert asked == {(False, "auto"), (True, "varlen"), (False, "grouped"), (True, "grouped")}
    monkeypatch.setattr(LlamaForCausalLM, "device", torch.device("cuda"))
    names = [name for name, _ in check._checks(tiny_llama, ProbeSettings(), tiny_llama.device.type == "cuda")]
    assert names[-len(IN_BFLOAT16) :] == IN_BFLOAT16


def test_one_token_counts_unless_tokens_are_routed() -> None:
    """Rounding may send a few tokens of a mixture of experts elsewhere."""
    error_T = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 9.0])
    assert worst_token(error_T, routed=False) == 9.0
    assert worst_token(error_T, routed=True) < 0.2
    routed = {name: routes_tokens(architecture(name)) for name in ("mixtral", "gpt_oss", "llama", "gemma2")}
    assert routed == {"mixtral": True, "gpt_oss": True, "llama": False, "gemma2": False}


def test_what_does_not_run_under_autocast_is_not_compared(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither passed nor failed. Memory that runs out is no such thing."""

    def clash(self: torch.nn.Module, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise error
        return x

    monkeypatch.setattr(type(tiny_llama.model.norm), "forward", clash)
    error = RuntimeError("self and source expected to have the same dtype, but got Float and BFloat16\nmore")
    results = {result.name: result for result in check_model(tiny_llama, bfloat16=True)}
    for name in IN_BFLOAT16:
        assert results[name].passed is None
        assert results[name].detail.startswith("not compared: the model itself does not run under autocast (self and")
        assert "more" not in results[name].detail
    assert all(results[name].passed for name in IN_FLOAT32)
    error = torch.OutOfMemoryError("CUDA out of memory with dtype bfloat16")
    with pytest.raises(torch.OutOfMemoryError):
        list(check_model(tiny_llama, bfloat16=True))


def test_gradients_that_the_model_leaves_out_are_not_compared() -> None:
    results = {result.name: result for result in check_model(architecture("hrm_text"))}
    assert results[RIGHT].passed is None
    assert results[RIGHT].detail.startswith("not compared: with full attention they differ")


def test_the_command_line_tells_not_compared_from_passed() -> None:
    out = Console(file=io.StringIO(), width=80)
    shown = [cli_check._show(out, CheckResult("name", passed, "why")) for passed in (True, False, None)]
    assert shown == [False, True, False]
    assert out.file.getvalue().splitlines() == ["ok   name: why", "FAIL name: why", "--   name: why"]


def test_training_that_is_not_full_is_found(tiny_llama: LlamaForCausalLM, broken: Callable[..., None]) -> None:
    broken(never_full)
    assert IS_FULL in failed(tiny_llama, ProbeSettings(full_attention_layers="all"))


def test_sparse_attention_in_evaluation_is_found(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "use_s2", lambda model, **s: use_s2(model, sparse_in_evaluation=True, **s))
    assert failed(tiny_llama) == {EVALUATION}


def test_a_pattern_that_acts_in_evaluation_alone_is_found(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What training does is what counts."""
    forward = registry.s2_attention_forward

    def full_in_training(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        if module.training and torch.is_grad_enabled() is False:
            groups = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return groups.transpose(1, 2), None
        return forward(module, q, k, v, *args, **options)

    monkeypatch.setattr(registry, "s2_attention_forward", full_in_training)
    assert IN_EFFECT in failed(tiny_llama)


def test_a_wrong_gradient_of_learned_sinks_is_found(broken: Callable[..., None]) -> None:
    """They are no weight matrix, and the embeddings do not feel them."""
    model = architecture("gpt_oss")
    assert RIGHT not in failed(model)

    def half(attend: Attend, *args: Any, sink_logits_H: Tensor, **options: Any) -> Tensor:
        own = Backward.apply(sink_logits_H, lambda grad: 0.2 * grad)
        return attend(*args, sink_logits_H=own, **options)

    broken(half)
    assert failed(model) == {RIGHT}


def test_an_error_is_a_failed_check_and_not_the_end(tiny_llama: LlamaForCausalLM, broken: Callable[..., None]) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise LongLoraError("no such thing")

    broken(refuse)
    results = {result.name: result for result in check_model(tiny_llama)}
    assert not results[LEAK].passed
    assert results[LEAK].detail == "no such thing"
    assert results[EVALUATION].passed


# What is left behind.


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=3, n_positions=256))
    model.train(training)
    model.transformer.h[0].eval()  # a mode of its own
    weight, other = list(model.parameters())[:2]
    weight.requires_grad_(False)
    other.grad = torch.ones_like(other)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    for _ in check_model(model):  # also between the checks
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    head_weights(model)
    assert keeps_documents_apart(model)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert torch.equal(other.grad, torch.ones_like(other))
    assert [parameter for parameter in model.parameters() if parameter.grad is not None] == [other]
    assert not is_sparse(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.attn_pdrop == 0.1
    assert model.transformer.h[0].attn.attn_dropout.p == 0.1


def test_dropout_and_its_kind_are_off_in_the_checks_alone() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=3, n_positions=256)).train()
    ids = torch.arange(40)[None]
    noisy = (model(ids).logits - model(ids).logits).abs().max()
    with without_noise(model):
        quiet = (model(ids).logits - model(ids).logits).abs().max()
    assert noisy > 0
    assert quiet == 0
    results = list(check_model(model))
    assert all(result.passed for result in results), results


def test_one_gradient_of_a_weight_is_held_at_a_time(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak memory is the weights and one gradient."""
    held: list[int] = []
    isfinite = torch.isfinite

    def count(tensor: Tensor) -> Tensor:
        held.append(sum(parameter.grad is not None for parameter in tiny_llama.parameters()))
        return isfinite(tensor)

    monkeypatch.setattr(check_gradients.torch, "isfinite", count)
    passed, _ = check_gradients.gradients_reach(tiny_llama, ProbeSettings())
    assert passed
    assert len(held) >= 15
    assert max(held) == 1


# The settings of a recipe.


def test_recipes_are_scaled_down_to_groups_of_some_tokens() -> None:
    def small(**attention: Any) -> ProbeSettings:
        return probe_settings(AttentionConfig(**attention), 4096)

    assert small() == ProbeSettings(16, 4, "heads", [], "auto")
    assert small(sink_tokens=64).sink_tokens == 4
    assert small(group_size=64, sink_tokens=63, shift="layers") == ProbeSettings(16, 15, "layers", [], "auto")
    assert small(group_size=64, sink_tokens=0).sink_tokens == 0
    assert small(group_size=8, sink_tokens=7, backend="grouped") == ProbeSettings(8, 7, "heads", [], "grouped")
    assert small(group_size=None, group_size_ratio=0.25, full_attention_layers=[1]).full_attention_layers == [1]
    assert small(pattern="full").full_attention_layers == "all"
    assert small(backend="varlen").for_float32().backend == "auto"
    assert small(backend="flex").for_float32().backend == "flex"


@pytest.mark.parametrize("changes", [{}, {"group_size": 8, "sink_tokens": 0}, {"shift": "layers"}])
def test_the_switch_to_full_attention_is_checked(tiny_llama: LlamaForCausalLM, changes: dict[str, Any]) -> None:
    tiny_llama.train()
    settings = AttentionConfig(full_attention_final_fraction=0.5, **changes)
    result = check_full_phase(tiny_llama, settings, 4096)
    assert result.passed, result
    assert tiny_llama.training
    assert not is_sparse(tiny_llama)


def test_a_switch_to_full_attention_that_does_nothing_is_found(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        model_attention, "use_s2", lambda model, **s: use_s2(model, **{**s, "full_attention_layers": ()})
    )
    assert not check_full_phase(tiny_llama, AttentionConfig(full_attention_final_fraction=0.5), 4096).passed


def test_a_switch_to_full_attention_that_stays_is_found(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run with more steps goes back to sparse attention."""
    asked: list[Any] = []

    def stay(model: PreTrainedModel, **settings: Any) -> None:
        asked.append(settings["full_attention_layers"])
        use_s2(model, **{**settings, "full_attention_layers": "all" if "all" in asked else ()})

    monkeypatch.setattr(model_attention, "use_s2", stay)
    assert not check_full_phase(tiny_llama, AttentionConfig(full_attention_final_fraction=0.5), 4096).passed


def test_the_backend_named_is_the_one_for_what_reaches_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from longlora.attention import probing

    asked: list[dict[str, Any]] = []

    def record(wanted: str, device: torch.device, dtype: torch.dtype, **needs: Any) -> str:
        asked.append({"wanted": wanted, "dtype": dtype, **needs})
        return "grouped"

    monkeypatch.setattr(probing, "choose_backend", record)

    def needs(model: PreTrainedModel) -> dict[str, Any]:
        asked.clear()
        assert backends_in_training(model, ProbeSettings(backend="varlen"), torch.bfloat16) == ["grouped"]
        assert {(each["wanted"], each["dtype"]) for each in asked} == {("varlen", torch.bfloat16)}
        return asked[-1]

    plain = {"wanted": "varlen", "dtype": torch.bfloat16, "head_dims": (8, 8)}
    nothing = {"dropout": False, "softcap": False, "learned_sinks": False}
    assert needs(LlamaForCausalLM(llama_config())) == {**plain, **nothing}
    assert needs(LlamaForCausalLM(llama_config(attention_dropout=0.1))) == {**plain, **nothing, "dropout": True}
    assert needs(architecture("gemma2")) == {**plain, **nothing, "softcap": True}
    assert needs(architecture("gpt_oss")) == {**plain, **nothing, "learned_sinks": True}


# The picture.


def test_the_picture_follows_the_settings_and_marks_leaks(
    tiny_llama: LlamaForCausalLM, broken: Callable[..., None]
) -> None:
    heads = head_weights(tiny_llama, ProbeSettings(group_size=8, sink_tokens=1, shift="layers"))
    assert [head.title for head in heads] == ["layer 0, head 0: groups", "layer 1, head 0: shifted groups"]
    assert heads[0].documents == (29, 14)
    assert heads[0].weights_TT[10].nonzero().flatten().tolist() == [0, 8, 9, 10]
    full = head_weights(tiny_llama, ProbeSettings(full_attention_layers="all"))
    assert [head.title for head in full] == ["layer 0, head 0: full attention"]
    assert draw_heads(full).startswith(b"\x89PNG")
    broken(see_all)
    (leaking, *_) = head_weights(tiny_llama)
    assert (leaking.weights_TT.triu(1) > 0).any()
    assert draw_heads([leaking]).startswith(b"\x89PNG")


def test_probing_nests(tiny_llama: LlamaForCausalLM) -> None:
    with as_it_was(tiny_llama), training_with(tiny_llama, ProbeSettings()):
        assert is_sparse(tiny_llama)
    assert not is_sparse(tiny_llama)
    assert not tiny_llama.training
