"""Reading what was measured: damaged, old and mixed files are refused with their remedy."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from report_cases import benchmarks, evaluation, passkey, save

from longlora.artifacts import RunFolder
from longlora.errors import RunFolderError
from longlora.evaluation.report.records import read_evaluations
from longlora.evaluation.report.training_log import read_training, skipped_steps
from longlora.evaluation.report.write import write_report


def test_no_evaluation_names_the_remedy(empty: RunFolder) -> None:
    with pytest.raises(RunFolderError, match="run `longlora eval` first"):
        write_report([empty], empty)
    with pytest.raises(RunFolderError, match="no run folder to report on"):
        write_report([], empty)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "is damaged"),
        (json.dumps(evaluation("base", schema=1)), "has schema 1, this version reads 2"),
        (json.dumps(evaluation("trained")), "holds variant 'trained'"),
        (json.dumps(evaluation("base")).replace('"loss": 3.0', '"loss": NaN', 1), "perplexity.0.loss"),
        (json.dumps(evaluation("base", settings={"x": float("nan")})), "settings"),
        (json.dumps(evaluation("base", perplexity=[{"document": "first"}])), "perplexity.0.context_length"),
        (json.dumps(evaluation("base", retrieval=[{**passkey("base")[0], "depth": 2}])), "retrieval.0.depth"),
    ],
)
def test_damaged_files_name_the_file_and_the_remedy(empty: RunFolder, text: str, message: str) -> None:
    save(empty, base={})
    empty.evaluation("base").write_text(text, encoding="utf-8")
    with pytest.raises(RunFolderError, match=rf"base\.json.*{re.escape(message)}.*run `longlora eval` again") as caught:
        write_report([empty], empty)
    assert "\n" not in str(caught.value)
    assert not empty.report_html.exists()
    assert not empty.results_json.exists()


def test_files_of_different_extensions_are_refused(empty: RunFolder) -> None:
    save(empty, base=evaluation("base"), trained=evaluation("trained", context_length=400))
    with pytest.raises(RunFolderError, match=r"mixes extensions \(100 -> 200, 100 -> 400\).*longlora eval"):
        write_report([empty], empty)


@pytest.mark.parametrize(
    ("changes", "what"), [({"model": "org/other"}, "models"), ({"tokenizer_hash": "2e" * 32}, "tokenizers")]
)
def test_files_of_different_models_are_refused(empty: RunFolder, changes: dict[str, str], what: str) -> None:
    save(empty, base=evaluation("base", **changes), trained=evaluation("trained"))
    with pytest.raises(RunFolderError, match=rf"mixes {what} \(.*longlora eval"):
        write_report([empty], empty)


ROW: dict[str, Any] = {"task": "arc_easy", "metric": "acc", "value": 0.5}


def save_benchmarks(run: RunFolder, variant: str, rows: list[dict[str, Any]], **changes: Any) -> None:
    content = benchmarks(evaluation(variant), rows, **changes)
    run.harness(variant).write_text(json.dumps(content), encoding="utf-8")


def test_standard_benchmarks_come_from_their_own_file_alone(empty: RunFolder) -> None:
    save(empty, base=evaluation("base", benchmarks={"weights": "x", "dtype": "x", "rows": [ROW, ROW]}))
    assert read_evaluations(empty).evaluations["base"].benchmarks is None
    save_benchmarks(empty, "base", [ROW])
    summary = write_report([empty], empty)
    assert summary.table.strings()[-1] == ["arc_easy: acc", "0.500"]
    assert not any("left out" in note for note in summary.notes)


@pytest.mark.parametrize(
    "changes", [{"weights": "other"}, {"rope_parameters": {"rope_type": "linear"}}, {"dtype": "float32"}]
)
def test_benchmarks_of_another_model_are_left_out_and_that_is_said(empty: RunFolder, changes: dict[str, Any]) -> None:
    save(empty, base=evaluation("base"), rope_only=evaluation("rope_only"))
    save_benchmarks(empty, "base", [ROW])
    save_benchmarks(empty, "rope_only", [{**ROW, "value": 0.9}], **changes)
    summary = write_report([empty], empty)
    assert summary.table.strings()[-1] == ["arc_easy: acc", "0.500", "-"]
    assert any(
        note.startswith("eval/rope_only.harness.json is left out") and "run `longlora eval harness` again" in note
        for note in summary.notes
    )


def test_benchmarks_of_a_model_that_was_not_evaluated_are_left_out_and_that_is_said(empty: RunFolder) -> None:
    save(empty, base=evaluation("base"))
    save_benchmarks(empty, "trained", [ROW])
    summary = write_report([empty], empty)
    assert "eval/trained.harness.json is left out: trained has no eval/trained.json." in summary.notes
    assert not any(row.group == "harness" for row in summary.table.rows)


def test_a_benchmark_number_that_is_missing_has_no_row_and_is_counted(empty: RunFolder) -> None:
    save(empty, base=evaluation("base"))
    rows = [{**ROW, "value": None}, {**ROW, "metric": "ppl", "truncated": 2, "truncation": "middle"}]
    rows[1]["higher_is_better"] = False
    save_benchmarks(empty, "base", rows)
    summary = write_report([empty], empty)
    assert [(row.label, row.detail) for row in summary.table.rows if row.group == "harness"] == [
        ("arc_easy: ppl", "2 prompts cut (middle), lower is better"),
    ]
    assert "Standard benchmarks of base: 1 without a finite value are left out." in summary.notes


def test_benchmarks_that_were_asked_otherwise_do_not_share_a_row(empty: RunFolder) -> None:
    save(empty, base=evaluation("base"), rope_only=evaluation("rope_only"))
    save_benchmarks(empty, "base", [ROW], settings={"max_length": 1000})
    save_benchmarks(empty, "rope_only", [ROW], settings={"chat_template": True})
    summary = write_report([empty], empty)
    shown = [row for row in summary.table.rows if row.group == "harness"]
    assert [(row.detail, [cell.text for cell in row.cells]) for row in shown] == [
        ("", ["0.500", "-"]),
        ("chat format", ["-", "0.500"]),
    ]
    assert "Standard benchmarks of base had prompts of up to 1000 tokens; its RoPE covers 100." in summary.notes


def test_damaged_benchmark_file_names_its_own_remedy(empty: RunFolder) -> None:
    save(empty, base=evaluation("base"))
    save_benchmarks(empty, "base", [{"task": 1}])
    with pytest.raises(RunFolderError, match=r"base\.harness\.json is damaged.*run `longlora eval harness` again"):
        read_evaluations(empty)


def test_training_rows(empty: RunFolder) -> None:
    save(empty, base=evaluation("base"))
    assert read_training(empty) == []
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 2, "loss": NaN}', '{"step": 3, "loss": 2.0}', '{"runtime": 5}']
    empty.metrics.write_text("\n".join([*lines, '{"step": 3, "loss": 1.5}', '{"step": 4, "lo']), encoding="utf-8")
    assert [(row.step, row.loss) for row in read_training(empty)] == [(1, 3.0), (3, 1.5)]
    assert skipped_steps(empty) == 0
    lines[1] = '{"step": 2, "loss": null, "skipped_steps": 1}'
    more = ['{"step": 5, "loss": 1.0, "skipped_steps": 2}', '{"step": 6, "loss": 1.0, "skipped_steps": "a"}']
    empty.metrics.write_text("\n".join([*lines, *more]), encoding="utf-8")
    assert skipped_steps(empty) == 3
    write_report([empty], empty)
    text = "Steps left out, as a loss or gradient was no number or nothing was predicted: 3."
    assert text in empty.report_html.read_text(encoding="utf-8")
    empty.metrics.write_text("{broken\n" + lines[0] + "\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl line 1 is not JSON: remove that line"):
        write_report([empty], empty)
