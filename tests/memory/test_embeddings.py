"""One embedding table in training instead of two, and only the rows that occur: what is held, trained and saved."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import llama_config
from torch import nn
from transformers import LlamaForCausalLM

from longlora.config import AdapterConfig
from longlora.errors import LongLoraError
from longlora.memory.embeddings import free_frozen_embeddings
from longlora.model.adapters import add_adapter, save_adapter

TABLE = 128 * 72
ROWS = list(range(3, 60))
IDS = torch.tensor([[3, 9, 41, 9, 59, 12, 3], [7, 8, 9, 10, 11, 12, 13]])


def adapted(tied: bool, rows: list[int] | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(tie_word_embeddings=tied)).to(dtype)
    return add_adapter(model, AdapterConfig(train_norms=False), rows).train()


def bytes_of(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
def test_the_frozen_table_is_gone_and_nothing_else_changes(tied: bool, tmp_path: Path) -> None:
    model = adapted(tied, dtype=torch.bfloat16)
    original = weakref.ref(model.get_base_model().get_input_embeddings().original_module.weight)
    before, held = gradients_in_autocast(model), bytes_of(model)
    (tmp_path / "whole").mkdir()
    save_adapter(model, tmp_path / "whole")
    assert free_frozen_embeddings(model) == TABLE * 2
    gc.collect()
    assert original() is None, "the storage itself must be free"
    assert held - bytes_of(model) == TABLE * 2
    after = gradients_in_autocast(model)
    assert torch.equal(before[0], after[0])
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(grad, after[1][name]) for name, grad in before[1].items())
    (tmp_path / "freed").mkdir()
    save_adapter(model, tmp_path / "freed")
    whole, freed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "freed"))
    assert whole.keys() == freed.keys()
    assert all(torch.equal(tensor, freed[name]) for name, tensor in whole.items())


def gradients_in_autocast(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return gradients(model)


def test_switching_the_adapter_off_is_an_error_then() -> None:
    model = adapted(True)
    free_frozen_embeddings(model)
    with pytest.raises(LongLoraError, match="adapter cannot be switched off here"), model.disable_adapter():
        model(input_ids=IDS)
    model(input_ids=IDS)
    assert free_frozen_embeddings(model) == 0


def test_nothing_to_free_where_embeddings_are_frozen() -> None:
    torch.manual_seed(0)
    model = add_adapter(LlamaForCausalLM(llama_config()), AdapterConfig(train_embeddings=False))
    assert free_frozen_embeddings(model) == 0
    model(input_ids=IDS)


def delta_name(model: nn.Module) -> str:
    (name,) = [name for name, p in model.named_parameters() if "trainable_tokens" in name and p.requires_grad]
    return name


def test_occurring_rows_untied_are_trained_as_all_rows_would_be() -> None:
    whole, rows = adapted(False), adapted(False, ROWS)
    parameters = dict(rows.named_parameters())
    assert parameters[delta_name(rows)].shape == (len(ROWS), 72)
    assert parameters[delta_name(rows)].dtype is torch.float32
    (loss, grads), (some_loss, some) = gradients(whole), gradients(rows)
    assert torch.equal(loss, some_loss)
    table = grads["base_model.model.model.embed_tokens.modules_to_save.default.weight"]
    torch.testing.assert_close(some[delta_name(rows)], table[ROWS])
    others = [row for row in range(128) if row not in ROWS]
    assert not table[others].any(), "no other row would have been trained"
    for name, grad in some.items():
        if "lora" in name:
            torch.testing.assert_close(grad, grads[name])


def test_occurring_rows_tied_leave_out_what_only_the_output_trains() -> None:
    whole, rows = adapted(True), adapted(True, ROWS)
    (loss, grads), (some_loss, some) = gradients(whole), gradients(rows)
    assert torch.equal(loss, some_loss)
    table = grads["base_model.model.model.embed_tokens.modules_to_save.default.weight"]
    torch.testing.assert_close(some[delta_name(rows)], table[ROWS])
    assert table[100].any(), "this is what the recipe's docstring says of tied output embeddings"
