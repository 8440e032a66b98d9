"""What a pass is, sparse or full, is decided once, by hooks that see all of its inputs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import llama_config
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import longlora
from longlora.attention.passes import current_pass
from longlora.errors import LongLoraError


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config())
    longlora.use_s2(model, group_size=4, sink_tokens=1)
    return model.train()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 128, (2, 21), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: LlamaForCausalLM, ids: Tensor, **inputs: object) -> Tensor:
    return model(input_ids=ids, **inputs).logits


def gradient(model: LlamaForCausalLM, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, model.model.layers[0].self_attn.q_proj.weight)[0]


def test_a_cache_in_training_mode_is_refused_with_and_without_gradients(model: LlamaForCausalLM, ids: Tensor) -> None:
    for enabled in (True, False):
        with (
            torch.set_grad_enabled(enabled),
            pytest.raises(LongLoraError, match=r"past_key_values in training mode.* call model.eval\(\)"),
        ):
            model(input_ids=ids, past_key_values=DynamicCache())


def test_a_pass_is_over_when_it_ends(model: LlamaForCausalLM, ids: Tensor) -> None:
    logits(model, ids)
    assert current_pass().sparse is None
    with pytest.raises(LongLoraError):
        logits(model, ids, position_bias=torch.zeros(1))
    assert current_pass().sparse is None


def test_a_call_past_the_hooks_is_refused_in_training(model: LlamaForCausalLM, ids: Tensor) -> None:
    """It would be full attention, or sparse with the documents of another pass."""
    full = logits(model.eval(), ids)
    for other in (lambda: None, lambda: logits(model.eval(), ids), lambda: logits(model.train(), ids)):
        other()
        with pytest.raises(LongLoraError, match=r"past the hooks.*call model\(\.\.\.\), not model.forward"):
            model.train().model.forward(input_ids=ids)
    hidden = model.eval().model.forward(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), full)


def test_layers_that_are_computed_again_do_what_their_pass_did(model: LlamaForCausalLM, ids: Tensor) -> None:
    """With activation checkpointing and an evaluation before the backward pass."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = gradient(model, model(input_ids=ids, labels=ids).loss)
    loss = model(input_ids=ids, labels=ids).loss
    logits(model.eval(), ids)
    torch.testing.assert_close(gradient(model, loss), expected)


def test_one_layer_in_evaluation_mode_is_not_full_by_itself(model: LlamaForCausalLM, ids: Tensor) -> None:
    sparse = logits(model, ids)
    model.model.layers[0].self_attn.eval()
    torch.testing.assert_close(logits(model, ids), sparse)


def test_another_implementation_is_left_alone(model: LlamaForCausalLM, ids: Tensor) -> None:
    """Set by the user after `use_s2`."""
    model.set_attn_implementation("eager")
    found = model(input_ids=ids, past_key_values=DynamicCache(), output_attentions=True)
    assert found.past_key_values.get_seq_length() == 21
    assert len(found.attentions) == 2
    assert model(input_ids=ids, use_cache=True).past_key_values is not None
    longlora.use_s2(model, group_size=4, sink_tokens=1)
    assert model(input_ids=ids, use_cache=True).past_key_values is None


@torch.no_grad()
def test_positional_arguments_count(model: LlamaForCausalLM, ids: Tensor) -> None:
    packed, positions, decoder = ids.reshape(1, -1), torch.arange(21).repeat(2)[None], model.model
    alone = decoder(input_ids=ids).last_hidden_state.reshape(1, 42, -1)
    for padding_mask in (None, torch.ones_like(packed)):
        together = decoder(packed, padding_mask, positions, None, None, True)
        assert together.past_key_values is None
        torch.testing.assert_close(together.last_hidden_state, alone)
    with pytest.raises(LongLoraError, match="past_key_values in training mode"):
        decoder(ids, None, None, DynamicCache())
    with pytest.raises(TypeError, match="multiple values"):
        decoder(ids, input_ids=ids)


_LOAD = """
import sys, torch
model, ids, evaluation, training = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, evaluation)
    torch.testing.assert_close(model.train()(input_ids=ids).logits, training)
"""


def test_another_process_can_load_it(model: LlamaForCausalLM, ids: Tensor, tmp_path: Path) -> None:
    saved = model, ids, logits(model.eval(), ids), logits(model.train(), ids)
    assert not torch.allclose(*saved[2:])
    torch.save(saved, tmp_path / "model.pt")
    run = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path / "model.pt")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
