"""The main table and the verdict: every number is checked against one computed here by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from report_cases import KEYS, OLD, evaluation, passkey, perplexity, prompt, ruler, save, summary_of

from longlora.artifacts import RunFolder
from longlora.evaluation.report.compare import read_comparison
from longlora.evaluation.report.shared import shared_perplexity

# At NEW the mean is weighted: (199 * first + 149 * (first + 1)) / 348 = first + 0.428. A token has 4 bytes, so bits per
# byte are the loss / (4 ln 2). What base was asked beyond its 100 tokens is marked.
EXPECTED = [
    ("loss, first 100 tokens (nats/token)", "3.500", "3.700", "3.540"),
    ("loss, first 200 tokens (nats/token)", "5.428†", "3.528", "3.328"),
    ("loss, last 20 of 200 tokens (nats/token)", "7.500†", "3.550", "3.300"),
    ("bits per byte, first 100 tokens", "1.262", "1.334", "1.277"),
    ("bits per byte, first 200 tokens", "1.958†", "1.273", "1.200"),
    ("passkey, 100 tokens: correct", "2/2 [0.34, 1.00]", "2/2 [0.34, 1.00]", "2/2 [0.34, 1.00]"),
    # two values: mean +- 12.7062 * |difference| / 2, and never above 0
    (
        "passkey, 100 tokens: log-probability (nats)",
        "-0.20 [-1.47, 0.00]",
        "-0.30 [-1.57, 0.00]",
        "-0.25 [-0.89, 0.00]",
    ),
    ("passkey, 200 tokens: correct", "0/2† [0.00, 0.66]", "1/2 [0.09, 0.91]", "2/2 [0.34, 1.00]"),
    (
        "passkey, 200 tokens: log-probability (nats)",
        "-8.50† [-14.85, -2.15]",
        "-1.20 [-3.74, 0.00]",
        "-0.65 [-2.56, 0.00]",
    ),
]


def test_main_table_by_hand(complete: RunFolder) -> None:
    summary = summary_of(complete)
    assert summary.table.columns == ("measure", "base", "RoPE only", "trained")
    assert [tuple(row) for row in summary.table.strings()] == EXPECTED
    assert summary.table.rows[1].detail == "2 documents, 348 tokens scored"
    assert summary.table.rows[3].detail == "2 documents, 792 bytes scored"
    assert summary.notes == ("† Measured at a length beyond what the model's RoPE covers (base: 100 tokens).",)


def test_documents_of_unknown_bytes_are_counted(empty: RunFolder) -> None:
    rows = perplexity("base")
    rows[0]["bytes"] = None
    save(empty, base=evaluation("base", perplexity=rows))
    row = next(row for row in summary_of(empty).table.rows if row.key == f"bits_per_byte/{OLD}")
    assert row.detail == "1 document, 396 bytes scored; 1 document of unknown bytes"


def test_longppl_is_the_perplexity_over_all_key_tokens(empty: RunFolder) -> None:
    row = {"context_length": OLD, "short_context": 10, "tokens": 99, "all_loss": 3.0, "evaluator": "e"}
    row |= {"alpha": 2.0, "beta": 2.0}
    rows = [
        {**row, "document": "a", "key_tokens": 3, "loss": 1.0},
        {**row, "document": "b", "key_tokens": 1, "loss": 3.0},
        {**row, "document": "c", "key_tokens": 0, "loss": None},
    ]
    save(empty, base=evaluation("base", longppl=rows, perplexity=[], retrieval=[]))
    (shown,) = summary_of(empty).table.rows
    assert shown.label == "LongPPL, 100 tokens (perplexity of key tokens)"
    assert shown.cells[0].value == pytest.approx(math.exp(1.5))
    assert shown.detail == "2 documents, 4 tokens are key tokens; 1 document without key tokens"


def test_ruler_average_weighs_tasks_alike_over_common_prompts(empty: RunFolder) -> None:
    scores = {"vt": {OLD: [1.0, 0.5, 0.0]}, "cwe": {OLD: [1.0]}}
    save(empty, base=evaluation("base", perplexity=[], retrieval=ruler(scores)))
    average, effective = summary_of(empty).table.rows
    assert average.cells[0].value == pytest.approx(75)
    assert average.detail == "2 tasks, 4 prompts"
    assert effective.cells[0].text == "below 100"
    # The trained model answered two of the prompts: only those count, for both.
    fewer = ruler({"vt": {OLD: [1.0, 1.0]}})
    save(empty, trained=evaluation("trained", perplexity=[], retrieval=fewer))
    average, effective = summary_of(empty).table.rows
    assert [cell.value for cell in average.cells] == [75, 100]
    assert average.detail == "1 task, 2 prompts; 2 left out, not measured for all"
    assert effective.cells[1].text == "100"


def test_answers_of_other_prompts_are_not_compared(empty: RunFolder) -> None:
    other = [{**row, "prompt_sha256": "other"} for row in passkey("trained")]
    save(empty, base=evaluation("base"), trained=evaluation("trained", retrieval=other))
    row = next(row for row in summary_of(empty).table.rows if row.label == "passkey, 200 tokens: correct")
    assert [str(cell) for cell in row.cells] == ["-", "-"]
    assert row.detail == "no prompt was answered by all models"


def test_kinds_of_needles_are_not_averaged(empty: RunFolder) -> None:
    rows = [prompt("needle", OLD, 0.5, name=kind, correct=kind == "single") for kind in ("single", "chain")]
    save(empty, base=evaluation("base", perplexity=[], retrieval=rows))
    assert summary_of(empty).table.strings() == [
        ["needle single, 100 tokens: correct", "1/1 [0.21, 1.00]"],
        ["needle chain, 100 tokens: correct", "0/1 [0.00, 0.79]"],
    ]
    assert [row.key for row in summary_of(empty).table.rows] == [
        "needle/single/100/correct",
        "needle/chain/100/correct",
    ]


def test_prompts_of_many_lengths_are_put_together_by_doublings(empty: RunFolder) -> None:
    rows = [prompt("topics", length, None, length, correct=length > 64) for length in range(40, 140, 4)]
    save(empty, base=evaluation("base", perplexity=[], retrieval=rows))
    assert [(row.label, row.cells[0].text, row.cells[0].mark) for row in summary_of(empty).table.rows] == [
        ("topics, 40 to 64 tokens: correct", "0/7", ""),
        ("topics, 68 to 128 tokens: correct", "16/16", "†"),
        ("topics, 132 to 136 tokens: correct", "2/2", "†"),
    ]


def test_lines_and_topics_are_counted_without_log_probability(empty: RunFolder) -> None:
    rows = [prompt(task, OLD, None, trial, correct=trial == 0) for task in ("lines", "topics") for trial in range(4)]
    save(empty, base=evaluation("base", perplexity=[], retrieval=rows))
    assert summary_of(empty).table.strings() == [
        ["lines, 100 tokens: correct", "1/4 [0.05, 0.70]"],
        ["topics, 100 tokens: correct", "1/4 [0.05, 0.70]"],
    ]


def test_verdicts_pass_with_their_numbers(complete: RunFolder) -> None:
    # Two keys give a t interval 12.7 times wider than their spread; four alike give a narrow one.
    for variant, value in (("base", -8.0), ("rope_only", -1.0), ("trained", -0.9)):
        rows = [{**passkey(variant)[2], "trial": trial, "log_probability": value + trial / 100} for trial in range(4)]
        save(complete, **{variant: evaluation(variant, retrieval=rows)})
    verdicts = summary_of(complete).verdicts
    assert [verdict.status for verdict in verdicts] == ["PASS"] * 5
    assert "trained, last 20 of 200 tokens 3.300; base at 100 tokens 3.500" in verdicts[0].numbers[0]
    assert "difference +0.040 (limit +0.05)" in verdicts[1].numbers[0]
    assert "-0.160 [-0.160, -0.160] over documents; 2 of 2 documents lower" in verdicts[2].numbers[0]
    assert "-0.200 [-0.200, -0.200] over documents; 2 of 2 documents lower" in verdicts[2].numbers[1]
    assert verdicts[3].numbers == ("200 tokens: difference +7.10 [+7.10, +7.10] nats; 4 keys",)
    assert verdicts[4].numbers == ("200 tokens: difference +0.10 [+0.10, +0.10] nats; 4 keys",)


def test_verdicts_fail(empty: RunFolder) -> None:
    worse = evaluation("trained")
    for row in worse["perplexity"]:
        row["loss"] += 1.0
        row["tail_loss"] += 1.0
    for row in worse["retrieval"]:
        row["log_probability"] -= 20 + row["depth"] / 100
    save(empty, base=evaluation("base"), rope_only=evaluation("rope_only"), trained=worse)
    assert [verdict.status for verdict in summary_of(empty).verdicts] == ["FAIL"] * 5


@pytest.mark.parametrize(("rise", "status"), [(0.1, "PASS"), (0.1001, "FAIL")])
def test_limit_of_the_tail_is_not_missed_by_rounding(empty: RunFolder, rise: float, status: str) -> None:
    trained = evaluation("trained", ("first",))
    trained["perplexity"][1]["tail_loss"] = 3.0 + rise
    save(empty, base=evaluation("base", ("first",)), trained=trained)
    assert summary_of(empty).verdicts[0].status == status


def test_one_worse_length_fails_the_retrieval_verdict(complete: RunFolder) -> None:
    rows = passkey("rope_only")
    for row, drop in zip(rows, (-0.1, -0.1, 0.5, 0.51), strict=True):
        row["log_probability"] -= drop
    save(complete, trained=evaluation("trained", retrieval=rows))
    verdict = summary_of(complete).verdicts[4]
    assert verdict.status == "FAIL"
    assert verdict.numbers[0] == "100 tokens: difference +0.10 [+0.10, +0.10] nats; 2 keys"
    assert "200 tokens: difference -0.51 [-0.57, -0.44]" in verdict.numbers[1]


def test_keys_without_log_probability_are_not_judged(complete: RunFolder) -> None:
    for variant in KEYS:
        rows = [{**row, "log_probability": None} for row in passkey(variant)]
        save(complete, **{variant: evaluation(variant, retrieval=rows)})
    found = summary_of(complete)
    assert [verdict.status for verdict in found.verdicts[3:]] == ["not measured"] * 2
    assert not any("log-probability" in row.label for row in found.table.rows)


def test_only_documents_of_all_models_are_compared(empty: RunFolder) -> None:
    save(empty, base=evaluation("base"), trained=evaluation("trained", ("second", "first", "third")))
    found = shared_perplexity(read_comparison([empty]).columns, OLD)
    assert [[row.document for row in rows] for rows in found.rows.values()] == [["first", "second"]] * 2
    assert found.left_out == 1
    # Either lacks a document of the other.
    save(empty, base=evaluation("base", ("first", "fourth")))
    assert shared_perplexity(read_comparison([empty]).columns, OLD).left_out == 3


def test_documents_of_one_name_are_paired_in_order(empty: RunFolder) -> None:
    save(empty, base=evaluation("base", ("same", "same")), trained=evaluation("trained", ("same", "same")))
    base, trained = shared_perplexity(read_comparison([empty]).columns, OLD).rows.values()
    assert [(a.loss, b.loss) for a, b in zip(base, trained, strict=True)] == [(3.0, 3.04), (4.0, 4.04)]


def test_with_other_tokenizers_bits_per_byte_come_first_and_a_note_says_why(tmp_path: Path) -> None:
    ours = save(RunFolder(tmp_path / "ours"), base=evaluation("base"))
    rows = [{**row, "tokens": row["tokens"] - 9, "bytes": 4 * row["tokens"]} for row in perplexity("base")]
    save(RunFolder(tmp_path / "theirs"), base=evaluation("base", tokenizer_hash="2e" * 32, perplexity=rows))
    summary = summary_of(ours, RunFolder(tmp_path / "theirs"))
    assert summary.table.rows[0].label == "bits per byte, first 100 tokens"
    # The same loss per token over fewer tokens of the same text: 90/99 of the bits.
    ratio = (summary.table.rows[0].cells[1].value or 0) / (summary.table.rows[0].cells[0].value or 1)
    assert ratio == pytest.approx(90 / 99)
    assert any("losses per token are not comparable" in note for note in summary.notes)
