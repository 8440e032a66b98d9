"""The measurement as a whole: every task asked, every row kept at once, nothing measured twice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import save_tiny_model
from transformers import LlamaForCausalLM

from longlora.artifacts import RunFolder
from longlora.config import Recipe, build_recipe
from longlora.errors import DataError, ModelError, RecipeError, RunFolderError
from longlora.evaluation import measurement
from longlora.evaluation.progress import CostProgress
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
    wanted = recipe(tmp_path, tiny_model_folder, text, tasks=TASKS, batch_tokens=1)
    made = rows_of(evaluate(wanted, Console(quiet=True))[0])
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


def test_an_interrupt_keeps_what_was_answered_and_the_time_left_counts_only_the_rest(
    tmp_path: Path, tiny_model_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(
        tmp_path, tiny_model_folder, text, tasks=["perplexity", "lines"], lines={"lengths": [1024], "num_trials": 3}
    )
    answers = measurement.PromptReader.answers

    def interrupted(reader: Any, prompts: Any) -> Any:
        yield next(answers(reader, prompts))
        raise KeyboardInterrupt

    monkeypatch.setattr(measurement.PromptReader, "answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(wanted, Console(quiet=True))
    monkeypatch.setattr(measurement.PromptReader, "answers", answers)
    samples = RunFolder(wanted.run_path).samples("base")
    assert len(samples.read_text(encoding="utf-8").splitlines()) == 1 + 2, "the model, a document, a prompt"
    totals = []
    enter = CostProgress.__enter__

    def noted(progress: CostProgress) -> CostProgress:
        totals.append(progress._total)
        return enter(progress)

    monkeypatch.setattr(CostProgress, "__enter__", noted)
    evaluate(wanted, Console(quiet=True))
    assert totals[0] < 1, "the document is there already"
    assert len(samples.read_text(encoding="utf-8").splitlines()) == 1 + 1 + 3


def test_prompts_that_were_answered_together_are_done_together(
    tmp_path: Path, tiny_model_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needle = {"lengths": [1024], "depths": [0.5], "num_trials": 4}
    wanted = recipe(tmp_path, tiny_model_folder, text, tasks=["needle"], needle=needle, batch_tokens=8192)
    steps, costs = [], []
    order, advance = measurement.PromptReader.order, CostProgress.advance
    monkeypatch.setattr(
        measurement.PromptReader, "order", lambda reader, prompts: steps.append(order(reader, prompts)) or steps[-1]
    )
    monkeypatch.setattr(CostProgress, "advance", lambda bar, cost, item: (costs.append(cost), advance(bar, cost, item)))
    evaluate(wanted, Console(quiet=True))
    expected = [cost for step in steps[0] for cost in [step.cost, *[0.0] * (len(step.indices) - 1)]]
    assert max(len(step.indices) for step in steps[0]) > 1
    assert costs == expected


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


def test_longppl_beyond_rope_is_said_and_reads_further_than_the_windows_of_perplexity(
    tmp_path: Path, tiny_model_folder: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = recipe(
        tmp_path, tiny_model_folder, text, "eval.longppl.context_length=900", "eval.perplexity.context_lengths=[256]",
        tasks=["perplexity", "longppl"],
    )  # fmt: skip
    made = rows_of(evaluate(wanted, Console(soft_wrap=True))[0])
    assert made["longppl"][0]["tokens"] == 899
    assert [row["tokens"] for row in made["perplexity"]] == [255]
    said = capsys.readouterr().out
    assert "RoPE of the evaluator covers 64 tokens, less than eval.longppl.context_length 900" in said
    assert "base: its RoPE covers 64 tokens; 256, 900 tokens lie beyond" in said


def test_longppl_alone_needs_no_more_than_its_own_context(tmp_path: Path, tiny_model_folder: Path, text: Path) -> None:
    settings = {"texts": [str(text)], "context_lengths": [1_000_000]}
    made = rows_of(
        evaluate(
            recipe(tmp_path, tiny_model_folder, text, tasks=["longppl"], perplexity=settings), Console(quiet=True)
        )[0]
    )
    assert made["longppl"][0]["tokens"] == 511
    assert made["perplexity"] == []
    too_much = recipe(
        tmp_path, tiny_model_folder, text, "eval.longppl.short_context=900000", "eval.longppl.context_length=1000000",
        tasks=["longppl"], perplexity=settings,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"no text has 900065 tokens.* or lower eval.longppl.short_context"):
        evaluate(too_much, Console(quiet=True))


def test_a_haystack_is_read_only_where_something_is_hidden_in_it(
    tmp_path: Path, tiny_model_folder: Path, text: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": text.read_text(encoding="utf-8")}), encoding="utf-8")
    settings = {"perplexity": {"texts": []}, "haystack": [str(tmp_path / "absent.txt")]}
    ruler = {"tasks": ["niah_single_1", "vt"], "lengths": [2048], "num_samples": 1}
    wanted = recipe(tmp_path, tiny_model_folder, text, tasks=["lines", "ruler"], ruler=ruler, **settings)
    assert len(rows_of(evaluate(wanted, Console(quiet=True))[0])["retrieval"]) == 3
    with pytest.raises(DataError, match="absent"):
        evaluate(recipe(tmp_path, tiny_model_folder, text, tasks=["needle"], **settings), Console(quiet=True))
    settings["haystack"] = [str(tmp_path / "rows.jsonl")]
    wanted = recipe(tmp_path, tiny_model_folder, text, "data.text_field=body", tasks=["needle"], **settings)
    assert len(rows_of(evaluate(wanted, Console(quiet=True))[0])["retrieval"]) == 1


def test_nothing_to_measure_is_one_line(tmp_path: Path, tiny_model_folder: Path, text: Path) -> None:
    wanted = recipe(tmp_path, tiny_model_folder, text, "eval.passkey.num_trials=0", tasks=["passkey"])
    with pytest.raises(DataError, match="nothing is left to measure"):
        evaluate(wanted, Console(quiet=True))
    with pytest.raises(RecipeError, match=r"eval.variants = \[\]"):
        recipe(tmp_path, tiny_model_folder, text, variants=[])
    with pytest.raises(RecipeError, match=r"eval.tasks.0 = 'rulr'.*; did you mean ruler\?"):
        recipe(tmp_path, tiny_model_folder, text, "eval.tasks=[rulr]")


def test_a_template_that_is_not_there_is_one_line(tmp_path: Path, tiny_model_folder: Path, text: Path) -> None:
    wanted = recipe(tmp_path, tiny_model_folder, text, "eval.ruler.chat_template=true", tasks=["ruler"])
    with pytest.raises(DataError, match="the tokenizer has no chat template, set it to false"):
        evaluate(wanted, Console(quiet=True))


def test_weights_that_are_not_numbers_are_one_line(tmp_path: Path, text: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match="logits that are not finite"):
        evaluate(recipe(tmp_path, folder, text, tasks=["lines"]), Console(quiet=True))


def test_a_model_trained_for_another_context_is_refused_before_anything_is_measured(
    tmp_path: Path, tiny_model_folder: Path, text: Path
) -> None:
    wanted = recipe(tmp_path, tiny_model_folder, text, variants=["base", "trained"], tasks=["lines"])
    save_tiny_model(RunFolder(wanted.run_path).merged, max_position_embeddings=1024)
    with pytest.raises(
        RunFolderError, match="was trained for 1024 tokens, the recipe says context.context_length=2048"
    ):
        evaluate(wanted, Console(quiet=True))
    assert not RunFolder(wanted.run_path).evaluation("base").exists()


def test_nothing_trained_is_one_line(tmp_path: Path, tiny_model_folder: Path, text: Path) -> None:
    wanted = recipe(tmp_path, tiny_model_folder, text, variants=["base", "trained"], tasks=["lines"])
    with pytest.raises(RunFolderError, match="run `longlora train` first"):
        evaluate(wanted, Console(quiet=True))
    assert not RunFolder(wanted.run_path).evaluation("base").exists(), "said before anything is measured"
