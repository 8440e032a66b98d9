"""The order of rows: as it was for one process, each row once an epoch, the same rows in a step on any ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from longlora.data.order import RowOrder


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> int:
        return index


def epochs(order: RowOrder, count: int = 3) -> list[list[list[int]]]:
    found = []
    for epoch in range(count):
        order.set_epoch(epoch)
        found.append(list(order))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 11, 20])
def test_one_process_has_the_order_of_the_library(tmp_path: Path, size: int) -> None:
    """That of accelerate's sampler, with which earlier runs were trained."""
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=size, seed=5, data_seed=5, use_cpu=True, report_to=[]
    )
    trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=Numbers(), data_collator=list)
    loader = trainer.get_train_dataloader()
    wanted = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        wanted.append(list(loader))
    assert epochs(RowOrder(11, size, 5)) == wanted


@pytest.mark.parametrize(("rows", "size", "world"), [(7, 2, 2), (11, 1, 4), (12, 3, 2), (3, 2, 4), (1, 1, 2)])
def test_ranks_divide_the_order_of_one(rows: int, size: int, world: int) -> None:
    """Micro batch after micro batch goes around; ranks that are left over get an empty one, never one fewer."""
    alone = epochs(RowOrder(rows, size, 3))
    orders = [RowOrder(rows, size, 3, rank, world) for rank in range(world)]
    shared = [epochs(order) for order in orders]
    for epoch, whole in enumerate(alone):
        counts = {len(found[epoch]) for found in shared}
        assert counts == {len(order) for order in orders}
        assert len(counts) == 1
        around = [batch for together in zip(*(found[epoch] for found in shared), strict=True) for batch in together]
        assert around[: len(whole)] == whole
        assert not any(around[len(whole) :])
        assert len(around) - len(whole) < world


def test_seeds_and_epochs_shuffle_anew() -> None:
    first, second, _ = epochs(RowOrder(50, 50, 0))
    assert first != second
    assert epochs(RowOrder(50, 50, 1))[0] == second, "the epoch is added to the seed"
