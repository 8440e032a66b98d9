"""Parameter counts without weights against real models with real adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planning_cases import llama_2_7b, recipe, small
from transformers import AutoModelForCausalLM, ViTConfig

from longlora.errors import ModelError
from longlora.model.adapters import add_adapter
from longlora.model.trainable import make_trainable, parameter_counts
from longlora.planning.outline import meta_model, outline

EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}


def test_the_papers_count() -> None:
    """LoRA of rank 8 on q, k, v, o, with embeddings and norms: 139.7M of 7B (paper, section 3.3)."""
    model = outline(llama_2_7b(), recipe())
    assert model.total == 6_738_415_616
    assert model.lora == 32 * 4 * 2 * 8 * 4096
    assert model.trained == model.lora + 32000 * 4096 + 65 * 4096 == 139_726_848


@pytest.mark.parametrize("adapter", [{}, {"train_embeddings": False}, {"train_norms": False, "r": 4}])
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
        ("qwen3_moe", EXPERTS),
        ("gemma3_text", {"num_hidden_layers": 6}),
        ("gpt_neox", {"tie_word_embeddings": False}),
        ("phi3", {}),
    ],
)
def test_counts_are_those_of_a_real_model(kind: str, sizes: dict[str, Any], adapter: dict[str, Any]) -> None:
    config = small(kind, **sizes)
    settings = recipe(**{f"adapter.{key}": value for key, value in adapter.items()})
    made = outline(config, settings)
    real = AutoModelForCausalLM.from_config(config)
    assert made.total == real.num_parameters()
    wrapped = add_adapter(real, settings.adapter)
    assert made.trained == wrapped.get_nb_trainable_parameters()[0]
    assert made.lora == sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False}),
        ("qwen3_moe", EXPERTS),
        # The biases that balance its experts are no weights to train.
        ("ernie4_5_moe", {"moe_num_experts": 4, "moe_intermediate_size": 32, "moe_k": 2, "moe_layer_start_index": 0}),
    ],
)
def test_full_fine_tuning_counts_what_a_real_model_trains(kind: str, sizes: dict[str, Any]) -> None:
    config, settings = small(kind, **sizes), recipe(**{"adapter.method": "full"})
    made = outline(config, settings)
    real = make_trainable(AutoModelForCausalLM.from_config(config), settings.adapter)
    assert (made.trained, made.total) == parameter_counts(real)
    assert made.lora == 0
    embeddings = {id(p) for m in real.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    trained = [p for p in real.parameters() if p.requires_grad]
    assert made.trained_matrices == sum(p.numel() for p in trained if p.ndim > 1 and id(p) not in embeddings)
    assert (made.trained < made.total) is (kind == "ernie4_5_moe")


def test_no_weights_are_made() -> None:
    assert {parameter.device.type for parameter in meta_model(llama_2_7b(), recipe()).parameters()} == {"meta"}


def test_a_model_without_a_decoder_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match="cannot be planned") as caught:
        outline(ViTConfig(), recipe())
    assert "\n" not in str(caught.value)
