"""Fixtures: the tiny model of `tiny.py`, in memory and on disk, and fresh memory filled with NaN."""

from __future__ import annotations

import os

# Before transformers is imported: no test asks a hub for anything.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
import torch
from tiny import llama_config, save_tiny_model
from transformers import LlamaForCausalLM


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config()).eval()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied tiny Llama with a tokenizer, as a user would have it on disk."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tied", tie_word_embeddings=True)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and friends give NaN, so that reading what was never written fails a test."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args: object, _original: object = original, **kwargs: object) -> torch.Tensor:
            made = _original(*args, **kwargs)  # type: ignore[operator]
            return made.fill_(torch.nan) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, poisoned)
