"""Fixtures: the tiny model of `tiny.py`, in memory and on disk, and fresh memory filled with NaN."""

from __future__ import annotations

import os

# Before transformers is imported: no test asks a hub for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many workers as cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from command_line import Result
from tiny import llama_config, save_tiny_model
from transformers import LlamaForCausalLM

from longlora.cli.app import main


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config()).eval()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied tiny Llama with a tokenizer, as a user would have it on disk."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tied", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: waiting for a second thread would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` and friends give NaN, so that reading what was never written fails a test."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args: object, _original: object = original, **kwargs: object) -> torch.Tensor:
            made = _original(*args, **kwargs)  # type: ignore[operator]
            return made.fill_(torch.nan) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture
def longlora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """The command in this process, in an empty folder: starting Python for each call would take seconds."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["longlora", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capfd.readouterr()
        return Result(int(stopped.value.code or 0), printed.out, printed.err)

    return run
