"""Sequence parallelism: shifted sparse attention of rows of tokens that are cut across ranks.

Every rank holds one stretch of each row, and gets from others only what `halo_plan.py` says: for one long document cut
on bounds of groups the shifted heads' previous half group of keys and values and the sink tokens, at most a group and
the sink tokens of one document for each row. How it travels is in `halo_exchange.py`. The output and the gradients are
those of one process.

What is computed is `attend` of `backends.py`, for three kinds of tokens. Documents that lie in the stretch entirely are
computed as ever. Of a document that a cut goes through each run of equal segments is one call: the segments, with their
sink tokens in front, are one sequence that is cut into groups without a shift. The segment that was in progress at the
cut gets its halo in front as well, and rows of zeros for the queries there, whose outputs are dropped; that is at most
one group of wasted queries.

Memory is O(T + group_size). Computed first is what needs nothing from others, while messages travel.

B batch, T tokens of the stretch, H query heads, K key/value heads, D head dim; N segments, S tokens of a segment; h and
k heads of a slice; P tokens from other ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from longlora.attention.backends import Backend, Plans, attend
from longlora.attention.halo_exchange import Exchange, Prefixes
from longlora.attention.halo_plan import Edge, HaloPlan, Whole
from longlora.attention.parts import join, split
from longlora.attention.pattern import FULL, HeadSlice, Pattern, Run, S2Pattern, WindowPattern
from longlora.errors import ModelError

# Of queries, keys, values, document bounds and a pattern.
_Attention = Callable[..., Tensor]


def halo_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    plan: HaloPlan,
    group: dist.ProcessGroup | None = None,
    *,
    backend: Backend = "auto",
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sink_logits_H: Tensor | None = None,
    plans: Plans | None = None,
    full_attention: str | None = None,
) -> Tensor:
    """Attention of the stretch that this rank holds; all ranks of the group call it together, backward too.

    Args:
        q_BHTD, k_BKTD, v_BKTD: of this rank's stretch, with RoPE of the positions in the whole row; any float dtype.
        plan: of this rank and batch, from `halo_plan`.
        group: the sequence ranks in the order of their stretches; None for all processes.

    The other arguments, the dtypes and the backends are those of `attend`.

    Returns:
        Output [B, T, H, D of the values]; 0 at padding. The gradient of `sink_logits_H` is this rank's share.

    Raises:
        ModelError: the tensors or the group do not fit the plan, or the backend can't do this.
    """
    B, H, T, D = q_BHTD.shape
    plan.require(B, H, k_BKTD.shape[1], T)
    _require_group(plan, group)
    if torch.is_autocast_enabled(q_BHTD.device.type):  # before anything is sent
        dtype = torch.get_autocast_dtype(q_BHTD.device.type)
        q_BHTD, k_BKTD, v_BKTD = q_BHTD.to(dtype), k_BKTD.to(dtype), v_BKTD.to(dtype)
    attention: _Attention = partial(
        attend, backend=backend, scaling=D**-0.5 if scaling is None else scaling, dropout=dropout, softcap=softcap,
        plans=plans, full_attention=full_attention,
    )  # fmt: skip
    exchange = Exchange(plan, group)
    k_BKTD, v_BKTD = exchange.start(k_BKTD, v_BKTD)
    outputs: dict[tuple[int, int], list[Tensor]] = {}
    edges: list[_Edge] = []
    for row, parts in enumerate(_parts(plan, q_BHTD, k_BKTD, v_BKTD)):
        for place, (part, qkv) in enumerate(parts):
            outputs[row, place] = []
            if isinstance(part, Edge):
                edges.append(_Edge(row, place, part, plan, qkv))
            elif isinstance(part, Whole):
                out = attention(*qkv, [part.bounds], plan.pattern, sink_logits_H=sink_logits_H)
                outputs[row, place].append(out)
            else:
                # Of padding alone the output must have gradients too, which are 0: a rank has to run backward.
                sinks = () if sink_logits_H is None else (sink_logits_H,)
                nothing = sum(x[..., :0].sum() for x in (*qkv, *sinks))
                outputs[row, place].append(v_BKTD.new_zeros(1, part, H, v_BKTD.shape[-1]) + nothing)
    for edge, piece in sorted(itertools.product(edges, plan.slices), key=lambda pair: pair[0].stage(pair[1])):
        stage = edge.stage(piece)
        arrived = exchange.wait(stage) if stage >= 0 else {}
        logits = None if sink_logits_H is None else sink_logits_H.narrow(0, piece.query_start, piece.query_heads)
        segments = partial(attention, sink_logits_H=logits)
        outputs[edge.row, edge.place].append(edge.attend(piece, arrived, segments))
    exchange.wait(len(plan.sends) - 1)  # what was sent must not be freed before
    joined = [join(heads, dim=2) for heads in outputs.values()]
    return join(joined, dim=1).view(B, T, H, -1)


def _require_group(plan: HaloPlan, group: dist.ProcessGroup | None) -> None:
    if plan.world == 1:
        return
    given = (dist.get_rank(group), dist.get_world_size(group))
    if given != (plan.rank, plan.world):
        raise ModelError(
            f"rank and size of the group are {given}, planned were {(plan.rank, plan.world)}: plan for the group"
        )


def _parts(plan: HaloPlan, *qkv_BXTD: Tensor) -> Iterator[list[tuple[Whole | Edge | int, tuple[Tensor, ...]]]]:
    """Of each row its parts in order, each with its queries, keys and values; padding is the number of its tokens."""
    rows = zip(*(split(x, [1] * len(plan.rows), dim=0) for x in qkv_BXTD), strict=True)
    for parts, row in zip(plan.rows, rows, strict=True):
        padding = plan.stretch - sum(part.tokens for part in parts)
        every: list[Whole | Edge | int] = [*parts, padding] if padding else [*parts]
        sizes = [part if isinstance(part, int) else part.tokens for part in every]
        yield list(zip(every, zip(*(split(x, sizes, dim=2) for x in row), strict=True), strict=True))


class _Edge:
    """One edge in the stretch of this rank, with its queries [1, H, T, D], keys and values [1, K, T, D]."""

    def __init__(self, row: int, place: int, edge: Edge, plan: HaloPlan, qkv: tuple[Tensor, ...]) -> None:
        self.row, self.place, self._edge, self._plan = row, place, edge, plan
        widths = {piece.kv_start: piece.kv_heads for piece in plan.slices}
        queries = split(qkv[0], [piece.query_heads for piece in plan.slices], dim=1)
        self._queries = dict(zip(plan.slices, queries, strict=True))
        # Slices that share a key/value head get the same view of it.
        keys, values = (split(x, list(widths.values()), dim=1) for x in qkv[1:])
        self._keys_values = dict(zip(widths, zip(keys, values, strict=True), strict=True))

    def stage(self, piece: HeadSlice) -> int:
        """The stage of the exchange that a slice of heads waits for; -1 if for none."""
        return self._plan.stage(piece) if self._edge.skipped else -1

    def attend(self, piece: HeadSlice, arrived: Prefixes, attention: _Attention) -> Tensor:
        """The output [1, T, h, D] of a slice of heads."""
        kv = self._keys_values[piece.kv_start]
        prefix = arrived.get((self.row, piece.kv_start)) or tuple(x.detach()[:, :, :0] for x in kv)
        begun, cut = self._edge.skipped, self._edge.cuts[piece.shifted]
        sizes = [run.stop - max(run.start, begun) for run in cut]
        q_runs = split(self._queries[piece], sizes, dim=2)
        kv_runs = [split(x, sizes, dim=2) for x in kv]
        outputs = []
        for place, run in enumerate(cut):
            halo = max(begun - run.start, 0)
            fronts = [_front(before, runs, run.sinks, halo) for before, runs in zip(prefix, kv_runs, strict=True)]
            rows, (_, h, _, D) = run.sinks + halo, q_runs[place].shape
            q_front = q_runs[place].new_zeros(1, h, rows, D)
            own = (q_runs[place], *(runs[place] for runs in kv_runs))
            segments = [_with_front(x, front, run.count) for x, front in zip(own, (q_front, *fronts), strict=True)]
            tokens = segments[0].shape[2]
            out_1TkD = attention(*segments, [[0, tokens]], _in_groups(self._plan.pattern, tokens, run))
            if rows:
                out_1TkD = out_1TkD.unflatten(1, (run.count, -1))[:, :, rows:].flatten(1, 2)
            outputs.append(out_1TkD)
        return join(outputs, dim=1)


def _in_groups(pattern: Pattern, tokens: int, run: Run) -> Pattern:
    """The pattern of a run of segments that stand one after the other, as one document of `tokens` tokens."""
    if isinstance(pattern, WindowPattern):
        return pattern
    return FULL if run.count == 1 else S2Pattern(tokens // run.count, shift="none")


def _front(prefix_1KPD: Tensor, runs: tuple[Tensor, ...], sinks: int, halo: int) -> Tensor:
    """Sink tokens and halo, [1, K, sinks + halo, D], from what other ranks sent and what this one has."""
    P = prefix_1KPD.shape[2]
    begin = prefix_1KPD
    if sinks > P:  # the first sink tokens are all that came; only the first two runs, both short, can hold the others
        begin = torch.cat([prefix_1KPD, *runs[:2]], dim=2)
    return torch.cat([begin[:, :, :sinks], prefix_1KPD[:, :, P - halo :]], dim=2)


def _with_front(x_1XTD: Tensor, front_1XFD: Tensor, count: int) -> Tensor:
    """`count` segments one after the other, each with a copy of `front` before it; as they are without one."""
    if not front_1XFD.shape[2]:
        return x_1XTD
    x_1XNSD = x_1XTD.unflatten(2, (count, -1))
    return torch.cat([front_1XFD[:, :, None].expand(-1, -1, count, -1, -1), x_1XNSD], dim=3).flatten(2, 3)
