"""The measurement as a whole: every task asked, every row kept at once, nothing measured twice."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from longlora.artifacts import RunFolder
from longlora.config import Recipe, build_recipe
from longlora.errors import DataError, RunFolderError
from longlora.evaluation import measurement
from longlora.evaluation.run import evaluate, find_prompt

TASKS = ["perplexity", "longppl", "passkey", "needle", "lines", "topics", "ruler"]
WORDS = "the old river turns east near the mill and the bridge stands where two roads meet"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    sentences = [f"In year {number} {WORDS} {number * 7}." for number in range(400)]
    path.write_text(" ".join(sentences), encoding="utf-8")
    return path


def recipe(folder: Path, model: Path, text: Path, *overrides: str, **evaluation: Any) -> Recipe:
    values = {
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "context": {"context_length": 2048},
        "eval": {
            "variants": ["base"],
            "haystack": [str(text)],
            "perplexity": {"texts": [str(text)], "context_lengths": [512, 1024]},
            "longppl": {"context_length": 512, "short_context": 128, "block_tokens": 64, "gain": 0, "ceiling": 100},
            "passkey": {"lengths": [512], "depths": [0.2, 0.8], "num_trials": 1},
            "needle": {"lengths": [1024], "depths": [0.5], "distractors": 1},
            "lines": {"lengths": [1024], "num_trials": 1},
            "topics": {"lengths": [1600], "num_trials": 1},
            "ruler": {"tasks": ["niah_single_2", "fwe"], "lengths": [2048], "num_samples": 1},
            **evaluation,
        },
    }
    return build_recipe(values, overrides)


def rows_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_every_task_leaves_rows_costs_and_what_it_was_measured_on(
    tmp_path: Path, tiny_model_folder: Path, text: Path
) -> None:
    made = rows_of(evaluate(recipe(tmp_path, tiny_model_folder, text, tasks=TASKS), Console(quiet=True))[0])
    assert [row["context_length"] for row in made["perplexity"]] == [1024, 512]
    assert all(row["bytes"] > 0 for row in made["perplexity"])
    assert made["longppl"][0]["key_tokens"] > 0
    tasks = [row["task"] for row in made["retrieval"]]
    assert tasks == ["passkey"] * 2 + ["needle", "lines", "topics"] + ["ruler"] * 2
    assert {row["name"] for row in made["retrieval"][-2:]} == {"niah_single_2", "fwe"}
    for row in made["retrieval"]:
        assert 0 <= row["score"] <= 1
        assert row["tokens"] <= row["length"]
        assert len(row["prompt_sha256"]) == 64
    costs = {row["task"]: row for row in made["cost"]}
    assert list(costs) == TASKS
    assert costs["passkey"]["prompts"] == 2
    read = sum(row["tokens"] for row in made["retrieval"] if row["task"] == "passkey")
    assert costs["passkey"]["tokens_read"] + costs["passkey"]["tokens_reused"] == read
    assert costs["passkey"]["tokens_reused"] > 0
    assert made["covered_context_length"] == 64
    assert made["attention"] == "full (sdpa)"
    assert made["settings"]["tasks"] == TASKS


def test_a_stopped_measurement_goes_on_where_it_was_and_gives_the_same_rows(
    tmp_path: Path, tiny_model_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(tmp_path, tiny_model_folder, text, tasks=["perplexity", "passkey", "lines"])
    whole = rows_of(evaluate(wanted, Console(quiet=True))[0])
    samples = RunFolder(wanted.run_path).samples("base")
    lines = samples.read_text(encoding="utf-8").splitlines()
    # As it looks when the process is killed while it writes its third row.
    samples.write_text("\n".join([*lines[:3], lines[3][:40]]), encoding="utf-8")
    asked = []
    answers = measurement.PromptReader.answers

    def counted(reader: Any, prompts: Any) -> Any:
        asked.append(len(prompts))
        return answers(reader, prompts)

    monkeypatch.setattr(measurement.PromptReader, "answers", counted)
    again = rows_of(evaluate(wanted, Console(quiet=True))[0])
    assert sum(asked) == len(whole["retrieval"]) - 1
    assert again["perplexity"] == whole["perplexity"]
    assert again["positions"] == whole["positions"]
    # Another prompt may come first now, and sums of other pieces round otherwise.
    for now, then in zip(again["retrieval"], whole["retrieval"], strict=True):
        assert now == {**then, "log_probability": pytest.approx(then["log_probability"], abs=1e-4)}
    asked.clear()
    evaluate(wanted, Console(quiet=True))
    assert asked == []


def test_rows_of_another_model_are_measured_again(tmp_path: Path, tiny_model_folder: Path, text: Path) -> None:
    wanted = recipe(tmp_path, tiny_model_folder, text, tasks=["lines"])
    evaluate(wanted, Console(quiet=True))
    samples = RunFolder(wanted.run_path).samples("base")
    lines = samples.read_text(encoding="utf-8").splitlines()
    head = json.loads(lines[0]) | {"weights": "others"}
    row = json.loads(lines[1])
    row["row"]["rows"]["answer"] = "of another model"
    samples.write_text("\n".join([json.dumps(head, sort_keys=True), json.dumps(row)]) + "\n", encoding="utf-8")
    made = rows_of(evaluate(wanted, Console(quiet=True))[0])
    assert made["retrieval"][0]["answer"] != "of another model"


def test_a_prompt_is_made_again_from_its_row(tmp_path: Path, tiny_model_folder: Path, text: Path) -> None:
    wanted = recipe(tmp_path, tiny_model_folder, text, tasks=["needle", "lines"])
    made = rows_of(evaluate(wanted, Console(quiet=True))[0])
    for row in made["retrieval"]:
        shown = find_prompt(wanted, row["prompt_sha256"][:16])
        assert all(reference in shown for reference in row["references"])
    with pytest.raises(DataError, match="none of the 2 prompts"):
        find_prompt(wanted, "f" * 64)


def test_lengths_beyond_what_rope_covers_are_said(
    tmp_path: Path, tiny_model_folder: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(recipe(tmp_path, tiny_model_folder, text, tasks=["passkey"]), Console(soft_wrap=True))
    assert "base: its RoPE covers 64 tokens; 512 tokens lie beyond" in capsys.readouterr().out


def test_nothing_trained_is_one_line(tmp_path: Path, tiny_model_folder: Path, text: Path) -> None:
    wanted = recipe(tmp_path, tiny_model_folder, text, variants=["trained"], tasks=["lines"])
    with pytest.raises(RunFolderError, match="run `longlora train` first"):
        evaluate(wanted, Console(quiet=True))
