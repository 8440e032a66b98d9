"""Sequence parallelism in training: loss and gradients of a step of several processes are those of one."""

from __future__ import annotations

from typing import Any

import pytest
import sequence_cases
from halo_cases import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=[(2, 2), (4, 4), (4, 2)], ids=["2 ranks", "4 ranks", "data 2 x sequence 2"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    world, sequence = request.param
    return run_ranks(world, sequence_cases.everything, tmp_path_factory.mktemp("ranks"), sequence)


def test_a_step_is_that_of_one_process(ranks: list[dict[str, Any]]) -> None:
    """float32, through DDP: the loss, every gradient, and the loss that is measured with full attention."""
    errors = {
        (rank, case, what): error
        for rank, found in enumerate(ranks)
        for case, parts in found.items()
        for what, error in parts.items()
    }
    assert len(errors) >= 3 * 10 * len(ranks)
    assert not {place: error for place, error in errors.items() if not error < 1e-5}
