"""The order in which rows are trained on: a function of the seed, the epoch and the data ranks, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RowOrder(Sampler[list[int]]):
    """Micro batches of row numbers, for one of the processes that are data parallel.

    Each epoch shuffles all rows by a seed of its own, the same on every process, and cuts them into micro batches that
    go around the ranks. 7 rows in micro batches of 2 on 2 ranks, shuffled to a b c d e f g::

        rank 0   a b   e f
        rank 1   c d   g

    So a step trains on the same rows, whatever the number of ranks, if it has as many micro batches in all; and a run
    that goes on with as many skips those it has seen. Each row is in an epoch once: ranks that are left over get an
    empty micro batch, because all ranks must take part in each step. With one rank the order is that of accelerate's
    SeedableRandomSampler.

    Args:
        rows: how many there are.
        size: rows in a micro batch; the last one of an epoch may be smaller.
        seed: the epoch is added to it.
        rank: among those that train on different rows.
        world: how many those are.
    """

    def __init__(self, rows: int, size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.batch_size = size  # accelerate reads it
        self._rows, self._seed, self._rank, self._world = rows, seed, rank, world
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the loader before each pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self._rows // (self.batch_size * self._world))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order = torch.randperm(self._rows, generator=generator).tolist()
        for number in range(len(self)):
            start = (number * self._world + self._rank) * self.batch_size
            yield order[start : start + self.batch_size]
