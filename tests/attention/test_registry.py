"""The seam to transformers: what a user of `use_s2` relies on, through a whole model."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import llama_config
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Llama4TextConfig,
    Llama4TextModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    masking_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import longlora
from longlora.attention import backends
from longlora.attention.backends import choose_backend
from longlora.attention.layers import attention_modules, has_window
from longlora.attention.pattern import S2Pattern, WindowPattern, may_attend
from longlora.attention.picture import draw_heads, head_weights
from longlora.attention.registry import describe_attention, is_sparse
from longlora.errors import LongLoraError


def logits(model: torch.nn.Module, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(128, (2, 21), generator=torch.Generator().manual_seed(1))


def test_sparse_in_training_and_full_in_evaluation(tiny_llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    full = logits(tiny_llama, ids)
    longlora.use_s2(tiny_llama, group_size=8, sink_tokens=0)
    torch.testing.assert_close(logits(tiny_llama.eval(), ids), full)
    assert not is_sparse(tiny_llama)
    sparse = logits(tiny_llama.train(), ids)
    assert is_sparse(tiny_llama)
    torch.testing.assert_close(sparse[:, :4], full[:, :4])
    assert (sparse[:, 12:] - full[:, 12:]).abs().max() > 1e-2
    longlora.use_full(tiny_llama)
    torch.testing.assert_close(logits(tiny_llama, ids), full)


@pytest.mark.parametrize("use_cache", [None, True, False])
def test_packed_documents_are_isolated_whatever_the_cache_setting(
    tiny_llama: LlamaForCausalLM, ids: torch.Tensor, use_cache: bool | None
) -> None:
    """transformers forgets packing when it fills a KV cache, which is its default."""
    longlora.use_s2(tiny_llama, group_size=4, sink_tokens=2)
    tiny_llama.train()
    packed = ids.reshape(1, -1)
    positions = torch.arange(21).repeat(2)[None]
    together = logits(tiny_llama, packed, position_ids=positions, use_cache=use_cache)
    alone = logits(tiny_llama, ids)
    torch.testing.assert_close(together.reshape(2, 21, -1), alone)


def test_packed_documents_are_isolated_beside_a_padding_mask(tiny_llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """transformers itself forgets packing there; collators that give both are common."""
    longlora.use_s2(tiny_llama, group_size=4, sink_tokens=2)
    tiny_llama.train()
    packed, padding = ids.reshape(1, -1), torch.zeros(1, 3, dtype=torch.long)
    together = logits(
        tiny_llama,
        torch.cat([packed, padding], dim=1),
        position_ids=torch.cat([torch.arange(21).repeat(2)[None], padding], dim=1),
        attention_mask=torch.cat([torch.ones_like(packed), padding], dim=1),
    )
    torch.testing.assert_close(together[:, :42].reshape(2, 21, -1), logits(tiny_llama, ids))


def test_a_fresh_model_with_the_key_in_its_config_evaluates(tiny_llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Trainers make reference models from the config of the trained one."""
    full = logits(tiny_llama, ids)
    longlora.use_s2(tiny_llama, group_size=4, sink_tokens=0)
    fresh = LlamaForCausalLM._from_config(tiny_llama.config, attn_implementation="s2_attn").eval()
    fresh.load_state_dict(tiny_llama.state_dict())
    torch.testing.assert_close(logits(fresh, ids), full)


def test_the_original_implementation_sees_its_own_name(tiny_llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """transformers' flash functions load the kernel that the config names while they run."""
    seen = []

    def spy(module: torch.nn.Module, *args: torch.Tensor, **kwargs: object):
        seen.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", masking_utils.sdpa_mask)
    tiny_llama.set_attn_implementation("spy")
    longlora.use_s2(tiny_llama, group_size=4, sink_tokens=0)
    logits(tiny_llama, ids)
    assert set(seen) == {"spy"}
    assert tiny_llama.config._attn_implementation == "s2_attn"


def test_evaluation_in_two_threads_leaves_the_config_alone(tiny_llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """DataParallel and servers share one config between threads."""
    full = logits(tiny_llama, ids)
    longlora.use_s2(tiny_llama, group_size=4, sink_tokens=0)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: logits(tiny_llama, ids), range(12)):
            torch.testing.assert_close(found, full)
    assert tiny_llama.config._attn_implementation == "s2_attn"


def test_generating_between_forward_and_backward_changes_no_gradient(
    tiny_llama: LlamaForCausalLM, ids: torch.Tensor
) -> None:
    """With activation checkpointing layers are computed again in the backward pass."""
    longlora.use_s2(tiny_llama, group_size=4, sink_tokens=1)
    tiny_llama.train().gradient_checkpointing_enable({"use_reentrant": False})
    weight = tiny_llama.model.layers[0].self_attn.q_proj.weight
    expected = torch.autograd.grad(tiny_llama(input_ids=ids, labels=ids).loss, weight)[0]
    loss = tiny_llama(input_ids=ids, labels=ids).loss
    tiny_llama.gradient_checkpointing_disable()
    tiny_llama.generate(ids, max_new_tokens=2, do_sample=False)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected)


def test_a_fresh_model_without_sdpa_evaluates_as_its_own(ids: torch.Tensor) -> None:
    model = make_gemma2()
    full = logits(model, ids)
    longlora.use_s2(model, group_size=4, sink_tokens=1)
    fresh = Gemma2ForCausalLM._from_config(model.config, attn_implementation="s2_attn").eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(fresh, ids), full)


def windowed(window: int, longest: int) -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=window, max_position_embeddings=longest, initializer_range=0.2,
    )  # fmt: skip
    return MistralForCausalLM(config)


def test_a_fresh_model_that_becomes_sparse_keeps_its_own_full_attention(ids: torch.Tensor) -> None:
    """Gemma 2 has no sdpa: it would lose its soft caps."""
    model = make_gemma2()
    full = logits(model, ids)
    longlora.use_s2(model, group_size=4, sink_tokens=1)
    fresh = Gemma2ForCausalLM._from_config(model.config, attn_implementation="s2_attn").eval()
    fresh.load_state_dict(model.state_dict())
    longlora.use_s2(fresh, group_size=4, sink_tokens=1)
    torch.testing.assert_close(logits(fresh, ids), full)
    longlora.use_full(fresh)
    assert fresh.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(fresh, ids), full)


def test_the_layers_are_described_whatever_computes_them(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a float32 model under autocast, the parameters do not tell: varlen would be refused, and is not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_capability", lambda device: (9, 0))
    longlora.use_s2(tiny_llama, group_size=8, sink_tokens=0, backend="varlen")
    expected = "sparse in layers 0-1 (groups of 8, 0 sink tokens, shifted in half of the heads)"
    assert describe_attention(tiny_llama) == expected


def test_a_window_as_long_as_the_context_counts_beyond_it() -> None:
    """What the model's own attention hides there, sparse training hides as well."""
    model, ids = windowed(32, 32).train(), torch.randint(64, (1, 80), generator=torch.Generator().manual_seed(0))
    own, short = logits(model, ids, use_cache=False), logits(model, ids[:, :32], use_cache=False)
    longlora.use_s2(model, group_size=8, sink_tokens=0)
    assert describe_attention(model).startswith("sparse in layer 0")
    torch.testing.assert_close(logits(model, ids), own)
    assert not torch.allclose(logits(model, ids[:, :32]), short, atol=1e-3)


def test_a_chunk_as_long_as_the_context_is_no_window() -> None:
    config = Llama4TextConfig(
        num_hidden_layers=2, layer_types=["chunked_attention", "full_attention"], attention_chunk_size=64,
        max_position_embeddings=64, no_rope_layers=[1, 0],
    )  # fmt: skip
    with torch.device("meta"):
        decoder = Llama4TextModel(config)
    assert [has_window(decoder, module) for module in attention_modules(decoder)] == [False, False]
    config.max_position_embeddings = 65
    assert [has_window(decoder, module) for module in attention_modules(decoder)] == [True, False]


def test_a_window_longer_than_the_context_is_none() -> None:
    """Phi-3.5-mini's config has one."""
    model = windowed(300, 128)
    longlora.use_s2(model, group_size=8, sink_tokens=0)
    assert describe_attention(model).startswith("sparse in layer 0")
    sparse = logits(model.train(), torch.arange(32)[None])
    longlora.use_full(model)
    assert not torch.allclose(sparse, logits(model, torch.arange(32)[None]))


def test_two_models_keep_their_own_settings(tiny_llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    other = copy.deepcopy(tiny_llama)
    longlora.use_s2(tiny_llama, group_size=4, sink_tokens=0)
    longlora.use_s2(other, group_size=8, sink_tokens=0)
    expected = [logits(model.train(), ids) for model in (tiny_llama, other)]
    assert not torch.allclose(*expected)
    torch.testing.assert_close(logits(tiny_llama, ids), expected[0])
    copied = copy.deepcopy(tiny_llama)
    longlora.use_full(tiny_llama)
    torch.testing.assert_close(logits(copied, ids), expected[0])


def test_survives_set_attn_implementation_peft_and_checkpointing(
    tiny_llama: LlamaForCausalLM, ids: torch.Tensor
) -> None:
    longlora.use_s2(tiny_llama, group_size=4, sink_tokens=1)
    sparse = logits(tiny_llama.train(), ids)
    tiny_llama.set_attn_implementation("sdpa")
    assert not torch.allclose(logits(tiny_llama, ids), sparse)
    tiny_llama.set_attn_implementation("s2_attn")
    torch.testing.assert_close(logits(tiny_llama, ids), sparse)
    loss = tiny_llama(input_ids=ids, labels=ids).loss
    plain = torch.autograd.grad(loss, tiny_llama.model.layers[0].self_attn.q_proj.weight)[0]
    tiny_llama.gradient_checkpointing_enable({"use_reentrant": False})
    loss = tiny_llama(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(torch.autograd.grad(loss, tiny_llama.model.layers[0].self_attn.q_proj.weight)[0], plain)
    wrapped = get_peft_model(tiny_llama, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    torch.testing.assert_close(logits(wrapped.train(), ids), sparse)
    longlora.use_full(wrapped)
    assert not torch.allclose(logits(wrapped, ids), sparse)


def test_use_s2_on_a_peft_model(tiny_llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    wrapped = get_peft_model(tiny_llama, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    full = logits(wrapped.train(), ids)
    longlora.use_s2(wrapped, group_size=4, sink_tokens=1)
    assert not torch.allclose(logits(wrapped, ids), full)


def test_a_model_with_windows_only_is_refused_because_nothing_would_change() -> None:
    config = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=6,
    )  # fmt: skip
    with pytest.raises(LongLoraError, match="all layers of model type 'mistral' have a window"):
        longlora.use_s2(MistralForCausalLM(config), group_size=8)


def test_sliding_window_layers_keep_their_window(ids: torch.Tensor) -> None:
    """With a full-attention layer beside them: only that one becomes sparse."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=6, initializer_range=0.2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).train()
    outputs: dict[bool, list[torch.Tensor]] = {}
    for sparse in (False, True):
        if sparse:
            longlora.use_s2(model, group_size=4, sink_tokens=1)
        with torch.no_grad():
            outputs[sparse] = list(model(input_ids=ids, output_hidden_states=True).hidden_states)
    torch.testing.assert_close(outputs[True][1], outputs[False][1])
    assert not torch.allclose(outputs[True][2], outputs[False][2])


def test_wraparound_mode_leaks_and_says_what_it_needs(tiny_llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    longlora.use_s2(tiny_llama, group_size=8, sink_tokens=0, wraparound=True)
    assert "LEAKS" in (longlora.use_s2.__doc__ or "")
    tiny_llama.train()
    ids = ids[:, :16]
    before = logits(tiny_llama, ids)
    changed = ids.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 128
    assert (logits(tiny_llama, changed)[:, :4] - before[:, :4]).abs().max() > 1e-3
    with pytest.raises(LongLoraError, match="multiple of group_size"):
        logits(tiny_llama, ids[:, :13])
    with pytest.raises(LongLoraError, match="sink_tokens=3"):
        longlora.use_s2(tiny_llama, group_size=8, sink_tokens=3, wraparound=True)
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.25
    with pytest.raises(LongLoraError, match=r"no attention dropout, and this is 0.25; set attention_dropout=0"):
        logits(tiny_llama, ids)


def test_left_padding_and_caches_are_refused_in_training(tiny_llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    longlora.use_s2(tiny_llama, group_size=4, sink_tokens=1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(LongLoraError, match="pads on the right"):
        logits(tiny_llama.train(), ids, attention_mask=mask)
    cache = tiny_llama.eval()(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(LongLoraError, match="no KV cache"):
        tiny_llama.train()(input_ids=ids, past_key_values=cache)


def test_a_model_without_attention_interface_is_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(LongLoraError, match="'bloom' does not dispatch"):
        longlora.use_s2(model, group_size=8)
    with pytest.raises(LongLoraError, match="not a transformers model"):
        longlora.use_s2(torch.nn.Linear(2, 2), group_size=8)


def test_what_s2_does_not_compute_is_refused_and_not_ignored(tiny_llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    longlora.use_s2(tiny_llama, group_size=8)
    with pytest.raises(LongLoraError, match="LlamaAttention has a learned position bias"):
        logits(tiny_llama.train(), ids, position_bias=torch.zeros(1))
    with pytest.raises(LongLoraError, match="LlamaAttention has attention to later tokens"):
        logits(tiny_llama, ids, is_causal=False)


def test_a_mask_that_is_more_than_causal_is_refused(tiny_llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    """Some models let a prefix see all of itself, which a list of document bounds cannot say."""
    longlora.use_s2(tiny_llama, group_size=8)
    tiny_llama.train()
    original = masking_utils.causal_mask_function

    def prefix(batch: int, head: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return original(batch, head, query, key) | ((query < 9) & (key < 9))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_utils, "causal_mask_function", prefix)
        with pytest.raises(LongLoraError, match="mask is more than causal attention"):
            logits(tiny_llama, ids)
    logits(tiny_llama, ids)


def make_gemma2() -> Gemma2ForCausalLM:
    """Two layers, one with a window; soft-capped scores."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=6, initializer_range=0.2, attn_logit_softcapping=2.0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def test_evaluation_of_a_model_with_eager_attention_is_its_own(ids: torch.Tensor) -> None:
    """Soft caps exist in Gemma 2's eager code alone."""
    model = make_gemma2()
    before = logits(model, ids)
    longlora.use_s2(model, group_size=4, sink_tokens=1)
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=0)
    with_cache = model.generate(ids, max_new_tokens=4, do_sample=False)
    longlora.use_full(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), with_cache)


def sparse_hidden_states(model: torch.nn.Module, ids: torch.Tensor, **settings: object) -> list[torch.Tensor]:
    longlora.use_s2(model, group_size=4, sink_tokens=1, **settings)
    with torch.no_grad():
        return list(model.train()(input_ids=ids, output_hidden_states=True).hidden_states)


def test_chosen_layers_are_trained_with_full_attention(tiny_llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    with torch.no_grad():
        full = list(tiny_llama.train()(input_ids=ids, output_hidden_states=True).hidden_states)
    sparse = sparse_hidden_states(tiny_llama, ids)
    first_full = sparse_hidden_states(tiny_llama, ids, full_attention_layers=[0])
    assert not torch.allclose(sparse[1], full[1])
    torch.testing.assert_close(first_full[1], full[1])
    assert not torch.allclose(first_full[2], full[2])
    torch.testing.assert_close(sparse_hidden_states(tiny_llama, ids, full_attention_layers="all"), full)
    with pytest.raises(LongLoraError, match=r"full_attention_layers=\[7\]: the model has attention in layers 0-1"):
        longlora.use_s2(tiny_llama, group_size=4, sink_tokens=1, full_attention_layers=[0, 7])


def test_shift_between_layers_alternates_over_the_sparse_layers() -> None:
    config = Qwen2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=6,
        layer_types=["full_attention", "sliding_attention"] * 3,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    longlora.use_s2(model, group_size=8, sink_tokens=2, shift="layers")
    shifts = [layer.self_attn.longlora_s2.pattern.shift for layer in model.model.layers]
    assert [shifts[0], shifts[2], shifts[4]] == ["none", "all", "none"]
    assert describe_attention(model) == (
        "sparse in layers 0, 2, 4 (groups of 8, 2 sink tokens, shifted in every other layer), "
        "own window in layers 1, 3, 5"
    )
    longlora.use_s2(model, group_size=8, shift="none")
    assert {layer.self_attn.longlora_s2.pattern.shift for layer in model.model.layers} == {"none"}
    with pytest.raises(LongLoraError, match="shift='tokens': must be one of heads, layers, none"):
        longlora.use_s2(model, group_size=8, shift="tokens")


@pytest.mark.parametrize("settings", [{"shift": "layers"}, {"shift": "none"}, {"full_attention_layers": [1]}], ids=str)
def test_no_setting_leaks(tiny_llama: LlamaForCausalLM, ids: torch.Tensor, settings: dict[str, object]) -> None:
    before = sparse_hidden_states(tiny_llama, ids, **settings)[-1]
    for position in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 128
        after = sparse_hidden_states(tiny_llama, changed, **settings)[-1]
        torch.testing.assert_close(after[:, :position], before[:, :position])
        assert not torch.allclose(after[:, position], before[:, position])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA says")
@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_a_backend_that_the_machine_lacks_is_refused(tiny_llama: LlamaForCausalLM, backend: str) -> None:
    with pytest.raises(
        LongLoraError, match=f"backend={backend} needs a CUDA device.*set the backend to grouped or auto"
    ):
        longlora.use_s2(tiny_llama, group_size=8, backend=backend)
    with pytest.raises(LongLoraError, match="backend='fast' is unknown: give one of auto, grouped, varlen, flex"):
        longlora.use_s2(tiny_llama, group_size=8, backend="fast")
    assert tiny_llama.config._attn_implementation != "s2_attn"


def test_the_choice_of_a_backend() -> None:
    def choice(device: str, dtype: torch.dtype, **needs: object) -> str:
        return choose_backend("auto", torch.device(device), dtype, **needs)

    assert choice("cpu", torch.bfloat16) == "grouped"
    assert choice("cuda", torch.bfloat16) == "varlen"
    assert choice("cuda", torch.float16, softcap=True) == "flex"
    assert choice("cuda", torch.float16, learned_sinks=True) == "flex"
    assert choice("cuda", torch.float32) == "flex"
    assert choice("cuda", torch.bfloat16, dropout=True) == "grouped"
    assert choice("cuda", torch.bfloat16, head_dims=(512, 512)) == "flex"
    assert choice("cuda", torch.float32, head_dims=(64, 8)) == "grouped"
    with pytest.raises(LongLoraError, match="backend=varlen needs bfloat16 or float16, and this is float32 on cuda"):
        choose_backend("varlen", torch.device("cuda"), torch.float32)


def test_the_picture_shows_what_the_model_does() -> None:
    """The weights drawn are those of the model: where they are not zero is the pattern, in every kind of layer."""
    model = make_gemma2()
    before = model.config._attn_implementation
    heads = head_weights(model)
    assert [head.title for head in heads] == [
        "layer 0, head 0: its own window", "layer 1, head 0: groups", "layer 1, head 2: shifted groups",
    ]  # fmt: skip
    documents = [(0, 53), (53, 75)]
    patterns = [(WindowPattern(6), False), (S2Pattern(16, 2), False), (S2Pattern(16, 2), True)]
    for head, (pattern, shifted) in zip(heads, patterns, strict=True):
        expected = torch.zeros(75, 75, dtype=torch.bool)
        for start, stop in documents:
            for query in range(stop - start):
                for key in range(query + 1):
                    seen = may_attend(query, key, stop - start, pattern, shifted=shifted)
                    expected[start + query, start + key] = seen
        assert torch.equal(head.weights_TT > 0, expected)
        torch.testing.assert_close(head.weights_TT.sum(-1), torch.ones(75))
    assert draw_heads(heads).startswith(b"\x89PNG")
    assert model.config._attn_implementation == before


def test_the_attention_from_before_comes_back(ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(llama_config(), attn_implementation="eager")
    full = logits(model.eval(), ids)
    longlora.use_s2(model, group_size=8, sink_tokens=0)
    longlora.use_s2(model, group_size=4, sink_tokens=0)
    torch.testing.assert_close(logits(model, ids), full)
    longlora.use_full(model)
    assert model.config._attn_implementation == "eager"


def test_forgetting_use_s2_is_an_error_and_not_full_attention(tiny_llama: LlamaForCausalLM, ids: torch.Tensor) -> None:
    longlora.use_s2(copy.deepcopy(tiny_llama), group_size=8)
    tiny_llama.set_attn_implementation("s2_attn")
    with pytest.raises(LongLoraError, match="call longlora.use_s2"):
        logits(tiny_llama.train(), ids)
