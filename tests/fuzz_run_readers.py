"""Readers of a base model's folder, of checkpoints and of replies over the network, as the fuzzer calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from fuzz_inputs import OfFile, Reader
from tiny import save_tiny_model

from longlora.artifacts import MANIFEST, write_manifest
from longlora.config import ModelConfig
from longlora.config.plain_yaml import read_yaml
from longlora.data.longqa import endpoint
from longlora.errors import LongLoraError, RecipeError
from longlora.model.adapters import ADAPTER_WEIGHTS
from longlora.model.build import load_config, load_tokenizer, tokenizer_hash
from longlora.model.rope import rescale_rope
from longlora.training.checkpoint import complete_checkpoint, newest_checkpoint, saving_folder
from longlora.training.saved import CHECKSUM, Batches, Unlogged, checksum, require_source, saved_in

STATE = "trainer_state.json"


class Checkpoint:
    """The manifest of a checkpoint and the library's state; the checksum of what it says is made again."""

    def __init__(self, folder: Path) -> None:
        self._checkpoints = folder / "checkpoints"
        self._folder = self._checkpoints / "checkpoint-3"
        aside = saving_folder(self._checkpoints) / "checkpoint-3"
        aside.mkdir(parents=True)
        for name in (ADAPTER_WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
            (aside / name).write_bytes(name.encode())
        (aside / STATE).write_text(json.dumps({"global_step": 3, "log_history": [{"loss": 1.0}]}))
        complete_checkpoint(
            aside, weights=ADAPTER_WEIGHTS, keep=2, batches=Batches(1, 4, 2), processes=2,
            source={"data": "abc", "model": "def"}, unlogged=Unlogged(since=2, sums=(1.0, 2.0)),
        )  # fmt: skip
        self._names = (MANIFEST, STATE)
        self._good = [(self._folder / name).read_bytes() for name in self._names]
        self._facts = {key: value for key, value in json.loads(self._good[0]).items() if key not in ("files", CHECKSUM)}
        # Twice the manifest: as it is, and with its checksum made again.
        self.seeds = [bytes([number]) + self._good[number % 2] for number in range(3)]

    def read(self, data: bytes) -> None:
        which = (data[0] if data else 0) % 3
        if which == 1:
            (self._folder / STATE).write_bytes(data[1:])
            write_manifest(self._folder, **self._facts, **{CHECKSUM: checksum(self._facts)})
        else:
            (self._folder / STATE).write_bytes(self._good[1])
            (self._folder / MANIFEST).write_bytes(self._again(data[1:]) if which == 2 else data[1:])
        folder, _ = newest_checkpoint(self._checkpoints, ADAPTER_WEIGHTS)
        require_source(folder, {"data": "abc", "model": "def"})
        assert saved_in(folder).batches.on(1).rows > 0
        if unlogged := saved_in(folder).unlogged:
            unlogged.sum_of(0, 2)

    @staticmethod
    def _again(data: bytes) -> bytes:
        try:
            values = json.loads(data)
            facts = {key: value for key, value in values.items() if key not in ("files", CHECKSUM)}
            return json.dumps(values | {CHECKSUM: checksum(facts)}).encode()
        except (ValueError, AttributeError, TypeError, RecursionError):
            return data


class BaseModel:
    """The config of a base model, up to the longer context, and its tokenizer."""

    NAMES = ("config.json", "tokenizer_config.json", "tokenizer.json")

    def __init__(self, folder: Path) -> None:
        self._folder = save_tiny_model(folder / "base")
        self._good = [(self._folder / name).read_bytes() for name in self.NAMES]
        yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
        scaled = json.loads(self._good[0]) | {"rope_parameters": yarn}
        self.seeds = [bytes([number]) + content for number, content in enumerate(self._good)]
        self.seeds += [b"\0" + json.dumps(scaled).encode()] * 2

    def read(self, data: bytes) -> None:
        which = (data[0] if data else 0) % len(self.NAMES)
        for number, (name, content) in enumerate(zip(self.NAMES, self._good, strict=True)):
            (self._folder / name).write_bytes(data[1:] if number == which else content)
        source = ModelConfig(name_or_path=str(self._folder))
        if which == 0:
            rescale_rope(load_config(source), 2**20, "auto", None, None)
        else:
            tokenizer_hash(load_tokenizer(source))


def plain_yaml(folder: Path) -> Reader:
    def read(path: Path) -> None:
        try:
            read_yaml(path.read_bytes().decode("utf-8", "surrogateescape"))
        except yaml.YAMLError as error:  # what it promises, and its callers turn into errors of ours
            raise RecipeError(str(error)) from None

    card = b"license: apache-2.0\nlanguage: [en]\ndatasets: &a [b, c]\nmore: {x: *a, y: 2026-01-01, z: !!int 3}\n"
    return OfFile(folder / "a.yaml", [card, b'- |\n  text\n- >-\n  more\n- "q\\u0041"\n- 1e3\n- ~\n'], read)


class Replies:
    """What an OpenAI-compatible endpoint answers: the HTTP body, and the JSON that its model wrote."""

    def __init__(self, _folder: Path) -> None:
        draft = json.dumps({"question": "Where?", "answer": "There", "evidence": "the sea was calm"})
        body = json.dumps({"choices": [{"message": {"content": draft}}]})
        self.seeds = [b"\0" + body.encode(), b"\1" + draft.encode(), b"\1<think>x</think> Here: " + draft.encode()]
        text = "in the morning the sea was calm"
        self._window: Any = SimpleNamespace(find=lambda quote: [(0, 1)] if quote in text else [])

    def read(self, data: bytes) -> None:
        reply = data[1:].decode("utf-8", "replace")
        if not data or data[0] % 2 == 0:
            reply = endpoint.completion(data[1:])
        found = endpoint._read(reply, self._window)
        if isinstance(found, str):
            raise LongLoraError(found)


RUN_READERS: dict[str, Callable[[Path], Reader]] = {
    "checkpoint": Checkpoint,
    "base model": BaseModel,
    "plain YAML": plain_yaml,
    "endpoint replies": Replies,
}
