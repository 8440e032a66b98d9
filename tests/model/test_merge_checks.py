"""What refuses a wrong merge, and what an adapter is made of."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from longlora.config import AdapterConfig
from longlora.errors import LongLoraError
from longlora.model import merge
from longlora.model.adapters import add_adapter
from longlora.model.merge import MergeCheck
from longlora.model.trainable import copy_weights, trained_weights


def test_the_adapter_has_the_settings_of_the_recipe(tiny_llama: LlamaForCausalLM) -> None:
    lora = add_adapter(tiny_llama, AdapterConfig(r=4, lora_alpha=6, lora_dropout=0.25)).peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (4, 6, 0.25)


@pytest.mark.parametrize("change", ["more", "fewer", "shape"])
def test_weights_of_another_architecture_are_not_copied(tiny_llama: LlamaForCausalLM, change: str) -> None:
    weights = trained_weights(tiny_llama)
    name = "model.norm.weight"
    if change == "fewer":
        del weights[name]
    else:
        weights["model.layers.2.x" if change == "more" else name] = torch.ones(3)
    with pytest.raises(LongLoraError, match="does not fit the recipe: 1 parameters differ"):
        copy_weights(tiny_llama, weights, "it")


def test_kl_is_of_the_first_from_the_second_for_each_token() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
    assert merge._kl(p, q) == pytest.approx((0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)) / 2)


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (MergeCheck(0, 0, 1.0, 1.0), None),
        (MergeCheck(0, 0, 1.01, 1.0), "rounding the merged weights costs"),
        (MergeCheck(0, 2e-4, 0, 1.0), "files read back differ"),
        (MergeCheck(0, 0, 0, 1e-10), "nothing was trained"),
    ],
)
def test_what_a_merge_must_not_do(check: MergeCheck, said: str | None) -> None:
    if said is None:
        merge._require_sound(check)
        return
    with pytest.raises(LongLoraError, match=said):
        merge._require_sound(check)


def test_merged_logits_and_the_saved_config_must_agree(tiny_llama: LlamaForCausalLM) -> None:
    logits = torch.tensor([[0.0, 10.0]])
    merge._require_close(logits, logits + 0.009)
    with pytest.raises(LongLoraError, match="merged logits differ from the adapter's by 0.011, limit 0.01"):
        merge._require_close(logits, logits + 0.011)
    rope = tiny_llama.config.rope_parameters
    merge._require_self_describing(tiny_llama, SimpleNamespace(context_length=64, rope_parameters=rope))
    for length, parameters in ((128, rope), (64, {**rope, "rope_theta": 1.0})):
        with pytest.raises(LongLoraError, match="the saved config says 64 tokens"):
            merge._require_self_describing(
                tiny_llama, SimpleNamespace(context_length=length, rope_parameters=parameters)
            )
