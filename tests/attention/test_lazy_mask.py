"""Document bounds from what transformers and a batch say of a mask, and masks that bounds cannot say."""

from collections.abc import Callable

import pytest
import torch
from tiny import llama_config
from torch import Tensor
from transformers import DataCollatorWithFlattening, LlamaForCausalLM
from transformers.masking_utils import and_masks, blockwise_overlay, causal_mask_function, or_masks

import longlora
from longlora.attention import lazy_mask as module
from longlora.attention.lazy_mask import LazyMask
from longlora.errors import LongLoraError

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
T = 96


def bounds(mask: Mask, tokens: int = T, **arguments: object) -> list[list[int]]:
    given = {"batch_size": 1, "q_length": tokens, "kv_length": tokens, "device": "cpu", "mask_function": mask}
    return LazyMask({**given, **arguments}).bounds_B


def prefix(length: int) -> Mask:
    """A prefix that sees all of itself."""
    return or_masks(causal_mask_function, lambda b, h, q, k: (q < length) & (k < length))


def islands(starts: list[int]) -> Mask:
    """Images: two neighbouring tokens from each start on see each other."""
    blocks = torch.full((1, T), -1)
    for index, start in enumerate(starts):
        blocks[0, start : start + 2] = index
    return or_masks(causal_mask_function, blockwise_overlay(blocks))


def hidden(where: Callable[[Tensor], Tensor]) -> Mask:
    """Causal without some distances; the first tokens are always seen, and the neighbour."""
    return and_masks(causal_mask_function, lambda b, h, q, k: ~where(q - k) | (k < 2) | (q - k < 2))


def seen_ahead(by: int) -> Mask:
    """Pairs of tokens that are not neighbours see each other, as parts of one image in rows."""
    return or_masks(causal_mask_function, lambda b, h, q, k: k - q == by)


UNKNOWN: dict[str, Mask] = {
    **{f"prefix of {length}": prefix(length) for length in (2, 3, 17, T)},
    "one island": islands([40]),
    "islands": islands([3, 50, 90]),
    "every other token": hidden(lambda distance: distance % 2 == 0),
    "a window nobody told of": hidden(lambda distance: distance >= 8),
    "blocks beside the first tokens": hidden(lambda distance: (distance > 5) & (distance < 70)),
    "only far tokens": hidden(lambda distance: distance < 20),
    "pairs in the future": seen_ahead(T - 7),
}
# Those that the neighbours of a token do not tell.
FAR = [name for name in UNKNOWN if not name.startswith(("prefix", "one", "islands"))]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_mask_that_bounds_cannot_say_is_refused(name: str) -> None:
    with pytest.raises(LongLoraError, match="more than causal attention inside documents.*longlora.use_full"):
        bounds(UNKNOWN[name])


@pytest.mark.parametrize("name", FAR)
def test_only_distant_probes_find_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would not notice that they are gone."""
    monkeypatch.setattr(module, "_PROBES", (-1,))
    assert bounds(UNKNOWN[name]) == [[0, T]]


def test_only_the_next_token_finds_an_island(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROBES", tuple(step for step in module._PROBES if step != -1))
    assert bounds(islands([40])) == [[0, T]]


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 97, 5000])
def test_plain_causal_masks_of_any_length_are_known(tokens: int) -> None:
    assert bounds(causal_mask_function, tokens) == [[0, tokens]]
    assert bounds(and_masks(causal_mask_function, lambda b, h, q, k: q - k < 5), tokens, local_size=5) == [[0, tokens]]


def test_padding_keys_and_own_mask_functions_are_refused_with_a_remedy() -> None:
    with pytest.raises(LongLoraError, match="40 keys for 96 queries.*pass no past_key_values, or call model.eval"):
        bounds(causal_mask_function, kv_length=40)
    with pytest.raises(LongLoraError, match="mask function of its own.*longlora.use_full"):
        bounds(causal_mask_function, use_vmap=True)
    with pytest.raises(LongLoraError, match="pads on the right; set tokenizer.padding_side='right'"):
        bounds(causal_mask_function, attention_mask=torch.arange(T)[None] > 3)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).train()
    longlora.use_s2(model, group_size=4, sink_tokens=1)
    return model


@torch.no_grad()
def logits(model: LlamaForCausalLM, ids: Tensor, **inputs: object) -> Tensor:
    return model(input_ids=ids, **inputs).logits


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 128, (1, length), generator=generator) for length in (13, 1, 9)]


@pytest.mark.parametrize(
    "options",
    [
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True, "return_position_ids": False},
        {"return_seq_idx": True, "return_flash_attn_kwargs": True},
        {},
    ],
    ids=str,
)
def test_every_way_of_the_flattening_collator_keeps_documents_apart(
    model: LlamaForCausalLM, options: dict[str, bool]
) -> None:
    features = [{"input_ids": document[0].tolist()} for document in documents()]
    batch = DataCollatorWithFlattening(return_tensors="pt", **options)(features)
    del batch["labels"]
    # Without positions each document keeps those of the row, which rotary embeddings do not feel.
    alone = torch.cat([logits(model, document) for document in documents()], dim=1)
    torch.testing.assert_close(logits(model, batch.pop("input_ids"), **batch), alone, rtol=1e-4, atol=1e-4)


def test_wrong_cu_seq_lens_are_refused(model: LlamaForCausalLM) -> None:
    ids = torch.cat(documents(), dim=1)
    for wrong in ([0, 9], [1, 23], [0, 14, 13, 23]):
        with pytest.raises(LongLoraError, match="cu_seq_lens_q=.*must rise from 0 to the number of tokens, 23"):
            logits(model, ids, cu_seq_lens_q=torch.tensor(wrong))
    with pytest.raises(LongLoraError, match="cu_seq_lens_q with 2 rows"):
        logits(model, ids.repeat(2, 1), cu_seq_lens_q=torch.tensor([0, 23]))


def test_positions_that_skip_ahead_are_what_they_are_to_transformers(model: LlamaForCausalLM) -> None:
    """PoSE: a new document without a padding mask, with any attention; none beside one."""
    ids = torch.cat(documents(), dim=1)
    skipped = torch.arange(23)[None] + 100 * (torch.arange(23) >= 10)[None]

    def begins_at_10(**inputs: object) -> bool:
        before, changed = logits(model, ids, position_ids=skipped, **inputs), ids.clone()
        changed[0, 2] = (changed[0, 2] + 1) % 128
        return torch.allclose(logits(model, changed, position_ids=skipped, **inputs)[:, 10:], before[:, 10:])

    longlora.use_s2(model, group_size=32, sink_tokens=1)
    sparse = [begins_at_10(), begins_at_10(attention_mask=torch.ones_like(ids))]
    longlora.use_full(model)
    # transformers looks at positions only where no cache is filled.
    full = [begins_at_10(use_cache=False), begins_at_10(use_cache=False, attention_mask=torch.ones_like(ids))]
    assert sparse == full == [True, False]
