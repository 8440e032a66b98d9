"""Generation after `use_s2` is that of the model without it, in any mode and with any cache."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import llama_config
from transformers import (
    CompileConfig,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

import longlora
from longlora.attention.registry import is_sparse
from longlora.errors import LongLoraError

LENGTH = 21


def llama(seed: int = 0, implementation: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM._from_config(llama_config(), attn_implementation=implementation).eval()


def gemma2() -> Gemma2ForCausalLM:
    """Masks of two kinds, additive ones, and a window."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=6, initializer_range=0.2, attn_logit_softcapping=2.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def prompt(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 128, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def padded_on_the_left() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :5] = 0
    return {"attention_mask": mask}


def generate(model: torch.nn.Module, ids: torch.Tensor, **options: object) -> torch.Tensor:
    return model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)


WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
    "beams": {"num_beams": 3},
    "beams, static": {"num_beams": 3, "cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("sparse_in_evaluation", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_without_use_s2(way: str, training: bool, sparse_in_evaluation: bool) -> None:
    """In training mode too: trainers that sample between steps do not always call eval()."""
    model, ids = llama(), prompt()
    for padding in ({}, padded_on_the_left()):
        longlora.use_full(model)
        expected = generate(model.eval(), ids, **WAYS[way], **padding)
        longlora.use_s2(model, group_size=4, sink_tokens=0, sparse_in_evaluation=sparse_in_evaluation)
        assert torch.equal(generate(model.train(training), ids, **WAYS[way], **padding), expected)


@pytest.mark.parametrize("build", [gemma2, lambda: llama(implementation="eager")], ids=["gemma2", "eager"])
def test_static_caches_get_the_masks_of_the_models_own_attention(build: object) -> None:
    model, ids = build(), prompt()
    expected = generate(model, ids, cache_implementation="static", **padded_on_the_left())
    longlora.use_s2(model, group_size=4, sink_tokens=0)
    assert torch.equal(generate(model, ids, cache_implementation="static", **padded_on_the_left()), expected)


def test_drafted_tokens_are_those_without_use_s2() -> None:
    model, draft, ids = llama(), llama(1), prompt(rows=1)
    for options in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        longlora.use_full(model)
        expected = generate(model, ids, **options)
        longlora.use_s2(model, group_size=4, sink_tokens=0)
        assert torch.equal(generate(model, ids, **options), expected)


def test_a_peft_model_and_a_copy_generate_with_a_static_cache() -> None:
    model, ids = llama(), prompt()
    expected = generate(model, ids, cache_implementation="static")
    longlora.use_s2(model, group_size=4, sink_tokens=0)
    assert torch.equal(generate(copy.deepcopy(model), ids, cache_implementation="static"), expected)
    pickle.loads(pickle.dumps(model))
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).train()
    assert torch.equal(generate(wrapped, ids, cache_implementation="static"), expected)
    longlora.use_full(wrapped)
    assert "create_masks_for_generate" not in vars(model)
    assert torch.equal(generate(wrapped, ids, cache_implementation="static"), expected)


def test_a_static_cache_without_use_s2_is_refused_with_a_line() -> None:
    """Trainers make reference models from the config of the trained one."""
    model = llama()
    longlora.use_s2(model, group_size=4, sink_tokens=0)
    fresh = LlamaForCausalLM._from_config(model.config, attn_implementation="s2_attn").eval()
    with pytest.raises(LongLoraError, match="static KV cache .* call longlora.use_s2"):
        generate(fresh, prompt(), cache_implementation="static")


@pytest.mark.slow
def test_generation_with_compiled_steps() -> None:
    """What transformers does by itself with a static cache on a GPU."""
    model, ids = llama(), prompt()
    expected = generate(model, ids)
    longlora.use_s2(model, group_size=4, sink_tokens=0)
    compiled = CompileConfig(backend="eager", mode=None, dynamic=False)
    compiled._compile_all_devices = True
    assert torch.equal(generate(model, ids, cache_implementation="static", compile_config=compiled), expected)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **inputs: object) -> torch.Tensor:
    return model(input_ids=ids, **inputs).logits


def test_sparse_evaluation_is_full_where_a_cache_takes_part() -> None:
    model, ids = llama(), prompt()
    full = logits(model, ids)
    longlora.use_s2(model, group_size=4, sink_tokens=0, sparse_in_evaluation=True)
    assert is_sparse(model)
    sparse = model(input_ids=ids)
    assert sparse.past_key_values is None, "half-filled caches would be read as those of full attention"
    assert (sparse.logits - full).abs().max() > 1e-2
    torch.testing.assert_close(logits(model, ids, use_cache=False), sparse.logits)
    torch.testing.assert_close(logits(model, ids, use_cache=True), full)
    cache = DynamicCache()
    torch.testing.assert_close(logits(model, ids[:, :9], past_key_values=cache), full[:, :9])
    torch.testing.assert_close(logits(model, ids[:, 9:], past_key_values=cache), full[:, 9:])


def test_a_pass_without_gradients_in_training_mode_is_still_sparse() -> None:
    """Log-probabilities of a policy must be those of the passes with gradients; only `generate` is told apart."""
    model, ids = llama(), prompt()
    longlora.use_s2(model, group_size=4, sink_tokens=0)
    with_gradients = model.train()(input_ids=ids).logits.detach()
    torch.testing.assert_close(logits(model, ids), with_gradients)
    generate(model, ids, use_cache=False)
    torch.testing.assert_close(logits(model, ids), with_gradients)
    assert "also in passes without gradients" in " ".join((longlora.use_s2.__doc__ or "").split())


def test_attention_weights_are_kept_in_evaluation_and_refused_where_there_are_none() -> None:
    model, ids = llama(implementation="eager"), prompt()
    expected = model(input_ids=ids, output_attentions=True).attentions
    longlora.use_s2(model, group_size=4, sink_tokens=0)
    found = model(input_ids=ids, output_attentions=True).attentions
    assert len(found) == len(expected) == 2
    torch.testing.assert_close(found, expected)
    with pytest.raises(LongLoraError, match="output_attentions=True: S2-Attn keeps no attention weights"):
        model.train()(input_ids=ids, output_attentions=True)
    longlora.use_s2(model, group_size=4, sink_tokens=0, sparse_in_evaluation=True)
    with pytest.raises(LongLoraError, match="output_attentions=True"):
        model.eval()(input_ids=ids, output_attentions=True)
