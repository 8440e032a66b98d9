"""What docs/results.md computes from rows of benchmarks, on rows whose results are known."""

from __future__ import annotations

import pytest
import results_ablations
import results_original
from ablation_variants import EXPERIMENTS, FULL_ATTENTION, UNTRAINED, Size, Variant

SIZE = Size(2048, 12)
PAPER = next(variant for variant in EXPERIMENTS["attention"] if "paper" in variant.name)
MEASURES = [f"{name}_{times}x" for name in ("loss", "tail_loss", "passkey", "correct", "needle") for times in (1, 2, 4)]


def row(variant: Variant, seed: int, size: Size = SIZE, **measured: str) -> dict[str, str]:
    fixed = {"context": str(size.context), "steps": str(size.steps), "seed": str(seed), "variant": variant.name}
    where = {"device": measured.pop("device", "a CPU"), "torch": "2", "commit": "abc", "date": "2026-11-29"}
    identity = {"settings": variant.identity(size, seed)}
    return fixed | where | identity | dict.fromkeys(MEASURES, "") | measured


def test_the_part_that_is_kept_is_of_the_full_attention_of_the_same_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        row(UNTRAINED, 0, loss_1x="5", loss_2x="6"),
        row(FULL_ATTENTION, 0, loss_1x="3", loss_2x="4"),
        row(FULL_ATTENTION, 1, loss_1x="4", loss_2x="4"),
        row(PAPER, 0, loss_1x="4", loss_2x="4", passkey_1x="-2.5"),  # half of 2, and all of 2
        row(PAPER, 1, loss_1x="4", loss_2x="6", passkey_1x="-3.5"),  # all of 1, and nothing of 2
        row(PAPER, 2, loss_1x="5", loss_2x="5"),  # without a partner
        row(FULL_ATTENTION, 2, loss_1x="1", loss_2x="1", device="another CPU"),
        row(PAPER, 0, Size(1024, 99), loss_1x="1"),
    ]
    timed = {"pattern": PAPER.name, "context": "2048", "of_full_attention": "0.912", "dtype": "float32", "repeats": "3"}
    monkeypatch.setattr(results_ablations, "every", lambda name: rows)
    monkeypatch.setattr(results_ablations, "newest", lambda *names: [rows[0] | timed])
    text = "\n".join(results_ablations.ablations())
    assert "--context 2048 --steps 12`" in text, "the longest rows are shown"
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {PAPER.name} |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == [PAPER.name, "3", "4.333 ± 0.577"]
    assert "-3.000 ± 0.707" in cells
    assert cells[-3:] == ["75 ± 35", "50 ± 71", "0.912"]
    (untrained,) = [line for line in text.splitlines() if line.startswith(f"| {UNTRAINED.name} |")][:1]
    assert untrained.endswith("| 0 | 0 |  |")
    assert "needle" not in "".join(line for line in text.splitlines() if line.startswith("|")), (
        "columns without a value"
    )
    assert "### What is trained" in text, "the untrained model is a row of it"
    assert "### Learning rate" not in text, "no row, no table"


def test_retrieval_is_beside_full_attention_of_the_same_seed_and_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    by_name = {variant.name: variant for variant in EXPERIMENTS["retrieval"]}
    full, slow = by_name["full attention, yarn"], by_name["full attention, rate 1e-4, yarn"]
    sinks, slow_sinks = by_name["S2, T/4, 4 sinks, yarn"], by_name["S2, T/4, 4 sinks, rate 1e-4, yarn"]
    passkeys = [(full, 0, "-3"), (full, 1, "-5"), (sinks, 0, "-4"), (sinks, 1, "-7"), (sinks, 2, "-90")]
    passkeys += [(slow, 0, "-1"), (slow_sinks, 0, "-1.5")]
    rows = [row(variant, seed, passkey_2x=value) for variant, seed, value in passkeys]
    monkeypatch.setattr(results_ablations, "every", lambda name: rows)
    monkeypatch.setattr(results_ablations, "newest", lambda *names: [])
    lines = "\n".join(results_ablations.ablations()).splitlines()
    last = {line.split(" | ")[0][2:]: line.strip("| ").split(" | ")[-1] for line in lines if line.startswith("| ")}
    assert last[sinks.name] == "-1.500 ± 0.707"
    assert last[slow_sinks.name] == "-0.500"
    assert last[full.name] == "0.000 ± 0.000"


def test_needles_are_beside_full_attention_as_passkeys_are(monkeypatch: pytest.MonkeyPatch) -> None:
    untrained, full, paper = EXPERIMENTS["needle"][:3]
    rows = [row(untrained, 0, loss_1x="5", loss_2x="5", needle_2x="-9")]
    rows += [row(full, seed, loss_1x="3", loss_2x="3", passkey_2x="-1", needle_2x="-2") for seed in (0, 1)]
    rows += [row(paper, seed, loss_1x="4", loss_2x="4", passkey_2x="-2", needle_2x="-5") for seed in (0, 1)]
    monkeypatch.setattr(results_ablations, "every", lambda name: rows)
    monkeypatch.setattr(results_ablations, "newest", lambda *names: [])
    lines = "\n".join(results_ablations.ablations()).splitlines()
    (cells,) = [line.strip("| ").split(" | ") for line in lines if line.startswith(f"| {paper.name}")]
    assert cells[-4:] == ["50 ± 0", "50 ± 0", "-1.000 ± 0.000", "-3.000 ± 0.000"]
    (before,) = [line.strip("| ").split(" | ") for line in lines if line.startswith(f"| {untrained.name}")]
    assert before[-1] == "-7.000", "where the untrained model lacks a measure, only that cell is empty"
    assert before[-2].strip() == ""


def test_without_rows_there_is_no_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_ablations, "every", lambda name: [])
    monkeypatch.setattr(results_original, "every", lambda name: [])
    assert results_ablations.ablations() == results_original.original() == []


def test_outcomes_beside_the_original_are_counted_by_file_path_and_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = results_original.every("original")
    compared = [row for row in rows if row["outcome"] != "timed"]
    page = results_original.original()[2].splitlines()[2:]
    counted = sum(int(cell) for line in page for cell in line.strip("| ").split(" | ")[3:])
    assert counted == len(compared) > 100
    first = compared[0] | {"outcome": "a new one"}
    monkeypatch.setattr(results_original, "every", lambda name: [*rows, first])
    with pytest.raises(AssertionError, match="outcomes without a column: {'a new one'}"):
        results_original.original()


def test_every_variant_is_told_apart() -> None:
    """Two names of one run are one run; the settings of a run are what its name says."""
    for experiment, variants in EXPERIMENTS.items():
        names = [variant.name for variant in variants]
        assert len(names) == len(set(names)), experiment
        settings = [variant.identity(SIZE, 0) for variant in variants]
        assert len(settings) == len(set(settings)), experiment
    assert PAPER.identity(SIZE, 0) != PAPER.identity(SIZE, 1)
    assert "attention.sink_tokens=0" in PAPER.settings(SIZE, 0)
    assert "model.original_context_length=1024" in PAPER.settings(SIZE, 0)
