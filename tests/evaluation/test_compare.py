"""Several run folders side by side: which models are columns, how they are called, what is shared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_cases import NEW, OLD, complete_run, evaluation, markdown_tables, passkey, read_html, save

from longlora.artifacts import RunFolder
from longlora.evaluation.report.compare import read_comparison
from longlora.evaluation.report.write import write_report


@pytest.fixture
def two(tmp_path: Path) -> list[RunFolder]:
    """Two runs of one model with the same base and the same RoPE, whose training differs."""
    runs = [complete_run(tmp_path / name) for name in ("s2_run", "full_run")]
    save(runs[1], trained=evaluation("trained", seconds=200.0))
    return runs


def test_the_same_base_appears_once_and_trained_models_have_the_name_of_their_run(two: list[RunFolder]) -> None:
    found = read_comparison(two)
    assert found.labels == ("base", "RoPE only", "trained · s2_run", "trained · full_run")
    assert found.columns[0].runs == ("s2_run", "full_run")
    assert len({column.tint for column in found.columns}) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float32"},
        {"seed": 1},
        {"weights": "2e" * 32},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"attention": "full (eager)"},
        {"settings": {"variants": ["base"], "passkey": {"num_trials": 9}}},
        {"retrieval": [{**row, "prompt_sha256": "x"} for row in passkey("base")]},
    ],
)
def test_another_base_is_another_column(two: list[RunFolder], changes: dict[str, object]) -> None:
    save(two[1], base=evaluation("base", **changes))
    assert read_comparison(two).labels[0] == "base · s2_run"
    assert "base · full_run" in read_comparison(two).labels


def test_one_folder_given_twice_counts_once(two: list[RunFolder]) -> None:
    again = RunFolder(two[0].root / ".." / two[0].root.name)
    assert read_comparison([two[0], again]).labels == ("base", "RoPE only", "trained")


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [complete_run(tmp_path / parent / "run") for parent in ("a", "b")]
    save(runs[1], trained=evaluation("trained", dtype="float32"))
    assert read_comparison(runs).labels[2:] == ("trained · a/run", "trained · b/run")


def test_long_names_are_shortened_and_stay_distinct(tmp_path: Path) -> None:
    runs = [complete_run(tmp_path / ("x" * 40 + middle + "y" * 40)) for middle in "12"]
    names = [run.name for run in read_comparison(runs).runs]
    assert len(set(names)) == 2
    assert max(map(len, names)) < 40


def test_a_run_without_its_own_base_is_judged_against_an_equal_one(two: list[RunFolder]) -> None:
    two[1].evaluation("base").unlink()
    two[1].evaluation("rope_only").unlink()
    found = read_comparison(two)
    assert found.labels[0] == "base"
    assert found.runs[1].borrowed == ("base", "rope_only")
    assert found.base_of(found.columns[3]) is found.columns[0]
    summary = write_report(two, two[0])
    assert [verdict.status for verdict in summary.verdicts if verdict.run == "full_run"][:3] == ["PASS"] * 3
    assert any("In full_run: no rows of base and RoPE only" in note for note in summary.notes)


def test_rows_that_another_run_stands_for_are_counted_and_its_benchmarks_kept(two: list[RunFolder]) -> None:
    save(two[1], base=evaluation("base", harness=[{"task": "arc_easy", "metric": "acc", "value": 0.5}]))
    summary = write_report(two, two[0])
    assert summary.notes[-1] == (
        "In full_run: measured once more and not shown: base (as in s2_run), RoPE only (as in s2_run)."
    )
    assert summary.table.strings()[-1] == ["arc_easy: acc", "0.500", "-", "-", "-"]


def test_a_base_with_other_weights_than_the_runs_own_is_not_borrowed(two: list[RunFolder]) -> None:
    two[1].evaluation("base").unlink()
    save(two[1], rope_only=evaluation("rope_only", weights="2e" * 32))
    assert "base" not in read_comparison(two).runs[1].columns


def test_three_runs_and_two_tokenizers(two: list[RunFolder], tmp_path: Path) -> None:
    third = complete_run(tmp_path / "third", tokenizer_hash="2e" * 32, model="org/other")
    found = read_comparison([*two, third])
    assert found.labels[-3:] == ("base · third", "RoPE only · third", "trained · third")
    summary = write_report([*two, third], tmp_path)
    assert summary.title == "org/model and org/other"
    assert len(summary.verdicts) == 15
    assert summary.table.rows[0].label.startswith("bits per byte")
    assert "The curves of models with different tokenizers do not compare" in read_html(RunFolder(tmp_path)).text


def test_a_base_of_another_model_is_not_borrowed(two: list[RunFolder]) -> None:
    two[1].evaluation("base").unlink()
    save(two[1], trained=evaluation("trained", model="org/other"), rope_only=evaluation("rope_only", model="org/other"))
    found = read_comparison(two)
    assert "base" not in found.runs[1].columns
    assert found.base_of(found.columns[-1]) is None


def test_report_of_several_runs(two: list[RunFolder], tmp_path: Path) -> None:
    out = RunFolder(tmp_path / "out")
    summary = write_report(two, out)
    assert summary.title == "org/model"
    assert {verdict.run for verdict in summary.verdicts} == {"s2_run", "full_run"}
    assert len(summary.verdicts) == 10
    reader = read_html(out)
    assert "2 runs compared: s2_run, full_run." in reader.text
    assert reader.tables[0][0] == ["measure", "base", "RoPE only", "trained · s2_run", "trained · full_run"]
    assert len(reader.ids) == len(set(reader.ids))
    assert len(markdown_tables(out.report_markdown.read_text(encoding="utf-8"))) == len(reader.tables)


def test_runs_of_other_context_lengths_compare_where_both_were_measured(tmp_path: Path) -> None:
    short = complete_run(tmp_path / "short")
    long = RunFolder(tmp_path / "long")
    rows = [{**row, "context_length": 2 * NEW} if row["context_length"] == NEW else row
            for row in evaluation("trained")["perplexity"]]  # fmt: skip
    save(long, trained=evaluation("trained", perplexity=rows, context_length=2 * NEW))
    table = write_report([short, long], long).table
    shown = {row.label: [cell.text for cell in row.cells] for row in table.rows if row.label.startswith("loss, first")}
    assert shown[f"loss, first {OLD} tokens (nats/token)"] == ["3.500", "3.700", "3.540", "3.540"]
    assert shown[f"loss, first {NEW} tokens (nats/token)"][3] == "-"
    assert shown[f"loss, first {2 * NEW} tokens (nats/token)"][:3] == ["-"] * 3


def test_results_json_holds_every_model_with_its_provenance_and_numbers(two: list[RunFolder], tmp_path: Path) -> None:
    write_report(two, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["schema"] == 1
    assert [model["label"] for model in results["models"]] == list(read_comparison(two).labels)
    trained = results["models"][3]
    assert (trained["weights"], trained["tokenizer_hash"]) == ("7e" * 32, "1f" * 32)
    assert (trained["seed"], trained["bos"], trained["attention"], trained["dtype"]) == (
        0,
        True,
        "full (sdpa)",
        "bfloat16",
    )
    assert (trained["device"], trained["seconds"], trained["peak_bytes"]) == ("a CPU, 2 threads", 200.0, 3 * 2**30)
    assert trained["settings"]["ruler"] == {"threshold": 80.0}
    assert trained["protocols"][0] == {"protocol": "press", "context_length": OLD, "stride": OLD}
    assert trained["prompts"] == {"passkey": 4}
    share = trained["results"]["passkey/200/correct"]
    assert (share["value"], share["n"]) == (1.0, 2)
    assert (share["low"], share["high"]) == pytest.approx((0.3424, 1.0), abs=1e-4)
    loss = trained["results"]["loss/100"]
    # Two documents 1 nat apart with equal weights: 3.54 +- 12.7062 * 0.5
    assert (loss["value"], loss["low"], loss["high"]) == pytest.approx((3.54, 3.54 - 6.3531, 3.54 + 6.3531))
    assert results["models"][0]["results"]["loss/200"]["beyond_coverage"] is True
    assert [run["name"] for run in results["runs"]] == ["s2_run", "full_run"]
    assert results["runs"][0]["training"]["steps"] == 50
    assert len(results["runs"][0]["verdicts"]) == 5
