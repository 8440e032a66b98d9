"""What `use_s2` and a sparse pass refuse: one line that says the value, the limit and the remedy."""

from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

import longlora
from longlora.attention.registry import describe_attention, is_sparse
from longlora.errors import LongLoraError, UnsupportedModelError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": "8"}, "group_size='8': must be a whole number"),
        ({"group_size": 2.5}, "group_size=2.5: must be a whole number"),
        ({"group_size": 8.0}, "group_size=8.0: must be a whole number"),
        ({"group_size": None}, "group_size=None: must be a whole number"),
        ({"group_size": [8]}, r"group_size=\[8\]: must be a whole number"),
        ({"sink_tokens": True}, "sink_tokens=True: must be a whole number"),
        ({"sink_tokens": 1.0}, "sink_tokens=1.0: must be a whole number"),
        ({"full_attention_layers": 1}, "full_attention_layers=1: give numbers of layers, as .0, 5., or 'all'"),
        ({"full_attention_layers": None}, "full_attention_layers=None: give numbers"),
        ({"full_attention_layers": "al"}, "full_attention_layers='al': give numbers"),
        ({"full_attention_layers": ["0"]}, r"full_attention_layers=\['0'\]: give numbers"),
        ({"full_attention_layers": [True]}, r"full_attention_layers=\[True\]: give numbers"),
        ({"full_attention_layers": [[0]]}, r"full_attention_layers=\[\[0\]\]: give numbers"),
        ({"shift": []}, "shift=.*: must be one of heads, layers, none"),
        ({"shift": {}}, "shift={}: must be one of heads, layers, none"),
        ({"backend": []}, r"backend=\[\] is unknown: give one of"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_one_line(
    tiny_llama: LlamaForCausalLM, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(LongLoraError, match=message):
        longlora.use_s2(tiny_llama, **{"group_size": 8, **settings})
    assert tiny_llama.config._attn_implementation == "sdpa"


def test_any_collection_of_layer_numbers_will_do(tiny_llama: LlamaForCausalLM) -> None:
    for layers in (range(1), (0,), {0}, iter([0]), torch.arange(1).numpy()):
        longlora.use_s2(tiny_llama, group_size=8, full_attention_layers=layers)
        assert "full in layer 0" in describe_attention(tiny_llama)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def peft(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        compiled_in_place,
        lambda model: torch.compile(peft(model)),
        lambda model: compiled_in_place(peft(model)),
        lambda model: peft(compiled_in_place(model)),
    ],
    ids=["compiled", "in place", "compiled PEFT", "PEFT in place", "PEFT of compiled"],
)
def test_a_compiled_model_is_refused(tiny_llama: LlamaForCausalLM, wrap: Callable[[nn.Module], nn.Module]) -> None:
    wrapped = wrap(tiny_llama)
    with pytest.raises(LongLoraError, match="compiled already: call longlora.use_s2 before torch.compile"):
        longlora.use_s2(wrapped, group_size=8)
    assert not is_sparse(wrapped)
    assert describe_attention(wrapped) == "full in all layers (sdpa)"


def test_wrappers_of_parallel_training_are_refused_with_a_remedy(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(LongLoraError, match="DataParallel wraps the model: hand over model.module, or call"):
        longlora.use_s2(nn.DataParallel(tiny_llama), group_size=8)
    with pytest.raises(LongLoraError, match="Linear is not a transformers model.*hand over what from_pretrained"):
        longlora.use_s2(nn.Linear(2, 2), group_size=8)


def test_arguments_that_attention_would_ignore_are_named(tiny_llama: LlamaForCausalLM) -> None:
    longlora.use_s2(tiny_llama, group_size=8)
    ids = torch.arange(21)[None]
    with pytest.raises(LongLoraError, match="LlamaAttention is given alibi, image_bias, which S2-Attn does not know"):
        tiny_llama.train()(input_ids=ids, image_bias=torch.zeros(1), alibi=torch.zeros(1))
    with pytest.raises(LongLoraError, match="leave it out of the model's inputs, or train with longlora.use_full"):
        tiny_llama(input_ids=ids, alibi=torch.zeros(1))
    with pytest.raises(LongLoraError, match="a head mask, which S2-Attn does not compute"):
        tiny_llama(input_ids=ids, head_mask=torch.zeros(1))
    tiny_llama.eval()(input_ids=ids, alibi=torch.zeros(1))


def test_arguments_that_trainers_and_tokenizers_add_change_nothing(tiny_llama: LlamaForCausalLM) -> None:
    longlora.use_s2(tiny_llama, group_size=8)
    ids = torch.arange(21)[None]
    expected = tiny_llama.train()(input_ids=ids).logits
    found = tiny_llama(
        input_ids=ids, num_items_in_batch=torch.tensor(20), output_router_logits=False, output_hidden_states=True,
        token_type_ids=torch.zeros_like(ids), is_causal=True, use_cache=True, position_bias=None, anything=False,
    ).logits  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_a_position_bias_is_refused_before_training() -> None:
    """So that ``attention.pattern=full`` can leave such a model its own attention."""
    architecture = next(each for each in ARCHITECTURES if each.name == "inkling_text")
    if not architecture.known:
        pytest.skip("this transformers has no inkling_text")
    with pytest.raises(UnsupportedModelError, match="'inkling_text' has a learned position bias"):
        longlora.use_s2(architecture.build(), group_size=16)
