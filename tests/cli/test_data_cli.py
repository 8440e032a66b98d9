"""``longlora data longqa`` as a person meets it: a whole set, and one line for every mistake."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from longlora.cli import data
from longlora.errors import DataError

app = typer.Typer()
data.add_to(app)
WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "islet", "jetty", "knoll", "ledge"]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("one", "two", "three"):
        generator = random.Random(name)
        lines = [f"The {' '.join(generator.choices(WORDS, k=11))} of {name} {at}." for at in range(120)]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def run(*arguments: object) -> str:
    """What is printed; errors are raised, `app.main` prints them as one line."""
    result = CliRunner().invoke(app, ["data", "longqa", *(str(argument) for argument in arguments)])
    if isinstance(result.exception, DataError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_set_counted_by_a_tokenizer(texts: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    (texts / "latin.txt").write_bytes(b"caf\xe9 \xff")
    options = ["--tokens", 2000, "--tokens", 3000, "--per-document", 3, "--heldout", "two"]
    printed = run(texts, "--output", tmp_path / "set", *options, "--model", tiny_model_folder)
    assert "1 undecodable (latin)" in printed
    assert "train 12 rows of 2 documents; heldout 6 rows of 1 documents" in printed
    rows = [json.loads(line) for line in (tmp_path / "set" / "heldout.jsonl").read_text().splitlines()]
    assert {row["document"] for row in rows} == {"two"}
    for row in rows:  # a token of the tiny tokenizer is a byte
        assert row["tokens"] == len(row["messages"][0]["content"]) + len(row["answer"])
        assert 0.75 * row["length"] < row["tokens"] <= row["length"]
    assert "the tokenizer of" in (tmp_path / "set" / "README.md").read_text()
    assert "going on: 18 rows" in run(texts, "--output", tmp_path / "set", *options, "--model", tiny_model_folder)


def test_names_that_are_not_utf8_are_written_as_far_as_they_can_be(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, new in (("one", b"caf\xe8"), ("two", b"caf\xe9")):
        (texts / f"{name}.txt").rename(texts / os.fsdecode(new + b".txt"))
    options = ["--output", tmp_path / os.fsdecode(b"s\xe9t"), "--tokens", 1000, "--per-document", 2]
    options += ["--heldout", os.fsdecode(b"caf\xe8")]
    monkeypatch.setattr(sys, "argv", ["longlora", "data", "longqa", os.fsdecode(bytes(texts)), *map(str, options)])
    assert "s\ufffdt: train 4 rows of 2 documents; heldout 2 rows of 1 documents" in run(texts, *options)
    folder = tmp_path / os.fsdecode(b"s\xe9t")
    train = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["document"] for row in train} == {"caf\ufffd (2)", "three"}
    assert "--heldout 'caf\ufffd'" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_seed_that_no_library_takes_is_refused(texts: Path, tmp_path: Path) -> None:
    arguments = ["data", "longqa", str(texts), "--output", str(tmp_path / "set"), "--seed", str(2**32)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "4294967295" in result.output
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "find_sentense"], "did you mean find_sentence"),
        (["--heldout", "twoo"], "did you mean 'two'"),
        (["--heldout", "0.2", "--heldout", "two"], "give a share or names"),
        (["--heldout", "1.5"], "--heldout 1.5"),
        (["--tokens", "10"], "--tokens 10"),
        (["--tokens", "100000"], "no document has half of --tokens 100000"),
        (["--endpoint", "http://localhost:1"], "give --endpoint-model NAME"),
        (["--endpoint", "http://localhost:1", "--endpoint-model", "m", "--tasks", "find_sentence"], "leave out either"),
        (["--endpoint-model", "m"], "give --endpoint URL as well"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(texts: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        run(texts, "--output", tmp_path / "set", *options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b" \n", r"no document is left \(.*1 empty \(empty\)"),
        ("photo.txt", b"\x89PNG\xff\xfe", r"no document is left \(.*1 undecodable \(photo\)"),
        ("zero.txt", b"text\0more", "zero is binary"),
        ("photo.png", b"\x89PNG", "unknown type '.png'"),
        ("rows.jsonl", b'{"body": "x"}\n', "set --text-field NAME"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        run(tmp_path / name, "--output", tmp_path / "set")
    assert not (tmp_path / "set").exists()
