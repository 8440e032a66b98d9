"""Which models may be cut: those in which attention alone passes anything from token to token."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from tiny import llama_config
from transformers import LlamaForCausalLM, PreTrainedModel

from longlora import use_s2
from longlora.attention.pattern import FULL, S2Pattern, WindowPattern
from longlora.attention.sequence_support import LayerNeeds, least_stretch, require_cuttable
from longlora.errors import ModelError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("one_thread")


def prepared(name: str, **attention: object) -> PreTrainedModel:
    model = next(each for each in ARCHITECTURES if each.name == name).build()
    use_s2(model, **{"group_size": 16, **attention})  # type: ignore[arg-type]
    return model.train()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "gpt2", "opt", "deepseek_v3", "cohere2"])
def test_attention_alone_may_be_cut(name: str) -> None:
    model = prepared(name)
    assert len(require_cuttable(model)) == model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["lfm2", "bamba", "qwen3_next", "falcon_h1", "nemotron_h"])
def test_states_and_convolutions_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="from token to token outside of attention"):
        require_cuttable(prepared(name))


def test_chunks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="chunked attention"):
        require_cuttable(prepared("llama4_text"))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_by_length_is_refused(kind: str) -> None:
    factors = {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4} if kind == "longrope" else {}
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    model = LlamaForCausalLM(llama_config(rope_parameters=parameters | factors))
    use_s2(model, group_size=16)
    with pytest.raises(UnsupportedModelError, match=f"RoPE of type {kind}"):
        require_cuttable(model.train())


def test_needs_of_the_layers_and_the_model_as_it_was() -> None:
    model = LlamaForCausalLM(llama_config())
    use_s2(model, group_size=16, sink_tokens=2, full_attention_layers=[1])
    model.train()
    state = torch.random.get_rng_state()
    assert require_cuttable(model) == [LayerNeeds((9, 3), S2Pattern(16, 2)), LayerNeeds((9, 3), FULL)]
    assert torch.equal(state, torch.random.get_rng_state()), "a run draws what it would without"
    windows = {layer.pattern for layer in require_cuttable(prepared("gemma3_text"))}
    assert WindowPattern(8) in windows


def test_the_least_stretch_is_a_group_or_a_window() -> None:
    layers = [LayerNeeds((9, 3), pattern) for pattern in (S2Pattern(16), WindowPattern(20), FULL)]
    assert least_stretch(layers, 64, 2) == 20
    with pytest.raises(ModelError, match="stretches of 16, shorter than window=20"):
        least_stretch(layers, 64, 4)
    assert least_stretch([LayerNeeds((9, 3), FULL)], 64, 4) == 1
