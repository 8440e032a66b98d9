"""Attention behind a KV cache on the CPU: what transformers computes with a mask, without one."""

import pytest
import torch
from tiny import llama_config
from transformers import DynamicCache, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from longlora.attention import cached
from longlora.attention.cached import CACHED_ATTENTION, cached_attention


def read(
    model: LlamaForCausalLM, ids_BT: torch.Tensor, chunks: list[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Last hidden states of all tokens, read in pieces of `chunks` tokens."""
    cache, made, start = DynamicCache(), [], 0
    with torch.inference_mode():
        for chunk in chunks:
            stop = start + chunk
            own = mask[:, :stop] if mask is not None else None
            output = model.base_model(
                input_ids=ids_BT[:, start:stop], attention_mask=own, past_key_values=cache, use_cache=True
            )
            made.append(output.last_hidden_state)
            start = stop
    return torch.cat(made, 1)


@pytest.mark.parametrize("chunks", [[29], [1] * 29, [8, 8, 8, 5], [1, 27, 1], [13, 16]])
@pytest.mark.parametrize("key_value_heads", [1, 3, 9])
@pytest.mark.parametrize("rows", [1, 2])
def test_chunks_behind_a_cache_give_what_one_pass_gives(chunks: list[int], key_value_heads: int, rows: int) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(num_key_value_heads=key_value_heads)).eval()
    ids_BT = torch.randint(3, 120, (rows, 29))
    expected = read(model, ids_BT, [29])
    with cached_attention(model):
        assert model.config._attn_implementation == CACHED_ATTENTION
        made = read(model, ids_BT, chunks)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_scores_of_any_size_are_put_together_without_overflow() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 300
    ids_BT = torch.randint(3, 120, (1, 24))
    expected = read(model, ids_BT, [24])
    with cached_attention(model):
        made = read(model, ids_BT, [5, 12, 7])
    assert made.isfinite().all()
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3)


def test_padding_and_windows_keep_their_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    ids_BT = torch.randint(3, 120, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :4] = 0
    for own in (None, mask):
        expected = read(model, ids_BT, [20], own)
        with cached_attention(model):
            made = read(model, ids_BT, [7, 9, 4], own)
        seen = mask.bool() if own is not None else torch.ones(2, 20, dtype=torch.bool)
        torch.testing.assert_close(made[seen], expected[seen], rtol=1e-4, atol=1e-5)


def test_no_mask_is_made_for_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM(llama_config()).eval()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a mask was made")

    monkeypatch.setattr(cached, "sdpa_mask", refuse)
    with cached_attention(model):
        read(model, torch.randint(3, 120, (1, 20)), [7, 9, 4])


def test_other_attentions_stay_as_they_are() -> None:
    model = LlamaForCausalLM(llama_config())
    model.set_attn_implementation("eager")
    with cached_attention(model):
        assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    with pytest.raises(KeyError), cached_attention(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
