"""Tiled MLPs against the same MLPs in one piece: loss, every gradient, how often they are computed, and memory."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import llama_config
from torch import nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from longlora.config import AdapterConfig
from longlora.errors import LongLoraError
from longlora.memory.tiled_mlp import tile_mlps
from longlora.model.adapters import add_adapter
from longlora.model.head import mixed_precision

IDS = torch.randint(128, (2, 21), generator=torch.Generator().manual_seed(1))


def tiny(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**changes))


def gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(loss, list(trained.values()))
    return loss, dict(zip(trained, grads, strict=True))


def assert_same(
    one: tuple[torch.Tensor, dict[str, torch.Tensor]], other: tuple[torch.Tensor, dict[str, torch.Tensor]], **tolerance
) -> None:
    torch.testing.assert_close(one[0], other[0], **tolerance)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        torch.testing.assert_close(grad, other[1][name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("tile", [1, 5, 21, 41, 42, 100])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_every_gradient_of_a_model_trained_in_full(tile: int, checkpointing: bool) -> None:
    whole = tiny().double().train()
    tiled = copy.deepcopy(whole)
    assert tile_mlps(tiled, tile) == 2
    if checkpointing:
        tiled.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(gradients(tiled), gradients(whole), rtol=1e-10, atol=1e-12)


def adapted(**settings: object) -> nn.Module:
    """LoRA in the MLPs too, an MLP projection trained in full, and values that are not the initial zeros."""
    model = add_adapter(tiny().to(torch.bfloat16), AdapterConfig(target_modules="all-linear", **settings)).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_inside_the_mlp_in_mixed_precision(checkpointing: bool) -> None:
    whole = adapted()
    tiled = copy.deepcopy(whole)
    with mixed_precision(tiled):
        tile_mlps(tiled.get_base_model(), 6)
    if checkpointing:
        tiled.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    results = []
    for model in (tiled, whole):
        with mixed_precision(model):
            results.append(gradients(model))
    assert any("mlp.up_proj.lora_A" in name for name in results[0][1])
    loss, grads = results[0]
    torch.testing.assert_close(loss, results[1][0], rtol=1e-2, atol=1e-2)
    for name, grad in results[1][1].items():
        difference = (grads[name] - grad).norm() / grad.norm()
        assert grad.norm() > 0
        assert difference < 0.03, f"{name}: {difference}"


def test_backward_inside_autocast() -> None:
    """A weight that was cast without a gradient in the forward pass must not be found again in the backward pass."""
    model = adapted()
    with mixed_precision(model):
        outside = copy.deepcopy(model)
        for each in (model, outside):
            tile_mlps(each.get_base_model(), 6)
        loss, inside = gradients(model)
        assert all(grad.abs().max() > 0 for grad in inside.values())
    with mixed_precision(outside):
        total = outside(input_ids=IDS, labels=IDS, use_cache=False).loss
    total.backward()
    torch.testing.assert_close(loss, total)
    for name, parameter in outside.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, inside[name], rtol=1e-2, atol=1e-3, msg=name)


def test_an_mlp_weight_trained_in_full_through_peft() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "up_proj"], modules_to_save=["down_proj"], init_lora_weights=False)
    whole = get_peft_model(tiny().double(), config, autocast_adapter_dtype=False).train()
    tiled = copy.deepcopy(whole)
    tile_mlps(tiled.get_base_model(), 4)
    expected = gradients(whole)
    assert any("down_proj.modules_to_save" in name for name in expected[1])
    assert_same(gradients(tiled), expected, rtol=1e-10, atol=1e-12)


def test_dropout_draws_the_same_numbers_in_the_backward_pass() -> None:
    """By finite differences: with other numbers the gradient would belong to another function."""
    model = tiny(num_hidden_layers=1).double().train()
    mlp = model.model.layers[0].mlp
    mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    tile_mlps(model, 5)
    hidden = torch.randn(1, 13, 72, dtype=torch.float64, requires_grad=True)

    def seeded(values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return mlp(values).sum()

    value = seeded(hidden)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    (grad,) = torch.autograd.grad(value, hidden)
    assert torch.equal(torch.get_rng_state(), before)
    step = torch.zeros_like(hidden)
    step[0, 7, 3] = 1e-6
    numeric = (seeded(hidden + step) - seeded(hidden - step)) / 2e-6
    torch.testing.assert_close(grad[0, 7, 3], numeric.detach(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_tile_is_computed_twice_also_under_checkpointing(checkpointing: bool) -> None:
    model = tiny().train()
    tile_mlps(model, 21)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    calls = []
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda _m, args, _out: calls.append(args[0].shape[1]))
    gradients(model)
    assert calls == [21] * 2 * 2 * 2, "two layers, two tiles, forward and backward"


def test_the_widest_activation_of_the_whole_sequence_never_exists() -> None:
    T, C, wide, tile = 512, 16, 1024, 32
    model = tiny(hidden_size=C, intermediate_size=wide, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    model.train()

    def largest(work: Callable[[], object]) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            work()
        return max(event.self_cpu_memory_usage for event in profile.events())

    mlp = model.model.layers[0].mlp.requires_grad_(False)
    hidden = torch.randn(1, T, C, requires_grad=True)
    whole = largest(lambda: mlp(hidden).sum().backward())
    tile_mlps(model, tile)
    tiled = largest(lambda: mlp(hidden).sum().backward())
    assert whole >= T * wide * 4
    assert tiled < 2 * tile * wide * 4


def test_evaluation_is_tiled_too_and_gives_the_same() -> None:
    model = tiny().eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        tile_mlps(model, 5)
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
        assert model(input_ids=IDS[:, :1]).logits.shape[1] == 1


def test_a_copy_of_the_model_computes_with_its_own_weights() -> None:
    model = tiny().train()
    tile_mlps(model, 5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.zero_()
    assert not torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


class Mixing(nn.Module):
    """An MLP that looks at the whole sequence."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden) + hidden.cumsum(1)


class Pair(Mixing):
    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mlp(hidden), hidden


class Narrow(Mixing):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden)[..., :1]


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def opt() -> OPTForCausalLM:
    return OPTForCausalLM(
        OPTConfig(vocab_size=128, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
    )


def with_mlp(wrap: type[nn.Module]) -> LlamaForCausalLM:
    model = tiny()
    model.model.layers[1].mlp = wrap(model.model.layers[1].mlp)
    return model


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (mixtral, r"model.layers.0.\w+ \(Mixtral\w+\) is a mixture of experts"),
        (opt, r"decoder.layers.0 \(OPTDecoderLayer\) has no MLP module of its own"),
        (lambda: with_mlp(Mixing), r"model.layers.1.mlp \(Mixing\) does not treat each token by itself"),
    ],
)
def test_what_is_refused_by_name(build: Callable[[], nn.Module], expected: str) -> None:
    with pytest.raises(LongLoraError, match=rf"train.mlp_tile_tokens.*{expected}.*leave it out"):
        tile_mlps(build(), 5)


@pytest.mark.parametrize("wrap", [Pair, Narrow])
def test_an_output_of_another_kind_is_refused(wrap: type[nn.Module]) -> None:
    from longlora.memory.tiled_mlp import _why_not

    mlp = wrap(nn.Linear(4, 4))
    assert "does not give one tensor" in str(_why_not(mlp, ((torch.randn(1, 8, 4),), {})))
    assert "more than hidden states" in str(_why_not(mlp, ((torch.randn(1, 8, 4), 1), {})))
    assert "is not called" in str(_why_not(mlp, None))
