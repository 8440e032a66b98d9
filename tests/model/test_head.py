"""The chunked loss against the loss of models that scale or cap their logits, through the heads they really have."""

import pytest
import torch
from tiny import VOCABULARY, llama_config
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from longlora.memory.chunked_loss import IGNORE_INDEX, chunked_loss
from longlora.model.head import hidden_states, output_head

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def build(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0, query_pre_attn_scalar=8))
    if kind == "granite":
        return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=6.0, embedding_multiplier=5.0))
    if kind == "cohere":
        return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625))
    return LlamaForCausalLM(llama_config())


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere", "llama"])
def test_chunked_loss_is_the_models_own(kind: str) -> None:
    model = build(kind).double().train()
    head = output_head(model)
    ids = torch.randint(VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(1))
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)
    total = chunked_loss(hidden_states(model, ids).flatten(0, 1), labels.flatten(), head, 7)
    ours = torch.autograd.grad(total / (labels != IGNORE_INDEX).sum(), list(model.parameters()), allow_unused=True)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    theirs = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    # The losses themselves are taken in float32, by us and by the model.
    torch.testing.assert_close((total / 36).float(), loss.float(), rtol=1e-5, atol=1e-6)
    for (name, _), one, other in zip(model.named_parameters(), ours, theirs, strict=True):
        assert one is not None, name
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("kind", "key"), [("gemma2", "softcap"), ("granite", "scale"), ("cohere", "scale")])
def test_without_the_cap_or_scale_it_would_be_another_loss(kind: str, key: str) -> None:
    model = build(kind)
    head = output_head(model)
    assert getattr(head, key) not in (None, 1.0)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        hidden = hidden_states(model, ids)[0]
        capped = chunked_loss(hidden, ids[0], head, 4)
        setattr(head, key, None if key == "softcap" else 1.0)
        assert abs(chunked_loss(hidden, ids[0], head, 4) - capped) > 0.1
