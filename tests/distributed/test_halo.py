"""Sequence parallelism in processes joined by gloo: outputs, gradients and traffic against one process."""

from __future__ import annotations

import time
from typing import Any

import halo_cases
import halo_model_cases
import pytest
import torch.multiprocessing as mp
from halo_cases import GROUPS_AND_SINKS, LENGTHS, run_ranks

pytestmark = pytest.mark.distributed

Ranks = list[dict[str, Any]]
VECTOR = 2 * 4 * 4
"""A key and a value of 4 numbers, 4 bytes each."""


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each rank found, on 2 and on 4 ranks."""
    return run_ranks(request.param, halo_cases.everything, tmp_path_factory.mktemp("ranks"))


def test_outputs_and_gradients_are_those_of_one_process(ranks: Ranks) -> None:
    """float32; grouped queries, packed documents, sinks, odd tails, cuts anywhere, several rows, windows."""
    errors = {
        (rank, name, tensor): error
        for rank, found in enumerate(ranks)
        for name, tensors in found["cases"].items()
        for tensor, error in tensors.items()
    }
    assert len(errors) >= len(ranks) * len(halo_cases.cases()) * 4
    assert not {place: error for place, error in errors.items() if not error < 1e-5}


def test_layers_on_a_mesh_of_data_and_sequence_ranks(ranks: Ranks) -> None:
    """One after the other, also with the forward pass repeated in the backward pass."""
    for found in ranks:
        assert all(error < 1e-5 for errors in found["layers"].values() for error in errors.values()), found["layers"]


@pytest.mark.parametrize("number", range(len(GROUPS_AND_SINKS)))
def test_bytes_do_not_grow_with_the_length(ranks: Ranks, number: int) -> None:
    """Half a group of the shifted heads to the right, sinks from where the document begins to all; gradients back."""
    group_size, sinks = GROUPS_AND_SINKS[number]
    for rank, found in enumerate(ranks):
        later = len(ranks) - 1 - rank
        halo = (group_size // 2) * VECTOR  # in one of the two key/value heads
        sunk = 2 * sinks * VECTOR  # in both
        sizes = found["bytes"][number]
        assert len(sizes) == 2 * len(LENGTHS)
        for forward, backward in zip(sizes[::2], sizes[1::2], strict=True):
            assert sum(size for _, size in forward) == halo * (later > 0) + sunk * later * (rank == 0)
            assert sum(size for _, size in backward) == (halo + sunk) * (rank > 0)
            assert all(peer == rank + 1 or rank == 0 for peer, _ in forward)
            assert all(peer in (0, rank - 1) for peer, _ in backward), "gradients travel home"


def test_autocast_sends_bfloat16_and_rounds_little_more_than_one_process(ranks: Ranks) -> None:
    """Gradients are rounded once before they travel, and once after they are added, by 2**-8 at most."""
    for found in ranks:
        errors = dict(found["bfloat16"])
        sent = sum(errors.pop("bytes"))
        for name, (ours, naive) in errors.items():
            assert ours <= naive + 2 * 2**-8, (name, ours, naive)
        if len(ranks) == 2:
            assert sent == (0 if found is ranks[1] else bytes_of_bfloat16())


def bytes_of_bfloat16() -> int:
    """A document from 5 on, cut at 48 after 43 tokens, groups of 8; keys and values of 4 numbers, 2 bytes each.

    Of the 3 key/value heads one is read by unshifted heads, one by both, one by shifted heads.
    """
    sinks, unshifted, shifted = 4, 43 % 8, (43 + 4) % 8
    tokens = (sinks + unshifted) + (sinks + max(unshifted, shifted)) + (sinks + shifted)
    return tokens * 2 * 4 * 2


def test_a_group_that_does_not_fit_the_plan_is_refused(ranks: Ranks) -> None:
    world = len(ranks)
    for rank, found in enumerate(ranks):
        message = f"rank and size of the group are ({rank}, {world}), planned were ({rank}, {2 * world})"
        assert found["refused"].startswith(message)


@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_of_a_model_are_those_of_one_process(
    world: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for errors in run_ranks(world, halo_model_cases.errors_of_model, tmp_path_factory.mktemp("ranks")):
        assert len(errors) == 4
        assert all(error < 1e-5 for error in errors.values()), errors


def test_a_rank_that_dies_ends_the_others(tmp_path_factory: pytest.TempPathFactory) -> None:
    began = time.monotonic()
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        run_ranks(2, halo_cases.one_rank_dies, tmp_path_factory.mktemp("ranks"))
    assert time.monotonic() - began < halo_cases.SECONDS


def test_processes_that_hang_are_killed(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(TimeoutError, match="hang on 2 ranks took over 5"):
        run_ranks(2, halo_cases.hang, tmp_path_factory.mktemp("ranks"), seconds=5)
