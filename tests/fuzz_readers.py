"""Every reader of something that a stranger may have written, as the fuzzer calls it: bytes in, read to the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from export_cases import tiny_base, trained_run
from fuzz_inputs import OfFile, Reader, consume, lines, small_pdf
from fuzz_run_readers import RUN_READERS
from pyarrow import parquet
from report_cases import benchmarks, evaluation
from tiny import word_tokenizer

from longlora.artifacts import LOSS_MASK, MANIFEST, OFFSETS, SIDECAR, TOKENS, RunFolder, verify_manifest, write_manifest
from longlora.config import build_recipe, dump_recipe, load_recipe
from longlora.data.documents import Document, ReadReport, read_documents
from longlora.data.instruct_examples import read_examples
from longlora.data.instruct_tokens import Encoder
from longlora.data.shards import TokenRow, open_shard, write_rows, write_shard
from longlora.evaluation.loss.texts import read_texts
from longlora.evaluation.report.records import read_evaluations
from longlora.evaluation.report.training_log import read_training, skipped_steps
from longlora.evaluation.samples import Samples
from longlora.inference.files import text_of
from longlora.model.adapter_files import require_own_adapter
from longlora.model.adapters import ADAPTER_WEIGHTS, load_adapter
from longlora.model.build import load_config
from longlora.model.merge import _base_in_float32, _source
from longlora.model.sidecar import read_sidecar

VALUES = {"run_dir": "r", "model": {"name_or_path": "m"}, "context": {"context_length": 100}}


def recipe(folder: Path) -> Reader:
    whole = build_recipe(VALUES, ["data.train=[a, b]", "attention.full_attention_layers=[0, 1]"])
    with_alias = (
        "run_dir: r\nmodel: &m {name_or_path: m}\ncontext: {context_length: 100}\ndata: {train: &t [a], heldout: *t}\n"
    )
    return OfFile(
        folder / "r.yaml",
        [dump_recipe(whole).encode(), with_alias.encode()],
        lambda path: dump_recipe(load_recipe(path)),
    )


class Overrides:
    """Overrides of the command line."""

    def __init__(self, _folder: Path) -> None:
        self.seeds = [
            b"train.steps=20", b"data.train=[a, b]", b"adapter={method: full}", b"eval.longppl.evaluator=null",
            b"eval.passkey.depths=[0.1, 0.5]", b"train.learning_rate=3e-4",
        ]  # fmt: skip

    def read(self, data: bytes) -> None:
        build_recipe(VALUES, [data.decode("utf-8", "surrogateescape")])


def documents(folder: Path, name: str, seeds: list[bytes]) -> Reader:
    return OfFile(folder / name, seeds, lambda path: consume(read_documents([str(path)], "text", ReadReport())))


def table(rows: list[dict[str, Any]], path: Path, **options: Any) -> bytes:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path.read_bytes()


TEXTS = [{"text": "the sea was calm", "n": 1}, {"text": "brot und käse " * 20, "n": 2}, {"text": None, "n": 3}]
CHAT = {
    "messages": [{"role": "user", "content": "a\n\nb\n\nc?"}, {"role": "assistant", "content": "d"}],
    "document_end": 1,
}
ALPACA = {"instruction": "The paper begins. x Now the paper ends. y?", "input": "", "output": "z", "file": "f"}
PROMPT = {"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}], "completion": "a"}
QUESTION = {"question": "q?", "document": "long " * 50, "answer": "a"}


class Instructions:
    """Instruction records as conversations, and as tokens."""

    def __init__(self, path: Path, seeds: list[bytes]) -> None:
        self.seeds, self._path = seeds, path
        tokenizer = word_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
        tokenizer.chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
        self._encoder = Encoder(tokenizer, 200, "middle")

    def read(self, data: bytes) -> None:
        self._path.write_bytes(data)
        for number, example in enumerate(read_examples(str(self._path), "be kind", "\n\n")):
            if number < 3 and self._encoder.unusable(example) is None and len(str(example.messages)) < 20_000:
                self._encoder.encode(example)


class Shard:
    """A token shard whose manifest was made again for its mutated file: sizes and sha256 are right."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "shard"
        rows = [TokenRow("a", [1, 2, 3], [0, 1, 1]), TokenRow("b", [4, 5], [0, 1])]
        write_rows(self._folder, rows, tokenizer_hash="abc", nothing_left=str, facts=lambda: {"kind": "instruct"})
        self._files = {name: (self._folder / name).read_bytes() for name in (TOKENS, OFFSETS, LOSS_MASK)}
        # The first byte says which file the rest is.
        self.seeds = [bytes([number]) + content for number, content in enumerate(self._files.values())]
        manifest = json.loads((self._folder / MANIFEST).read_text())
        self._facts = {key: value for key, value in manifest.items() if key not in ("files", "tokens", "documents")}

    def read(self, data: bytes) -> None:
        name = list(self._files)[(data[0] if data else 0) % len(self._files)]
        for other, content in self._files.items():
            (self._folder / other).write_bytes(data[1:] if other == name else content)
        write_manifest(self._folder, **self._facts)
        shard = open_shard(self._folder, "abc", vocabulary=10)
        for index in range(len(shard)):
            mask = shard.loss_mask(index)
            assert len(shard.document(index)) == len(mask) > 0
        assert shard.occurring_tokens().min() >= 0
        assert np.all(shard.occurring_tokens() < 10)


class Manifest:
    """The manifest of a shard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "shard"
        write_shard(
            self._folder, [Document("a", "sea"), Document("b", "brot")], word_tokenizer(),
            tokenizer_hash="abc", add_special_tokens=False, report=ReadReport(),
        )  # fmt: skip
        self.seeds = [(self._folder / MANIFEST).read_bytes()]

    def read(self, data: bytes) -> None:
        (self._folder / MANIFEST).write_bytes(data)
        verify_manifest(self._folder, "again")
        shard = open_shard(self._folder, None)
        assert [len(shard.document(index)) for index in range(len(shard))] == [3, 4]


class Adapter:
    """Everything in an adapter folder that is read before and by the merge; its manifest is made again."""

    def __init__(self, folder: Path) -> None:
        self._run, _ = trained_run(folder / "run", tiny_base(folder / "base"))
        self._folder = self._run.adapter
        self._sidecar = read_sidecar(self._folder)
        self._files = {name: (self._folder / name).read_bytes() for name in (ADAPTER_WEIGHTS, "adapter_config.json")}
        # Mostly the header of the weights is of interest: the data behind it is numbers.
        self.seeds = [bytes([number]) + content for number, content in enumerate(self._files.values())]
        self._state = _base_in_float32(_source(self._sidecar), self._sidecar)

    def read(self, data: bytes) -> None:
        name = list(self._files)[(data[0] if data else 0) % len(self._files)]
        for other, content in self._files.items():
            (self._folder / other).write_bytes(data[1:] if other == name else content)
        require_own_adapter(self._folder)
        model = load_adapter(self._state, str(self._folder))
        model.unload()


class SidecarFile:
    """``longlora.json``, applied to the base model's config."""

    def __init__(self, folder: Path) -> None:
        self._run, _ = trained_run(folder / "run", tiny_base(folder / "base"))
        self._config = load_config(_source(read_sidecar(self._run.adapter)))
        self.seeds = [(self._run.adapter / SIDECAR).read_bytes()]

    def read(self, data: bytes) -> None:
        (self._run.adapter / SIDECAR).write_bytes(data)
        read_sidecar(self._run.adapter).apply(self._config)


class Evaluations:
    """Rows of an evaluation, of benchmarks, of samples and of training."""

    def __init__(self, folder: Path) -> None:
        self._run = RunFolder(folder / "run")
        self._run.evaluation("base").parent.mkdir(parents=True)
        self._paths = [
            self._run.evaluation("base"), self._run.harness("base"), self._run.metrics, self._run.samples("base"),
        ]  # fmt: skip
        row = {
            "task": "arc_easy",
            "metric": "acc",
            "value": 0.5,
            "stderr": 0.1,
            "samples": 10,
            "higher_is_better": True,
        }
        harness = benchmarks(evaluation("base"), [row])
        rows = lines(*({"step": step, "loss": 3.0, "tokens": 10, "seconds": 1.0} for step in range(1, 4)))
        head = json.dumps({"schema": 2, "model": "m"}, sort_keys=True)
        samples = f"{head}\n".encode() + lines({"key": "a", "row": {"x": 1}}, {"key": "b", "row": {"x": 2}})
        good = [json.dumps(evaluation("base")).encode(), json.dumps(harness).encode(), rows, samples]
        self._paths[0].write_bytes(good[0])
        self.seeds = [bytes([number]) + content for number, content in enumerate(good)]

    def read(self, data: bytes) -> None:
        which = (data[0] if data else 0) % len(self._paths)
        before = self._paths[0].read_bytes()
        self._paths[which].write_bytes(data[1:])
        try:
            if which == 3:
                with Samples(self._paths[3], {"model": "m"}) as samples:
                    samples.get("a")
            elif which == 2:
                read_training(self._run)
                skipped_steps(self._run)
            else:
                read_evaluations(self._run)
        finally:
            self._paths[which].unlink(missing_ok=True)
            self._paths[0].write_bytes(before)


def stream(folder: Path) -> Reader:
    tokens = np.array([1, 5, 6, 7, 1, 8, 9, 2], dtype="<u2").tobytes()
    tokenizer = word_tokenizer()
    return OfFile(folder / "t.bin", [tokens * 20, tokens], lambda path: read_texts([str(path)], tokenizer))


class Uploads:
    """Files that a person asks about; the first byte says which kind."""

    NAMES = ("a.txt", "a.html", "a.pdf")

    def __init__(self, _folder: Path) -> None:
        html = b"<html><head><title>t</title></head><body><p>a &amp; b</p><pre> x\n y</pre>"
        html += b"<table><tr><td>1</td><td>2</td></table>"
        self.seeds = [b"\0" + b"the sea \xc3\xa4\n" * 5, b"\1" + html, b"\2" + small_pdf()]

    def read(self, data: bytes) -> None:
        text_of(data[1:], self.NAMES[(data[0] if data else 0) % len(self.NAMES)])


READERS: dict[str, Callable[[Path], Reader]] = {
    "recipe": recipe,
    "overrides": Overrides,
    "documents.jsonl": lambda folder: documents(folder, "d.jsonl", [lines(*TEXTS)]),
    "documents.parquet": lambda folder: documents(
        folder,
        "d.parquet",
        [table(TEXTS, folder / "s.parquet"), table(TEXTS, folder / "s.parquet", compression="none")],
    ),
    "documents.txt": lambda folder: documents(folder, "d.txt", [b"the sea\r\nwas calm \xc3\xa4\n" * 10]),
    "instructions.jsonl": lambda folder: Instructions(
        folder / "i.jsonl", [lines(CHAT, CHAT), lines(ALPACA), lines(PROMPT), lines(QUESTION)]
    ),
    "instructions.json": lambda folder: Instructions(
        folder / "i.json", [json.dumps([ALPACA, ALPACA]).encode(), json.dumps([CHAT]).encode()]
    ),
    "instructions.parquet": lambda folder: Instructions(
        folder / "i.parquet", [table([CHAT, CHAT], folder / "s.parquet", compression="none")]
    ),
    "shard": Shard,
    "manifest": Manifest,
    "sidecar": SidecarFile,
    "adapter": Adapter,
    "evaluation rows": Evaluations,
    "tokens.bin of uint16": stream,
    "uploaded files": Uploads,
    **RUN_READERS,
}

torch.set_num_threads(1)
