"""RoPE: what is written into the config, and that the built model uses it."""

from typing import Any

import pytest
import torch
from tiny import llama_config
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
)

from longlora.config import build_recipe
from longlora.errors import LongLoraError, ModelError
from longlora.model.rope import assert_rope_applied, current_context, rescale_for, rescale_rope

BASE = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)


def inv_freq(model: LlamaForCausalLM) -> torch.Tensor:
    return model.model.rotary_emb.inv_freq


def test_linear_is_position_interpolation() -> None:
    config, change = rescale_rope(llama_config(), 256, "linear")
    assert (change.original_context_length, change.context_length) == (64, 256)
    model = LlamaForCausalLM(config)
    torch.testing.assert_close(inv_freq(model), BASE / 4)
    assert config.max_position_embeddings == 256
    assert config.rope_parameters["rope_theta"] == 10000.0
    # Position p of the extended model is position p / 4 of the original one.
    x = torch.zeros(1, 256, 72)
    original = LlamaForCausalLM(llama_config()).model.rotary_emb(x, torch.arange(64)[None].float())
    extended = model.model.rotary_emb(x, (torch.arange(64) * 4)[None])
    torch.testing.assert_close(extended, original)


def test_theta_is_ntk_aware_scaling() -> None:
    config, _ = rescale_rope(llama_config(), 128, "theta")
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": pytest.approx(10000.0 * 2 ** (8 / 6))}
    frequencies = inv_freq(LlamaForCausalLM(config))
    assert frequencies[0] == 1.0  # the fastest stays
    torch.testing.assert_close(frequencies[-1], BASE[-1] / 2)  # the slowest is interpolated in full


def test_yarn_keeps_fast_frequencies_and_interpolates_slow_ones() -> None:
    config, _ = rescale_rope(llama_config(), 256)
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["factor"] == 4.0
    assert config.rope_parameters["original_max_position_embeddings"] == 64
    model = LlamaForCausalLM(config)
    frequencies = inv_freq(model)
    assert (frequencies <= BASE * 1.0001).all()
    assert (frequencies >= BASE / 4.0001).all()
    torch.testing.assert_close(frequencies[-1], BASE[-1] / 4)
    # Peng et al. 2023, equation 22: 0.1 ln(s) + 1.
    assert model.model.rotary_emb.attention_scaling == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_extending_twice_multiplies_the_factors(kind: str) -> None:
    once, _ = rescale_rope(llama_config(), 128, kind)
    twice, change = rescale_rope(once, 512, kind)
    direct, _ = rescale_rope(llama_config(), 512, kind)
    assert twice.rope_parameters == direct.rope_parameters
    assert twice.rope_parameters["factor"] == 8.0
    assert change.original_context_length == 128
    torch.testing.assert_close(inv_freq(LlamaForCausalLM(twice)), inv_freq(LlamaForCausalLM(direct)))


def test_native_llama3_scaling_is_kept() -> None:
    native = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config, _ = rescale_rope(llama_config(rope_parameters=native, max_position_embeddings=512), 1024)
    assert config.rope_parameters == {**native, "factor": 16.0}
    assert_rope_applied(LlamaForCausalLM(config), config)


def test_an_ambiguous_linear_scaling_is_refused_until_it_is_explained() -> None:
    # The case that the original code gets wrong: 4096 x 8 extended to 65536 became factor 2.
    config = llama_config(
        max_position_embeddings=4096, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}
    )
    with pytest.raises(LongLoraError, match="set model.original_context_length"):
        rescale_rope(config, 65536, "linear")
    extended, _ = rescale_rope(config, 65536, "linear", original_context_length=32768)
    assert extended.rope_parameters["factor"] == 16.0
    assert extended.rope_parameters["original_max_position_embeddings"] == 4096


def test_yarn_of_either_convention_is_extended_from_what_it_handles() -> None:
    """Qwen keeps the unscaled length in max_position_embeddings, others the scaled one."""
    yarn = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "attention_factor": 1.2,
    }  # fmt: skip
    for stated in (64, 256):
        config = llama_config(max_position_embeddings=stated, rope_parameters=dict(yarn))
        extended, change = rescale_rope(config, 512)
        assert change.original_context_length == 256
        assert extended.rope_parameters["factor"] == 8.0
        assert "attention_factor" not in extended.rope_parameters, "it belonged to the old factor"


@pytest.mark.parametrize("context", [64, 32])
def test_a_context_that_is_not_longer_is_refused(context: int) -> None:
    with pytest.raises(LongLoraError, match=f"context_length={context} is not longer than the model's 64 tokens"):
        rescale_rope(llama_config(), context)


def test_models_without_rope_or_with_another_scaling_are_refused() -> None:
    with pytest.raises(LongLoraError, match="'gpt2' has no rotary"):
        rescale_rope(GPT2Config(), 4096)
    yarn, _ = rescale_rope(llama_config(), 128, "yarn")
    with pytest.raises(LongLoraError, match="already uses yarn"):
        rescale_rope(yarn, 256, "linear")
    with pytest.raises(LongLoraError, match="'dynamic' of the model cannot be rescaled"):
        rescale_rope(llama_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), 4096)


@pytest.mark.parametrize(
    "damage", [{"factor": "8"}, {"original_max_position_embeddings": "64"}, {"rope_theta": None}, {"factor": True}]
)
def test_what_is_no_number_is_refused_by_name(damage: dict[str, Any]) -> None:
    config = llama_config()
    config.rope_parameters = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64, **damage
    }  # fmt: skip
    (name,) = damage
    with pytest.raises(ModelError, match=f"rope_parameters of the model: {name} is .*, not a positive number"):
        current_context(config)


def test_layers_with_a_window_keep_their_own_rope() -> None:
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=8, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    extended, _ = rescale_rope(config, 128, "linear")
    assert extended.rope_parameters["full_attention"]["factor"] == 2.0
    assert extended.rope_parameters["sliding_attention"] == config.rope_parameters["sliding_attention"]
    model = Gemma3ForCausalLM(extended)
    assert_rope_applied(model, extended)
    rotary = model.model.rotary_emb
    original = Gemma3ForCausalLM(config).model.rotary_emb
    torch.testing.assert_close(rotary.full_attention_inv_freq, original.full_attention_inv_freq / 2)
    torch.testing.assert_close(rotary.sliding_attention_inv_freq, original.sliding_attention_inv_freq)
    with pytest.raises(LongLoraError, match="does not follow the config"):
        assert_rope_applied(Gemma3ForCausalLM(config), extended)


def test_a_scaling_that_the_architecture_does_not_take_is_refused_before_training() -> None:
    config = Phi3Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(
        LongLoraError, match=r"'phi3' does not take rope_type 'yarn' \(.*\): set context.rope_type=theta$"
    ):
        rescale_rope(config, 128, "yarn")
    extended, _ = rescale_rope(config, 128, "theta")
    assert extended.rope_parameters["rope_theta"] > config.rope_parameters["rope_theta"]


def test_a_config_that_leaves_the_head_size_open() -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    extended, _ = rescale_rope(config, 128)
    assert_rope_applied(MixtralForCausalLM(extended), extended)


def test_layer_types_that_are_not_known_are_named() -> None:
    config = llama_config()
    config.rope_parameters = {"sliding_attention": dict(config.rope_parameters), "full_attention": None}
    with pytest.raises(LongLoraError, match="has no rotary position embeddings to rescale"):
        rescale_rope(config, 128)
    config.rope_parameters = {"hybrid": {"rope_theta": 1e4}, "hybrid_sliding": {"rope_theta": 1e4}}
    with pytest.raises(LongLoraError, match="layers of kind hybrid, hybrid_sliding, and longlora rescales"):
        rescale_rope(config, 128)


def test_instructions_within_a_linear_scaling_leave_a_config_that_says_its_context() -> None:
    config = llama_config()
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    recipe = build_recipe({
        "run_dir": "run", "model": {"name_or_path": "m", "original_context_length": 64},
        "context": {"context_length": 64}, "attention": {"group_size": 16}, "data": {"kind": "instruct"},
    })  # fmt: skip
    same, change = rescale_for(recipe, config)
    assert current_context(same) == change.context_length == 64
    assert same.rope_parameters == config.rope_parameters | {"original_max_position_embeddings": 16}
    assert_rope_applied(LlamaForCausalLM(config), same)


def test_a_config_changed_after_the_model_was_built_is_noticed() -> None:
    model = LlamaForCausalLM(llama_config())
    assert_rope_applied(model, model.config)
    config, _ = rescale_rope(llama_config(), 128, "linear")
    with pytest.raises(LongLoraError, match="does not follow the config"):
        assert_rope_applied(model, config)


def test_a_larger_factor_than_needed_is_allowed_and_a_smaller_one_is_not() -> None:
    config, _ = rescale_rope(llama_config(), 128, "yarn", rope_factor=4.0)
    assert config.rope_parameters["factor"] == 4.0
    assert config.max_position_embeddings == 128
    with pytest.raises(LongLoraError, match="rope_factor=1.5 is less than 128 / 64 tokens = 2"):
        rescale_rope(llama_config(), 128, "yarn", rope_factor=1.5)


@pytest.mark.parametrize("kind", ["linear", "yarn", "theta"])
def test_a_model_that_rotates_a_part_of_each_head(kind: str) -> None:
    """16 numbers of a head, 8 of which turn: NTK-aware scaling is by the power 8 / 6."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, rope_parameters=rope,
    )  # fmt: skip
    assert_rope_applied(GPTNeoXForCausalLM(config), config)
    extended, _ = rescale_rope(config, 128, kind)
    assert_rope_applied(GPTNeoXForCausalLM(extended), extended)
    if kind == "theta":
        assert extended.rope_parameters["rope_theta"] == pytest.approx(10000.0 * 2 ** (8 / 6))


def test_one_wrong_slow_frequency_and_another_attention_factor_are_noticed() -> None:
    config, _ = rescale_rope(llama_config(), 256, "yarn")
    model = LlamaForCausalLM(config)
    rotary = model.model.rotary_emb
    rotary.inv_freq[-1] *= 1.01
    with pytest.raises(LongLoraError, match="does not follow the config"):
        assert_rope_applied(model, config)
    rotary.inv_freq[-1] /= 1.01
    assert_rope_applied(model, config)
    rotary.attention_scaling = 1.0
    with pytest.raises(LongLoraError, match="does not follow the config"):
        assert_rope_applied(model, config)


@pytest.mark.parametrize(
    ("context", "known", "factor", "reach"),
    [(32, None, None, 64), (64, None, None, 64), (65, None, 65 / 64, 65), (100, 128, None, 128)],
)
def test_instructions_rescale_only_beyond_what_the_model_handles(
    context: int, known: int | None, factor: float | None, reach: int
) -> None:
    recipe = build_recipe({
        "run_dir": "run", "model": {"name_or_path": "m", "original_context_length": known},
        "context": {"context_length": context}, "attention": {"group_size": 16}, "data": {"kind": "instruct"},
    })  # fmt: skip
    config, change = rescale_for(recipe, llama_config())
    assert config.rope_parameters.get("factor") == factor
    assert config.max_position_embeddings == change.context_length == reach


def test_numbers_that_are_not_given_are_those_of_transformers() -> None:
    config = llama_config()
    plain, _ = rescale_rope(config, 256, "linear")
    config.rope_parameters = {**config.rope_parameters, "factor": None, "original_max_position_embeddings": None}
    nothing, _ = rescale_rope(config, 256, "linear")
    assert nothing.rope_parameters["factor"] == plain.rope_parameters["factor"]
