"""The command line as a person meets it: a whole small run, and one line for every mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Result
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from longlora.cli.options import console


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        text = f"the {number} bears went over the mountain and saw another mountain. " * 20
        (texts / f"{number}.txt").write_text(text, encoding="utf-8")
    (texts / "empty.txt").write_text("", encoding="utf-8")
    (texts / "latin.txt").write_bytes(b"caf\xe9")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
run_dir: run
model: {{name_or_path: {tiny_model_folder}, dtype: float32}}
context: {{context_length: 512}}
attention: {{group_size: 64, sink_tokens: 2}}
data: {{train: [texts], heldout: [texts]}}
train: {{steps: 3, grad_accum_steps: 1, learning_rate: 0.01, warmup_steps: 0, save_steps: 2}}
eval:
  perplexity: {{max_documents: 2}}
  passkey: {{lengths: [400, 512], depths: [0.5], num_trials: 1}}
""",
        encoding="utf-8",
    )
    return path


def test_from_texts_to_a_report(longlora: Callable[..., Result], recipe: Path, tmp_path: Path) -> None:
    prepared = longlora("prepare", "recipe.yaml")
    assert prepared.returncode == 0, prepared.stderr
    assert "1 empty (empty), 1 undecodable (latin)" in prepared.stdout
    trained = longlora("train", "recipe.yaml", "train.steps=2")
    assert trained.returncode == 0, trained.stderr
    assert "step 2/2" in trained.stdout
    run = tmp_path / "run"
    # A run that was stopped before its end goes on with `resume`, here for one more step.
    shutil.rmtree(run / "adapter")
    resumed = longlora("resume", "run", "train.steps=3", "train.mlp_tile_tokens=64")
    assert resumed.returncode == 0, resumed.stderr
    assert "step 3/3" in resumed.stdout
    assert "step 2/3" not in resumed.stdout
    merged = longlora("merge", "run")
    assert merged.returncode == 0, merged.stderr
    model = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert model.config.max_position_embeddings == 512
    assert torch.isfinite(model(torch.zeros(1, 8, dtype=torch.long)).logits).all()
    measured = longlora("eval", "run")
    assert measured.returncode == 0, measured.stderr
    for variant in ("base", "rope_only", "trained"):
        rows = json.loads((run / "eval" / f"{variant}.json").read_text())
        assert {row["context_length"] for row in rows["perplexity"]} == {64, 512}
        assert len(rows["perplexity"]) == 4
        assert [row["task"] for row in rows["retrieval"]] == ["passkey"] * 2
        assert rows["attention"] == "full (sdpa)"
    reported = longlora("report", "run")
    assert reported.returncode == 0, reported.stderr
    assert "trained" in reported.stdout
    assert (run / "report.html").read_text().startswith("<!doctype html>") or "<html" in (
        run / "report.html"
    ).read_text()
    assert (run / "report.md").exists()
    assert "steps: 3" in (run / "recipe.yaml").read_text()
    assert json.loads((run / "results.json").read_text())["schema"] >= 1
    digits = rows["retrieval"][0]["prompt_sha256"][:12]
    shown = longlora("eval", "prompt", "run", digits)
    assert "The pass key is" in shown.stdout
    assert longlora("eval", "prompt", "run", "0" * 12).stderr.startswith(f"longlora: prompt '{'0' * 12}': none of the")
    # A run folder goes where its owner moves it.
    shutil.copytree(run, tmp_path / "moved")
    assert longlora("report", str(tmp_path / "moved")).returncode == 0
    shutil.rmtree(tmp_path / "moved" / "merged")
    moved = longlora("merge", "moved")
    assert moved.returncode == 0, moved.stderr
    assert (tmp_path / "moved" / "merged" / "config.json").exists()
    again = longlora("train", "run")
    assert again.returncode == 2
    assert again.stderr.startswith("longlora: run_dir run already holds adapter/")
    merged_again = longlora("merge", "run")
    assert "output folder run/merged already exists" in merged_again.stderr


def test_paths_and_names_are_printed_as_they_are(longlora: Callable[..., Result], recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "texts" / "empty.txt").rename(tmp_path / "texts" / os.fsdecode(b"[a]\xe9.txt"))
    run, short = "run_dir=runs/[exp1]", ["train.steps=1", "eval.tasks=[perplexity]", "eval.variants=[base]"]
    prepared = longlora("prepare", "recipe.yaml", run, *short)
    assert prepared.returncode == 0, prepared.stderr
    assert "1 empty ([a]\ufffd)" in prepared.stdout
    for verb, line in (
        (("train",), "adapter: runs/[exp1]/adapter"),
        (("train", "--or-resume"), "finished before: runs/[exp1]/adapter"),
        (("merge",), "merged: runs/[exp1]/merged, verified: "),
        (("eval",), "rows: runs/[exp1]/eval/base.json"),
        (("report",), "report: runs/[exp1]/report.html"),
    ):
        result = longlora(*verb, "recipe.yaml", run, *short)
        assert result.returncode == 0, result.stderr
        assert line in result.stdout


def test_no_part_of_a_name_becomes_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("a.jsonl:100: train", markup=False)
    assert capsys.readouterr().out == "a.jsonl:100: train\n"


def test_resume_takes_a_longer_run_and_memory_levers_alone(longlora: Callable[..., Result], recipe: Path) -> None:
    assert longlora("prepare", "recipe.yaml").returncode == 0
    changed = longlora("resume", "recipe.yaml", "train.learning_rate=0.5")
    assert changed.returncode == 2
    assert "train differs from the recipe" in changed.stderr
    assert "of train only steps, max_skipped_steps, activation_checkpointing, " in changed.stderr
    other_data = longlora("train", "recipe.yaml", "data.add_special_tokens=false")
    assert other_data.returncode == 2
    assert "prepare again" in other_data.stderr


def test_check_refuses_a_model_that_cannot_use_s2_in_one_line(longlora: Callable[..., Result], tmp_path: Path) -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "bloom")
    result = longlora("check", str(tmp_path / "bloom"))
    assert result.returncode == 2
    assert "'bloom' does not dispatch" in result.stderr


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("attention.full_attention_layers=[7]", "full_attention_layers=[7]"),
        ("attention.backend=varlen", "backend=varlen needs a CUDA device"),
    ],
)
def test_check_refuses_settings_that_the_model_or_machine_lacks(
    longlora: Callable[..., Result], recipe: Path, override: str, expected: str
) -> None:
    result = longlora("check", "recipe.yaml", override)
    assert result.returncode == 2, result.stdout
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"longlora: {expected}")


def test_check_passes_and_prints_a_line_a_check(longlora: Callable[..., Result], tiny_model_folder: Path) -> None:
    result = longlora("check", str(tiny_model_folder))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len([line for line in lines if line.startswith("ok")]) == 10
    assert lines[:2] == [
        "attention in training: sparse in layers 0-1 (groups of 2048, 4 sink tokens, shifted in half of the heads); "
        "backend grouped in bfloat16",
        "checked with groups of 16 and 4 sink tokens, in float32",
    ]
    assert "layer 0, head 0: groups; layer 0, head " in result.stdout
    assert Path("attention_pattern.png").read_bytes().startswith(b"\x89PNG")


def test_check_takes_the_attention_of_a_recipe(longlora: Callable[..., Result], recipe: Path) -> None:
    settings = ["attention.shift=layers", "attention.sink_tokens=48", "attention.full_attention_final_fraction=0.2"]
    result = longlora("check", "recipe.yaml", *settings, "--picture", "new/[folder]/picture.png")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "shifted in every other layer); backend grouped in float32" in result.stdout
    assert "checked with groups of 16 and 12 sink tokens" in result.stdout
    assert "ok   the final phase of training is full attention" in result.stdout
    assert "drawn: layer 0, head 0: groups; layer 1, head 0: shifted groups: new/[folder]/picture.png" in result.stdout
    assert Path("new/[folder]/picture.png").exists()


def test_check_of_full_attention(longlora: Callable[..., Result], recipe: Path) -> None:
    result = longlora("check", "recipe.yaml", "attention.pattern=full")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("attention in training: full in layers 0-1; backend grouped in float32\nok")
    assert "ok   training is full attention" in result.stdout
    assert "sparse" not in result.stdout


def test_check_of_full_attention_without_s2_says_what_fails(
    longlora: Callable[..., Result], recipe: Path, tmp_path: Path
) -> None:
    BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=16, n_layer=1, n_head=2)).save_pretrained("bloom")
    result = longlora("check", "recipe.yaml", "model.name_or_path=bloom", "attention.pattern=full")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "the model's own" in result.stdout
    assert "FAIL packed documents do not see each other" in result.stdout
    assert "2 checks failed" in result.stdout
    assert not Path("attention_pattern.png").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("train", "none.yaml"), "recipe none.yaml does not exist"),
        (("train", "recipe.yaml", "train.stepz=1"), "did you mean train.steps?"),
        (("prepare", "recipe.yaml", "data.train=[nowhere.txt]"), "nowhere.txt"),
        (("prepare", "recipe.yaml", "data.train=[]"), "data.train is empty"),
        (("prepare", "recipe.yaml", "data.min_document_tokens=100000"), "data.train: "),
        (("train", "recipe.yaml"), "run `longlora prepare` again"),
        (("train", "recipe.yaml", "context.context_length=64"), "context.context_length=64 is not longer"),
        (("train", "recipe.yaml", "model.name_or_path=./nowhere"), "model './nowhere' cannot be read"),
        (("resume", "recipe.yaml"), "recipe run does not exist"),
        (("merge", "recipe.yaml"), "run `longlora train` first"),
        (("eval", "recipe.yaml"), "run `longlora prepare` again"),
        (("report", "recipe.yaml"), "run `longlora eval` first"),
        (("prepare", "recipe.yaml", "data.heldout=[missing.txt]"), "missing.txt"),
        (
            ("prepare", "recipe.yaml", "run_dir=texts/0.txt"),
            "cannot use texts/0.txt: File exists; choose another run_dir",
        ),
        (
            ("prepare", "recipe.yaml", "run_dir=texts/0.txt/x"),
            "cannot use texts/0.txt/x: Not a directory; choose another",
        ),
        (("prepare", "recipe.yaml", f"run_dir={'x' * 300}"), ": File name too long; choose another run_dir"),
        (("prepare", "recipe.yaml", "run_dir=loop/x"), ": Too many levels of symbolic links; choose another run_dir"),
        (("check", "./nowhere"), "model './nowhere' cannot be read"),
        (
            ("check", "./nowhere", "--picture", "texts"),
            "picture texts cannot be written (it is a folder): give --picture",
        ),
        (("check", "./nowhere", "--picture", "recipe.yaml/x.png"), "picture recipe.yaml/x.png cannot be written ("),
        (("check", "./nowhere", "train.steps=2"), "takes no overrides such as train.steps=2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line_and_exit_code_2(
    longlora: Callable[..., Result], recipe: Path, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    result = longlora(*arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("longlora: ")
    assert expected in result.stderr
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_model_by_itself_is_measured_and_reported(
    longlora: Callable[..., Result], tiny_model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "book.txt").write_text("a short book about mountains. " * 30, encoding="utf-8")
    result = longlora("eval", "model", str(tiny_model_folder), "--text", "book.txt", "eval.tasks=[perplexity]")
    assert result.returncode == 0, result.stderr
    assert f"report: eval_{tiny_model_folder.name}/report.html" in result.stdout
    rows = json.loads((tmp_path / f"eval_{tiny_model_folder.name}" / "eval" / "base.json").read_text())
    assert [row["context_length"] for row in rows["perplexity"]] == [64]
    assert longlora("eval", "model", str(tiny_model_folder)).stderr == (
        "longlora: nothing to read: give at least one --text FILE\n"
    )
    wrong = longlora("eval", "model", "./nowhere", "--text", "book.txt")
    assert wrong.stderr.startswith("longlora: model './nowhere' cannot be read")
    assert wrong.returncode == 2
    long = longlora("eval", "model", str(tiny_model_folder), "--text", "book.txt", "--context-length", "4096")
    assert "--context-length 4096: the longest text (book) has 900 tokens; give a longer --text" in long.stderr


def test_an_unknown_task_is_one_line_with_the_one_that_was_meant(longlora: Callable[..., Result], recipe: Path) -> None:
    result = longlora("eval", "recipe.yaml", "eval.tasks=[rulr]")
    assert result.returncode == 2
    assert result.stderr.startswith("longlora: recipe.yaml: eval.tasks.0 = 'rulr': ")
    assert result.stderr.endswith("; did you mean ruler?\n")


def test_an_interrupted_measurement_says_how_it_goes_on(
    longlora: Callable[..., Result], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("longlora.evaluation.run.evaluate", interrupted)
    result = longlora("eval", "recipe.yaml")
    assert result.returncode == 130
    said = result.stderr.strip().splitlines()[-1]
    assert said.startswith("longlora: interrupted; whatever was finished is whole")
    assert said.endswith("the same `longlora eval` with a measurement")


def test_shards_of_another_tokenizer_and_damaged_shards(
    longlora: Callable[..., Result], recipe: Path, tmp_path: Path
) -> None:
    assert longlora("prepare", "recipe.yaml").returncode == 0
    tokens = tmp_path / "run" / "data" / "train" / "tokens.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    damaged = longlora("train", "recipe.yaml")
    assert damaged.returncode == 2
    assert "does not match its sha256" in damaged.stderr
    tokens.write_bytes(whole)
    manifest = tmp_path / "run" / "data" / "train" / "manifest.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**facts, "tokenizer_hash": "0" * 64}))
    other = longlora("train", "recipe.yaml")
    assert other.returncode == 2
    assert "tokenizer" in other.stderr
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_installed_command_starts_and_fails_cleanly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longlora", "train", "none.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "longlora: recipe none.yaml does not exist: give the path of a YAML file, see recipes/"
    ]


def test_help_lists_every_verb(longlora: Callable[..., Result]) -> None:
    shown = longlora("--help").stdout
    for verb in ("quickstart", "prepare", "train", "resume", "merge", "eval", "report", "check"):
        assert verb in shown


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_saves_the_step_says_so_in_one_line_and_can_be_resumed(
    longlora: Callable[..., Result], recipe: Path, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-m", "longlora"]
    assert longlora("prepare", "recipe.yaml").returncode == 0
    training = subprocess.Popen(
        [*command, "train", "recipe.yaml", "train.steps=10000", "train.save_steps=5000"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert training.stdout is not None
    for line in training.stdout:
        if line.startswith("step 5/"):
            break
    training.send_signal(sent)
    _, errors = training.communicate(timeout=120)
    assert training.returncode == code
    said = re.fullmatch(rf"longlora: interrupted by {sent.name}; step (\d+) is saved.*", errors.splitlines()[-1])
    assert said is not None, errors
    step = int(said[1])
    run = tmp_path / "run"
    assert (run / "checkpoints" / f"checkpoint-{step}" / "manifest.json").exists()
    assert not (run / "adapter").exists()
    resumed = subprocess.run(
        [*command, "resume", "recipe.yaml", f"train.steps={step + 2}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert f"step {step + 1}/" in resumed.stdout
    assert (run / "adapter" / "manifest.json").exists()
