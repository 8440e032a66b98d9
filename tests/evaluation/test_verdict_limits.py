"""The limits of the verdicts, each met and just missed."""

from __future__ import annotations

import pytest
from report_cases import evaluation, passkey, save, summary_of

from longlora.artifacts import RunFolder


def test_what_lies_within_its_interval_and_below_the_old_context_is_judged_as_said(complete: RunFolder) -> None:
    """At 100 tokens keys of base and trained do not differ, and those of RoPE only and trained at neither length."""
    verdicts = summary_of(complete).verdicts
    assert [verdict.status for verdict in verdicts] == ["PASS"] * 5
    assert verdicts[3].numbers == ("200 tokens: difference +7.85 [+3.40, +12.30] nats; 2 keys",)
    assert [numbers.split(":")[0] for numbers in verdicts[4].numbers] == ["100 tokens", "200 tokens"]


@pytest.mark.parametrize(("rise", "status"), [(0.05, "PASS"), (0.0501, "FAIL")])
def test_limit_of_the_short_context(empty: RunFolder, rise: float, status: str) -> None:
    trained = evaluation("trained", ("first",))
    trained["perplexity"][0]["loss"] = 3.0 + rise
    save(empty, base=evaluation("base", ("first",)), trained=trained)
    assert summary_of(empty).verdicts[1].status == status


@pytest.mark.parametrize(
    ("changes", "status"), [((-0.1, -0.1), "PASS"), ((-0.1, 0.05), "FAIL"), ((-0.001, 0.1, -0.001), "FAIL")]
)
def test_better_than_rope_only_is_in_the_mean_and_on_two_documents(
    empty: RunFolder, changes: tuple[float, ...], status: str
) -> None:
    names = ("first", "second", "third")[: len(changes)]
    trained = {**evaluation("rope_only", names), "variant": "trained"}
    for row in trained["perplexity"]:
        row["loss"] += changes[names.index(row["document"])]
    save(empty, rope_only=evaluation("rope_only", names), trained=trained)
    assert summary_of(empty).verdicts[2].status == status


def test_differences_of_documents_are_weighted_by_their_tokens(empty: RunFolder) -> None:
    trained = evaluation("trained")
    trained["perplexity"][1]["loss"] -= 0.348  # the first document at NEW, of 199 of 348 tokens
    save(empty, rope_only=evaluation("rope_only"), trained=trained)
    assert "200 tokens: trained 3.129; RoPE only 3.528; difference -0.399 [" in summary_of(empty).verdicts[2].numbers[1]


@pytest.mark.parametrize(("gains", "status"), [((1.0, 1.1), "PASS"), ((1.0, -1.1), "FAIL"), ((0.1, 1.9), "FAIL")])
def test_keys_beyond_the_old_context_must_be_surely_likelier_at_every_length(
    complete: RunFolder, gains: tuple[float, float], status: str
) -> None:
    rows = [{**row, "length": length} for length in (150, 200) for row in passkey("base")[2:]]
    for row, gain in zip(rows, (1.0, 1.1, *gains), strict=True):
        row["log_probability"] = -8.0 + gain
    base = [{**row, "log_probability": -8.0} for row in rows]
    save(complete, base=evaluation("base", retrieval=base), trained=evaluation("trained", retrieval=rows))
    assert summary_of(complete).verdicts[3].status == status
