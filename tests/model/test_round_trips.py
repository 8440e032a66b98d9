"""Save, merge, export and reload with vocabularies of real size: logits that come back are those that were saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from export_cases import tiny_base, trained_run
from transformers import AutoModelForCausalLM

from longlora.model.adapters import load_adapter
from longlora.model.export import export_run
from longlora.model.merge import _base_in_float32, _source, merge_adapter
from longlora.model.sidecar import read_sidecar

SMOLLM, QWEN = 49_152, 151_936


def logits(model: torch.nn.Module, vocabulary: int) -> torch.Tensor:
    ids = torch.tensor([[1, 2, 3, vocabulary // 2, vocabulary - 1, 5, 100, vocabulary - 2]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits[0].float()


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [SMOLLM, QWEN])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_merged_exported_and_reloaded(tmp_path: Path, vocabulary: int, tied: bool, dtype: str) -> None:
    base = tiny_base(tmp_path / "base", vocab_size=vocabulary, tie_word_embeddings=tied)
    run, recipe = trained_run(tmp_path / "run", base, dtype=dtype)
    sidecar = read_sidecar(run.adapter)
    trained = logits(load_adapter(_base_in_float32(_source(sidecar), sidecar), str(run.adapter)), vocabulary)
    merge_adapter(run.adapter, run.merged)
    export_run(run, recipe, tmp_path / "out")
    merged, exported = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (run.merged, tmp_path / "out")
    )
    for model in (merged, exported):
        one = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert one is tied
        assert model.get_input_embeddings().weight.shape[0] == vocabulary
    found, again = logits(merged, vocabulary), logits(exported, vocabulary)
    assert torch.equal(found, again)
    spread = (trained.max() - trained.min()).item()
    assert (found - trained).abs().max().item() <= spread * (1e-5 if dtype == "float32" else 3e-2)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in stored.parameters()} == {getattr(torch, dtype)}
