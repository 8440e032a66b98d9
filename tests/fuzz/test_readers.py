"""Whatever a reader is given, only our own errors come out, within a second and in bounded memory."""

from __future__ import annotations

import pytest
from fuzz_readers import READERS
from fuzzing import SECONDS, Outcome, fuzz

FEW = {"adapter": 60, "uploaded files": 150, "instructions.parquet": 150}
SEED = 8


def check(name: str, outcome: Outcome, seconds: float) -> None:
    print(f"{name}: seed {SEED}, {outcome.summary()}")
    assert not outcome.findings, "\n\n".join(f"{key}\n{text}" for key, text in outcome.findings.items())
    assert outcome.slowest < seconds, outcome.summary()
    assert outcome.refused > 0 or name == "documents.txt", "nothing was refused: the mutations do not reach the reader"


@pytest.mark.parametrize("name", READERS)
def test_a_few_hundred_inputs(name: str) -> None:
    # A busy machine may take ten times as long; a reader that hangs on an input takes longer than that.
    check(name, fuzz(name, FEW.get(name, 300), SEED, limit_seconds=240), 10 * SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_inputs(name: str) -> None:
    check(name, fuzz(name, 10_000, SEED, limit_seconds=3000), SECONDS)
