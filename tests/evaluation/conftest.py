"""Run folders that reports are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_cases import complete_run

from longlora.artifacts import RunFolder


@pytest.fixture
def empty(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def complete(tmp_path: Path) -> RunFolder:
    return complete_run(tmp_path / "run")
