"""A KV cache that grows in place and can be cut back: what is read after that is as if nothing else had been."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from cache_cases import MODELS, model_of, random_tokens

from longlora.errors import ModelError
from longlora.model.kv_cache import GrowingCache, GrowingLayer, read_on

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("name", "rows"), [*((name, 3) for name in MODELS), ("llama", 1), ("gemma3_text", 1)])
@pytest.mark.usefixtures("poisoned_memory")
def test_generation_with_the_cache_is_that_of_transformers(name: str, rows: int) -> None:
    model = model_of(name)
    ids = torch.tensor([random_tokens(21, row) for row in range(rows)])
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, :5] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    said = model.generate(ids, eos_token_id=None, past_key_values=GrowingCache(model.config), **options)
    assert torch.equal(said, model.generate(ids, eos_token_id=None, **options))


@pytest.mark.parametrize(
    ("name", "rows", "capacity"), [*((name, 2, 25) for name in MODELS), ("llama", 1, 0), ("gemma3_text", 1, 100)]
)
@pytest.mark.usefixtures("poisoned_memory")
def test_a_cache_that_is_cut_back_knows_nothing_of_what_came_after(name: str, rows: int, capacity: int) -> None:
    model = model_of(name)
    text = torch.tensor([random_tokens(30, row) for row in range(rows)])
    branch = torch.tensor([random_tokens(12, 10 + row) for row in range(rows)])
    held = GrowingCache(model.config, capacity)
    with torch.inference_mode():
        for piece in text.split(11, dim=1):
            read_on(model, piece, held)
        held.crop_to(17)
        assert held.get_seq_length() == 17
        made = torch.cat([read_on(model, piece, held) for piece in branch.split(5, dim=1)], 1)
        whole = read_on(model, torch.cat([text[:, :17], branch], 1))[:, 17:]
        torch.testing.assert_close(made, whole, rtol=1e-4, atol=1e-4)
        held.crop_to(0)
        torch.testing.assert_close(read_on(model, text, held), read_on(model, text), rtol=1e-4, atol=1e-4)


def test_a_token_is_added_without_copying_those_before_it() -> None:
    states = torch.ones(2, 3, 1, 4)
    roomy, growing = GrowingLayer(100), GrowingLayer()
    places = {
        (roomy.update(states, states)[0].data_ptr(), roomy.update(states, states)[1].data_ptr()) for _ in range(50)
    }
    assert len(places) == 1
    assert len({growing.update(states, states)[0].data_ptr() for _ in range(100)}) <= 8


def test_a_layer_is_what_transformers_takes_it_for() -> None:
    layer = GrowingLayer(4)
    assert (layer.keys, layer.values, layer.is_initialized, layer.get_seq_length()) == (None, None, False, 0)
    keys, values = torch.arange(24.0).view(2, 1, 3, 4), torch.arange(36.0).view(2, 1, 3, 6)
    for _ in range(2):
        layer.update(keys, values)
        assert layer.is_initialized
        assert (layer.dtype, layer.device) == (keys.dtype, keys.device)
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert layer.get_mask_sizes(2) == (5, 0)
        layer.reset()
        assert (layer.keys, layer.get_seq_length()) == (None, 0)
    layer.update(keys, values)
    layer.crop(-1)
    assert torch.equal(layer.values, values[:, :, :2])
    with pytest.raises(ValueError, match="crop\\(1\\)"):
        layer.crop(1)
    layer.reorder_cache(torch.tensor([1, 1]))
    layer.batch_select_indices(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    more, _ = layer.update(keys[:, :, :1], values[:, :, :1])
    assert torch.equal(more, torch.cat([keys[[1, 1], :, :2], keys[:, :, :1]], 2))
    with pytest.raises(AssertionError, match="9 of 3 tokens"):
        layer.crop_to(9)


def test_a_state_that_cannot_be_cut_back_is_refused_with_a_line() -> None:
    model = model_of("qwen3_next")
    with pytest.raises(ModelError, match="layer 0 of qwen3_next keeps a state .* measure perplexity alone"):
        GrowingCache(model.config)
    own_code = next(a for a in ARCHITECTURES if a.model_type == "openai-gpt").build()
    with pytest.raises(ModelError, match="OpenAIGPTLMHeadModel does not write to a KV cache"):
        read_on(own_code, torch.tensor([[5, 6]]), GrowingCache(own_code.config))


def test_room_that_is_reserved_is_no_more_than_asked_for_and_keeps_what_is_there() -> None:
    states = torch.arange(2 * 3 * 5 * 4.0).reshape(2, 3, 5, 4)
    layer = GrowingLayer(5)
    layer.update(states, states + 1)
    layer.crop_to(3)
    layer.reserve(7)
    keys, values = layer.update(states[:, :, :4], states[:, :, :4])
    assert keys.untyped_storage().nbytes() == values.untyped_storage().nbytes() == 2 * 3 * 7 * 4 * 4
    assert torch.equal(keys, torch.cat([states[:, :, :3], states[:, :, :4]], 2))
    assert torch.equal(values, torch.cat([states[:, :, :3] + 1, states[:, :, :4]], 2))
