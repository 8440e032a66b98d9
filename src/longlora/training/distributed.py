"""Which of the processes of a run this one is: the only file that reads ranks.

`torchrun` and `accelerate launch` tell each process its place in environment variables. Processes form a mesh of data x
sequence: those with neighbouring ranks share rows of tokens, the others are data parallel::

    parallel.sequence: 2, 6 processes      rank     0  1  2  3  4  5
                                           data     0  0  1  1  2  2     which rows
                                           sequence 0  1  0  1  0  1     which stretch of them
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from longlora.errors import RecipeError


@dataclass(frozen=True)
class Ranks:
    """The place of a process among all; without a launcher it is alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Among the processes of its machine: which GPU is its own."""
    sequence_world: int = 1
    """Processes that share each row: `parallel.sequence`."""
    local_world: int = 1
    """Processes on this machine."""

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence_world

    @property
    def data_world(self) -> int:
        return self.world // self.sequence_world

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence_world

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0


def read_ranks(sequence_world: int = 1) -> Ranks:
    """The place of this process, as its launcher says.

    Raises:
        RecipeError: `sequence_world` does not divide the number of processes.
    """
    rank, world, local, local_world = (
        int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    world = max(world, 1)
    if world % sequence_world:
        fitting = [number for number in range(1, world + 1) if world % number == 0]
        raise RecipeError(
            f"parallel.sequence={sequence_world} does not divide the {world} processes of this run: set it to one of "
            f"{', '.join(map(str, fitting))}, or start another number of processes"
        )
    return Ranks(rank, world, local, sequence_world, max(local_world, 1))
