"""Index tensors of the varlen backend: the cuts of a batch into segments, and the rows that its kernel reads.

R = B*T rows of the flattened batch, N segments, Q rows of queries (those that are not padding), Y rows of keys, copies
of sink tokens included. All tensors are O(T); they are int32 but where torch takes int64 alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longlora.attention.layout import Layout
from longlora.attention.pattern import S2Pattern, runs

NO_WINDOW = (-1, 0)


@dataclass(frozen=True, eq=False)
class SinkCopies:
    """Where the copies of sink tokens are among the keys of a `VarlenIndex`: only their rows occur more than once."""

    own_Q: Tensor
    """int32, for each query row the place of its own key."""
    places: Tensor
    """int32, the places of the copies."""
    rows: Tensor
    """int64, the rows of the flattened batch that were copied, each once."""
    row_of_place: Tensor
    """int32, for each of `places` the position of its row in `rows`."""


@dataclass(frozen=True, eq=False)
class VarlenIndex:
    """One grid of a whole batch: the segments, and the rows of the flattened batch that the kernel gets."""

    cu_seqlens_q: Tensor
    """int32 [N + 1]: segment n has the queries from cu_seqlens_q[n] to cu_seqlens_q[n + 1]."""
    cu_seqlens_k: Tensor
    """int32 [N + 1], of the keys. In a segment of q queries and k keys, query i sees key j if j <= i + k - q."""
    max_q: int
    max_k: int
    window: tuple[int, int]
    """How many keys before and after itself a query sees; -1 is no limit."""
    query_rows: Tensor | None
    """int64 [Q] (`index_copy` takes no other), the rows that are not padding; None where that is all of them."""
    key_rows: Tensor | None
    """int32 [Y], the rows of the keys in the order of the segments; None where that is all rows as they are."""
    sinks: SinkCopies | None

    def to(self, device: torch.device | str) -> VarlenIndex:
        fields = _moved(vars(self), device)
        if self.sinks is not None:
            fields["sinks"] = SinkCopies(**_moved(vars(self.sinks), device))
        return VarlenIndex(**fields)


def varlen_index(layout: Layout, *, shifted: bool) -> VarlenIndex:
    """The index of one grid, on the CPU. The cuts between documents and those between groups are the same to it."""
    document_N, start_N, size_N, sinks_N = _segments(layout, shifted)
    keys_N = sinks_N + size_N
    query_rows = key_rows = _ranges(start_N, size_N)
    sinks = None
    if sinks_N.any():
        # Of each segment the sink tokens, then its own: two ranges of rows.
        key_rows = _ranges(_interleave(document_N, start_N), _interleave(sinks_N, size_N))
        first_key_N = keys_N.cumsum(0) - keys_N
        places = _ranges(first_key_N, sinks_N)
        rows, row_of_place = key_rows[places].unique(return_inverse=True)
        sinks = SinkCopies(_ranges(first_key_N + sinks_N, size_N).int(), places.int(), rows, row_of_place.int())
    all_rows = len(query_rows) == len(layout.bounds_B) * layout.tokens
    max_k, pattern = max(keys_N.tolist(), default=0), layout.pattern
    return VarlenIndex(
        cu_seqlens_q=_cumulative(size_N),
        cu_seqlens_k=_cumulative(keys_N),
        max_q=max(size_N.tolist(), default=0),
        max_k=max_k,
        window=NO_WINDOW if isinstance(pattern, S2Pattern) or pattern.size >= max_k else (pattern.size - 1, 0),
        query_rows=None if all_rows else query_rows,
        key_rows=None if all_rows and sinks is None else key_rows.int(),
        sinks=sinks,
    )


def _segments(layout: Layout, shifted: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each segment the first row of its document, its own first row, its size and its sinks; int64 [N] each."""
    cut: list[tuple[int, int, int, int, int]] = []
    for row, bounds in enumerate(layout.bounds_B):
        for begin, end in pairwise(bounds):
            document = row * layout.tokens + begin
            if isinstance(layout.pattern, S2Pattern):
                found = runs(end - begin, layout.pattern, shifted=shifted)
                cut += [(document, document + run.start, run.size, run.sinks, run.count) for run in found]
            else:
                cut.append((document, document, end - begin, 0, 1))  # the kernel has its own window
    counts = torch.tensor([count for *_, count in cut], dtype=torch.int64)
    of_runs = torch.tensor(cut, dtype=torch.int64).reshape(-1, 5)
    document_N, start_N, size_N, sinks_N, _ = of_runs.repeat_interleave(counts, dim=0).unbind(1)
    within_run_N = _ranges(torch.zeros_like(counts), counts)
    return document_N, start_N + within_run_N * size_N, size_N, sinks_N


def _ranges(starts_N: Tensor, sizes_N: Tensor) -> Tensor:
    """start, start + 1, ..., start + size - 1 of every pair, one after the other."""
    before_N = sizes_N.cumsum(0) - sizes_N
    shifts = (starts_N - before_N).repeat_interleave(sizes_N)
    return shifts + torch.arange(len(shifts))


def _interleave(first_N: Tensor, second_N: Tensor) -> Tensor:
    return torch.stack([first_N, second_N], dim=1).flatten()


def _cumulative(sizes_N: Tensor) -> Tensor:
    return F.pad(sizes_N.cumsum(0), (1, 0)).to(torch.int32)


def _moved(fields: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in fields.items()}
