"""The examples run end to end on the tiny model: they train sparse, evaluate full, and save what loads again."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import os
import random
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import longlora

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
STEPS, ACCUMULATE, GROUP_SIZE = 4, 2, 16  # steps enough to see every row once
# The tiny model knows 64 tokens: the loop extends it, the others stay within.
CONTEXT_LENGTH = {"accelerate_loop": 128, "transformers_trainer": 64, "trl_sft": 64}
DOCUMENT_LENGTHS = (150, 40, 90, 20, 200, 60)
"""Tokens, which are bytes; the last document is held out."""


@cache
def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Run:
    """One example from beginning to end."""

    output: Path
    model: nn.Module
    """What the example called `use_s2` with."""
    printed: str
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """What the decoder got in each forward pass, and whether it was in training mode."""

    @property
    def training_losses(self) -> list[float]:
        return [float(loss) for loss in re.findall(r"(?:step \d+: loss |\{'loss': ')([\d.]+)", self.printed)]

    @property
    def heldout_losses(self) -> list[float]:
        """Before and after training."""
        return [float(loss) for loss in re.findall(r"(\d+\.\d+) (?:before|after)", self.printed)]


def run(name: str, model: Path, texts: list[Path], output: Path, *, sparse: bool) -> Run:
    """Run an example, with `use_s2` as it is or doing nothing."""
    use_s2, calls = longlora.use_s2, []

    def recorded(model: nn.Module, **settings: int) -> None:
        calls.append((model, settings))
        if sparse:
            use_s2(model, **settings)
        decoder = (model.get_base_model() if isinstance(model, PeftModel) else model).base_model
        decoder.register_forward_pre_hook(note, with_kwargs=True)

    inputs: list[dict[str, Any]] = []

    def note(decoder: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> None:
        assert not args
        inputs.append({"training": decoder.training, **kwargs})

    arguments = {
        "--model": model,
        "--output": output,
        "--steps": STEPS,
        "--context-length": CONTEXT_LENGTH[name],
        "--group-size": GROUP_SIZE,
        "--accumulate": ACCUMULATE,
        "--learning-rate": 0.01,
    }
    argv = [str(part) for option in arguments.items() for part in option]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(longlora, "use_s2", recorded)
        example(name).main([*argv, "--data", *map(str, texts)])
    ((used, settings),) = calls
    assert settings["group_size"] == GROUP_SIZE
    return Run(output, used, printed.getvalue(), inputs)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, letters = tmp_path_factory.mktemp("texts"), random.Random(0)
    paths = [folder / f"{number}.txt" for number in range(len(DOCUMENT_LENGTHS))]
    for path, length in zip(paths, DOCUMENT_LENGTHS, strict=True):
        path.write_text("".join(letters.choices("abcdefgh ", k=length)), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def process_state() -> Iterator[None]:
    """accelerate keeps the precision and the devices of a process in one place and refuses other ones.

    And one thread: for tensors this small more of them only wait for each other.
    """
    environment, threads = dict(os.environ), torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module", params=NAMES)
def runs(
    request: pytest.FixtureRequest,
    tiny_model_folder: Path,
    texts: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
    process_state: None,
) -> tuple[str, Run, Run]:
    """The name of an example, its run as it is, and the same run without its second line."""
    folder = tmp_path_factory.mktemp(request.param)
    made = []
    for sparse in (True, False):
        made.append(run(request.param, tiny_model_folder, texts, folder / str(sparse), sparse=sparse))
        AcceleratorState._reset_state(reset_partial_state=True)
    return request.param, *made


def logits(model: nn.Module, row: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=row["input_ids"], position_ids=row["position_ids"], use_cache=False).logits


def documents(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The documents of one packed row, each in a row of its own."""
    starts = (row["position_ids"][0] == 0).nonzero().flatten().tolist()
    pieces = [slice(*bounds) for bounds in itertools.pairwise([*starts, row["input_ids"].shape[1]])]
    return [{key: row[key][:, piece] for key in ("input_ids", "position_ids")} for piece in pieces]


def training_inputs(made: Run) -> list[dict[str, Any]]:
    return [inputs for inputs in made.inputs if inputs["training"]]


def test_every_example_is_known_here() -> None:
    assert set(NAMES) == set(CONTEXT_LENGTH)


def test_training_is_sparse_and_evaluation_full(runs: tuple[str, Run, Run]) -> None:
    """Same weights, same rows: the loss of the first step differs, the one held out does not; later all differ."""
    _, sparse, full = runs
    assert len(sparse.training_losses) == len(full.training_losses) == STEPS
    assert abs(sparse.training_losses[0] - full.training_losses[0]) > 1e-3
    assert sparse.heldout_losses[0] == full.heldout_losses[0]
    assert sparse.heldout_losses[1] != full.heldout_losses[1]
    assert sparse.heldout_losses[1] < sparse.heldout_losses[0] - 0.1


def test_documents_arrive_packed(runs: tuple[str, Run, Run]) -> None:
    """Restarting positions and no attention mask, in every micro batch of every step."""
    _, sparse, full = runs
    rows = training_inputs(sparse)
    assert len(rows) == STEPS * ACCUMULATE
    assert all(row.get("attention_mask") is None for row in rows)
    assert any(int((row["position_ids"] == 0).sum()) > 1 for row in rows)
    assert max(int(row["position_ids"].max()) for row in rows) > 2 * GROUP_SIZE
    for row, same in zip(rows, training_inputs(full), strict=True):
        assert torch.equal(row["input_ids"], same["input_ids"])


def test_no_document_loses_its_end(runs: tuple[str, Run, Run], tiny_model_folder: Path, texts: list[Path]) -> None:
    """What is longer than the context is cut into pieces and not dropped."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    trained = [" ".join(map(str, row["input_ids"][0].tolist())) for row in training_inputs(runs[1])]
    for path in texts[:-1]:
        end = " ".join(map(str, tokenizer(path.read_text(encoding="utf-8"))["input_ids"][-6:]))
        assert any(end in row for row in trained), path.name


def test_attention_of_the_trained_model(runs: tuple[str, Run, Run]) -> None:
    """Its mode switches the pattern, and packed documents are as if each were alone; in float32, without autocast."""
    _, sparse, _ = runs
    model = sparse.model.get_base_model() if isinstance(sparse.model, PeftModel) else sparse.model
    model.float()
    row = max(training_inputs(sparse), key=lambda inputs: len(documents(inputs)))
    alone = [{mode: logits(model.train(mode), document) for mode in (True, False)} for document in documents(row)]
    assert len(alone) > 1
    training, evaluation = logits(model.train(), row), logits(model.eval(), row)
    torch.testing.assert_close(training, torch.cat([document[True] for document in alone], dim=1))
    torch.testing.assert_close(evaluation, torch.cat([document[False] for document in alone], dim=1))
    assert (training - evaluation).abs().max() > 0.1
    longlora.use_full(model)
    assert torch.equal(logits(model.eval(), row), evaluation)
    assert torch.equal(logits(model.train(), row), evaluation)


def test_what_was_saved_loads_as_an_ordinary_model(
    runs: tuple[str, Run, Run], tiny_model_folder: Path, texts: list[Path]
) -> None:
    """And has the held-out loss that the example printed, up to the rounding of bfloat16."""
    name, sparse, _ = runs
    loaded = AutoModelForCausalLM.from_pretrained(sparse.output, dtype=torch.bfloat16).eval()
    assert isinstance(loaded, LlamaForCausalLM)
    assert loaded.config._attn_implementation == "sdpa"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    ids = tokenizer(texts[-1].read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    if name == "trl_sft":  # TRL ends a document with its end token
        ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
    with torch.no_grad():
        loss = loaded(input_ids=ids, labels=ids).loss.item()
    before, after = sparse.heldout_losses
    assert abs(loss - after) < 0.02 < abs(loss - before)
    assert (sparse.output / "adapter_model.safetensors").exists() is (name != "accelerate_loop")


def test_the_loop_saves_its_rescaled_rope(runs: tuple[str, Run, Run]) -> None:
    name, sparse, _ = runs
    config = AutoModelForCausalLM.from_pretrained(sparse.output).config
    extended = name == "accelerate_loop"
    assert config.max_position_embeddings == (128 if extended else 64)
    assert config.rope_parameters["rope_type"] == ("yarn" if extended else "default")


@pytest.mark.parametrize("name", NAMES)
def test_one_file_is_too_few(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example(name).main(["--output", str(tmp_path), "--data", "one.txt"])
    assert "two files or more" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_documented_commands_fit_the_options(name: str) -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    script = f"examples/{name}.py"
    lines = [line.strip() for line in f"{readme}\n{example(name).__doc__}".splitlines()]
    commands = [
        line.partition("#")[0] for line in lines if f" {script} " in line and line.startswith(("python", "acc"))
    ]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.replace("books/*.txt", "books/a.txt books/b.txt"))
        example(name).parse_arguments(words[words.index(script) + 1 :])
