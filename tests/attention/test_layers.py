"""Which layers count: those of the text decoder, by their number there."""

from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from tiny import llama_config
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import longlora
from longlora.attention.layers import attention_modules, layer_numbers
from longlora.attention.picture import head_weights
from longlora.attention.registry import describe_attention, is_sparse
from longlora.errors import LongLoraError, UnsupportedModelError

IMAGE = 60
_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def architecture(name: str) -> Architecture:
    found = next(each for each in ARCHITECTURES if each.name == name)
    if not found.known:
        pytest.skip(f"this transformers has no {name}")
    return found


def llava() -> PreTrainedModel:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**_VISION, projection_dim=32)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=LlamaConfig(**_TEXT), vision_config=vision, image_token_index=IMAGE)
    ).eval()


def qwen2_vl() -> PreTrainedModel:
    torch.manual_seed(0)
    text = {**_TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()


def gemma3() -> PreTrainedModel:
    torch.manual_seed(0)
    text = {**_TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=IMAGE)
    ).eval()


def text_ids() -> Tensor:
    return torch.arange(3, 43)[None]


def test_numbers_of_a_hybrid_model_are_those_of_its_decoder() -> None:
    kinds = ["conv", "full_attention", "conv", "conv", "full_attention"]
    model = replace(architecture("lfm2"), settings={"num_hidden_layers": 5, "layer_types": kinds}).build()
    longlora.use_s2(model, group_size=8, sink_tokens=2, full_attention_layers=[4])
    assert describe_attention(model).startswith("sparse in layer 1 (groups of 8, 2 sink tokens")
    assert ", full in layer 4" in describe_attention(model)
    assert model.model.layers[4].self_attn.longlora_s2.pattern != model.model.layers[1].self_attn.longlora_s2.pattern
    for missing in (0, 2, 5):
        with pytest.raises(
            LongLoraError, match=rf"full_attention_layers=\[{missing}\]: the model has attention in layers 1, 4"
        ):
            longlora.use_s2(model, group_size=8, full_attention_layers=[missing])


@pytest.mark.parametrize(("name", "numbers"), [("zamba", [0, 1]), ("hrm_text", [0, 1, 2, 3]), ("zamba2", [0])])
def test_modules_that_do_not_know_their_own_layer_are_counted(name: str, numbers: list[int]) -> None:
    assert layer_numbers(attention_modules(architecture(name).build())) == numbers


@pytest.mark.parametrize("build", [llava, qwen2_vl, gemma3])
def test_of_several_modalities_the_text_decoder_counts(build: object) -> None:
    model = build()
    assert len(attention_modules(model)) == 3
    before = model.config.vision_config._attn_implementation
    longlora.use_s2(model, group_size=8, sink_tokens=1, full_attention_layers=[2])
    assert "full in layer 2" in describe_attention(model)
    assert is_sparse(model.train())
    assert model.config.vision_config._attn_implementation == before != "s2_attn"
    assert not [name for name, m in model.named_modules() if "vis" in name and hasattr(m, "longlora_s2")]
    with pytest.raises(LongLoraError, match="attention in layers 0-2"):
        longlora.use_s2(model, group_size=8, full_attention_layers=[3])
    longlora.use_full(model)
    assert not is_sparse(model)
    assert model.get_decoder().config._attn_implementation == "sdpa"


@pytest.mark.parametrize("build", [llava, qwen2_vl])
def test_text_is_sparse_in_training_and_full_otherwise(build: object) -> None:
    model, ids = build(), text_ids()
    with torch.no_grad():
        full = model(input_ids=ids).logits
        generated = model.generate(ids, max_new_tokens=4, do_sample=False)
        longlora.use_s2(model, group_size=8, sink_tokens=0)
        torch.testing.assert_close(model(input_ids=ids).logits, full)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)
        static = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static")
        assert torch.equal(static, generated)
        sparse = model.train()(input_ids=ids).logits
    torch.testing.assert_close(sparse[:, :4], full[:, :4])
    assert (sparse[:, 12:] - full[:, 12:]).abs().max() > 1e-2


def test_images_are_seen_as_without_use_s2() -> None:
    model = llava()
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.full((1, 4), IMAGE), text_ids()], dim=1)
    vision = model.model.vision_tower
    with torch.no_grad():
        expected = vision(pixels).last_hidden_state
        longlora.use_s2(model, group_size=16, sink_tokens=1)
        torch.testing.assert_close(vision.train()(pixels).last_hidden_state, expected)
        assert torch.isfinite(model.train()(input_ids=ids, pixel_values=pixels).logits).all()


def test_gemma3_lets_images_see_all_of_themselves_and_is_refused_in_training() -> None:
    model, ids = gemma3(), text_ids()
    with torch.no_grad():
        full = model(input_ids=ids).logits
        longlora.use_s2(model, group_size=8, sink_tokens=0)
        torch.testing.assert_close(model(input_ids=ids).logits, full)
    with pytest.raises(LongLoraError, match="mask function of its own to the causal one .for images"):
        model.train()(input_ids=ids, token_type_ids=torch.zeros_like(ids))


def test_an_encoder_with_a_decoder_is_refused_with_a_remedy() -> None:
    config = BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="'bart' is an encoder and a decoder.*choose a causal"):
        longlora.use_s2(BartForConditionalGeneration(config), group_size=8)


class OwnAttention(Gemma2Attention):
    """In a user's file, where there is no `eager_attention_forward`."""

    def forward(self, *args: object, **kwargs: object) -> object:
        return super().forward(*args, **kwargs)


class OwnLlamaAttention(LlamaAttention):
    def forward(self, hidden_states: Tensor, **kwargs: object) -> object:
        return hidden_states, None


def test_a_subclass_of_an_attention_class_is_one() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**_TEXT, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    model, ids = Gemma2ForCausalLM(config).eval(), text_ids()
    with torch.no_grad():
        full = model(input_ids=ids).logits
        for layer in model.model.layers:
            layer.self_attn.__class__ = OwnAttention
        longlora.use_s2(model, group_size=8, sink_tokens=1)
        torch.testing.assert_close(model(input_ids=ids).logits, full)
        assert not torch.allclose(model.train()(input_ids=ids).logits, full)
        if Gemma2ForCausalLM._supports_sdpa:  # an older transformers computes it there, without soft caps
            return
        fresh = Gemma2ForCausalLM._from_config(model.config, attn_implementation="s2_attn").eval()
        fresh.load_state_dict(model.state_dict())
        for layer in fresh.model.layers:
            layer.self_attn.__class__ = OwnAttention
        torch.testing.assert_close(fresh(input_ids=ids).logits, full)


def test_a_subclass_with_attention_of_its_own_is_none() -> None:
    model = LlamaForCausalLM(llama_config())
    model.model.layers[0].self_attn.__class__ = OwnLlamaAttention
    assert layer_numbers(attention_modules(model)) == [1]


def test_the_picture_names_layers_of_the_decoder() -> None:
    assert head_weights(architecture("lfm2").build())[0].title.startswith("layer 1, head 0")
