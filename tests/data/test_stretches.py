"""Batches of training: labels of the next token, and stretches that put together are the whole rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from longlora.data.packing import IGNORE_INDEX, PackedDataset, collate
from longlora.data.shards import TokenShard
from longlora.data.stretches import StretchCollator

PAD = 99


@pytest.fixture
def rows(shard_of: Callable[[list[int]], TokenShard]) -> list[dict[str, torch.Tensor]]:
    dataset = PackedDataset(shard_of([13, 4, 7, 5, 3]), 10)
    return [dataset[index] for index in range(len(dataset))]


def test_a_whole_batch_is_that_of_collate_with_shifted_labels(rows: list[dict[str, torch.Tensor]]) -> None:
    batch, known = StretchCollator(PAD, weighted=False)(rows), collate(rows, PAD)
    stretch = batch.pop("stretch")
    assert torch.equal(batch["labels"][:, :-1], known["labels"][:, 1:])
    assert (batch["labels"][:, -1] == IGNORE_INDEX).all()
    assert all(torch.equal(batch[name], known[name]) for name in ("input_ids", "position_ids"))
    assert (stretch.rank, stretch.world, stretch.tokens) == (0, 1, known["labels"].shape[1])
    assert stretch.own_tokens == sum(len(row["input_ids"]) for row in rows)
    for bounds, row in zip(stretch.bounds_B, rows, strict=True):
        assert list(bounds[:-1]) == (row["position_ids"] == 0).nonzero()[:, 0].tolist()
        assert bounds[-1] == len(row["position_ids"])


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("least", [1, 4, 6])
def test_stretches_are_the_row_cut(rows: list[dict[str, torch.Tensor]], world: int, least: int) -> None:
    whole = StretchCollator(PAD, weighted=False)(rows)
    parts = [StretchCollator(PAD, rank, world, least, weighted=False)(rows) for rank in range(world)]
    stretches = [part.pop("stretch") for part in parts]
    tokens = whole["input_ids"].shape[1]
    length = max(-(-tokens // world), least)
    assert all(part["input_ids"].shape == (len(rows), length) for part in parts)
    assert {(s.world, s.tokens, s.bounds_B) for s in stretches} == {(world, world * length, whole["stretch"].bounds_B)}
    assert sum(stretch.own_tokens for stretch in stretches) == whole["stretch"].own_tokens
    for name in ("input_ids", "position_ids", "labels"):
        joined = torch.cat([part[name] for part in parts], dim=1)
        assert torch.equal(joined[:, :tokens], whole[name])
        padding = {"input_ids": torch.full_like(joined, PAD), "labels": torch.full_like(joined, IGNORE_INDEX)}
        if name in padding:
            assert torch.equal(joined[:, tokens:], padding[name][:, tokens:])


def test_a_label_at_a_cut_is_the_first_token_of_the_next_stretch(
    shard_of: Callable[[list[int]], TokenShard],
) -> None:
    dataset = PackedDataset(shard_of([10]), 10)
    left, right = (StretchCollator(PAD, rank, 2, weighted=False)([dataset[0]]) for rank in range(2))
    assert left["labels"][0].tolist() == [1, 2, 3, 4, 5]
    assert right["labels"][0].tolist() == [6, 7, 8, 9, IGNORE_INDEX]
    assert right["position_ids"][0].tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("weighted", [False, True])
def test_no_rows_are_a_row_of_padding(weighted: bool) -> None:
    batch = StretchCollator(PAD, 1, 2, 8, weighted=weighted)([])
    stretch = batch.pop("stretch")
    assert batch["input_ids"].tolist() == [[PAD] * 8]
    assert (batch["labels"] == IGNORE_INDEX).all()
    assert ("loss_weights" in batch) == weighted
    assert (stretch.bounds_B, stretch.tokens, stretch.own_tokens) == (((0,),), 16, 0)
