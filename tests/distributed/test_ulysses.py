"""Full attention across processes joined by gloo: outputs, gradients, traffic and memory against one process."""

from __future__ import annotations

from typing import Any

import pytest
import ulysses_cases
from halo_cases import run_ranks
from ulysses_cases import COUNTED, expected_bytes

pytestmark = pytest.mark.distributed

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each rank found, on 2 and on 4 ranks."""
    pytest.importorskip("deepspeed")
    return run_ranks(request.param, ulysses_cases.everything, tmp_path_factory.mktemp("ranks"))


def test_outputs_and_gradients_are_those_of_one_process(ranks: Ranks) -> None:
    """float32; heads that ranks do not divide or outnumber, packed documents, padding, soft caps, learned sinks."""
    errors = {
        (rank, name, tensor): error
        for rank, found in enumerate(ranks)
        for name, tensors in found["cases"].items()
        for tensor, error in tensors.items()
    }
    assert len(errors) >= len(ranks) * len(ulysses_cases.cases()) * 4
    assert not {place: error for place, error in errors.items() if not error < 1e-5}


def test_layers_on_a_mesh_of_data_and_sequence_ranks(ranks: Ranks) -> None:
    """One after the other, also with the forward pass repeated in the backward pass."""
    for found in ranks:
        assert all(error < 1e-5 for errors in found["layers"].values() for error in errors.values()), found["layers"]


def test_bytes_are_those_of_the_formula_and_of_autocast(ranks: Ranks) -> None:
    for found in ranks:
        wanted = [2 * [expected_bytes(heads, tokens, len(ranks))] for heads, tokens in COUNTED]
        assert found["bytes"] == wanted


def test_memory_grows_with_the_length_and_not_its_square(ranks: Ranks) -> None:
    for found in ranks:
        short, long = found["peaks"]
        assert short < long < 4.2 * short


def test_a_batch_of_padding_alone_has_gradients_of_0(ranks: Ranks) -> None:
    assert all(found["padding"] for found in ranks)


def test_what_does_not_fit_is_refused_before_anything_is_sent(ranks: Ranks) -> None:
    world = len(ranks)
    for rank, found in enumerate(ranks):
        few, batch, group, uneven = found["refused"]
        assert f"and the model has {world - 1}: set parallel.sequence to at most {world - 1}" in few
        assert f"are {(1, 96, rank, world)}, those of the cut are {(2, 96, rank, world)}" in batch
        assert f"those of the cut are {(1, 96, world - 1 - rank, world)}" in group
        assert f"those of the cut are {(1, 98, rank, world)}" in uneven
