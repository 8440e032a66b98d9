"""Batches of training, and their cut into stretches where several processes share each row.

In: rows of `PackedDataset`. Out: tensors [B, T], T the tokens of one stretch, and a `Stretch` that says of what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longlora.data.packing import IGNORE_INDEX, collate


@dataclass(frozen=True)
class Stretch:
    """What a batch holds of its rows. Numbers alone, which nobody moves to a device or splits."""

    rank: int
    """Of `world` stretches of equal length, which one; from the left."""
    world: int
    bounds_B: tuple[tuple[int, ...], ...]
    """Document bounds of each whole row, from 0 to the end of its last document; what follows is padding."""
    tokens: int
    """Length of the whole rows, padding included."""
    rows: tuple[int, ...] = ()
    """Their numbers in the data set; empty where they have none, and where there are no rows."""

    @property
    def own_tokens(self) -> int:
        """Tokens in this batch, without padding."""
        length = self.tokens // self.world
        return sum(min(max(bounds[-1] - self.rank * length, 0), length) for bounds in self.bounds_B)


class StretchCollator:
    """Makes a batch of rows, or this process's stretch of it, with the labels of the next token.

    As `collate`, but labels and weights are shifted: those at a position are for the prediction made there. So they
    stay right where a cut goes between a token and the next. The rows ``a0 a1 a2 b0 b1 b2`` and ``c0 c1 c2`` in two
    stretches are::

        rank            0               1
        input_ids       a0  a1  a2      b0  b1  b2
        position_ids    0   1   2       0   1   2
        labels          a1  a2  -100    b1  b2  -100

        input_ids       c0  c1  c2      pad  pad  pad
        position_ids    0   1   2       0    1    2
        labels          c1  c2  -100    -100 -100 -100

    Rows are padded to the longest of the batch, and on to stretches of equal length. No rows at all, which a process
    may get at the end of an epoch, make one row of padding.

    Args:
        pad_token_id: any id of the vocabulary.
        rank: of this process among those that share its rows.
        world: how many share them.
        least: the shortest stretch, in tokens: what a token may see of those before it (`least_stretch`). Not read
            where nobody shares rows.
        weighted: whether rows have ``loss_weights``.
    """

    def __init__(self, pad_token_id: int, rank: int = 0, world: int = 1, least: int = 1, *, weighted: bool) -> None:
        self._pad, self._rank, self._world, self._weighted = pad_token_id, rank, world, weighted
        self._least = least if world > 1 else 1

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Tensors [B, T] as of `collate`, and ``stretch``."""
        batch = collate(rows, self._pad) if rows else self._nothing()
        bounds_B = tuple(_bounds(row["position_ids"]) for row in rows) or ((0,),)
        whole = batch["input_ids"].shape[1]
        length = max(-(-whole // self._world), self._least)
        numbers = tuple(int(row["row"]) for row in rows if "row" in row)
        stretch = Stretch(self._rank, self._world, bounds_B, self._world * length, numbers)
        batch = {name: _shifted(name, tensor) for name, tensor in batch.items()}
        batch = {name: self._padded(name, tensor, stretch.tokens - whole) for name, tensor in batch.items()}
        own = slice(self._rank * length, (self._rank + 1) * length)
        return {name: tensor[:, own].contiguous() for name, tensor in batch.items()} | {"stretch": stretch}

    def _nothing(self) -> dict[str, Tensor]:
        none = torch.zeros(1, 0, dtype=torch.int64)
        batch = {"input_ids": none, "position_ids": none, "labels": none}
        return batch | ({"loss_weights": none.float()} if self._weighted else {})

    def _padded(self, name: str, tensor_BT: Tensor, count: int) -> Tensor:
        if name == "position_ids":
            return torch.cat([tensor_BT, torch.arange(count).expand(len(tensor_BT), -1)], dim=1)
        fill = {"input_ids": self._pad, "labels": IGNORE_INDEX, "loss_weights": 0}[name]
        return F.pad(tensor_BT, (0, count), value=fill)


def _bounds(positions_T: Tensor) -> tuple[int, ...]:
    """Document bounds of a row: positions begin anew at each."""
    return (*(positions_T == 0).nonzero()[:, 0].tolist(), len(positions_T))


def _shifted(name: str, tensor_BT: Tensor) -> Tensor:
    if name not in ("labels", "loss_weights"):
        return tensor_BT
    return F.pad(tensor_BT[:, 1:], (0, 1), value=IGNORE_INDEX if name == "labels" else 0)
