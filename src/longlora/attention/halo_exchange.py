"""Sequence parallelism, the traffic: keys and values travel to the ranks that need them, their gradients travel home.

Messages go from rank to rank (`torch.distributed.batch_isend_irecv`), at most one for each stage, pair of ranks and
direction, while the caller computes something else. The two autograd nodes are mirror images::

    forward     _Start posts all messages        _Arrive waits for those of a stage
    backward    _Arrive posts the gradients      _Start waits for those of all stages, and adds them

Between two ranks messages match by their order: on all ranks stage 0 and 1 forward, stage 1 and 0 backward, which a
token that passes through all nodes takes care of.

B batch, T tokens of the stretch, K key/value heads, D head dim, P tokens from other ranks.

UNVERIFIED ON HARDWARE: gloo on the CPU was tried, NCCL was not. NCCL wants a first collective call of the whole group
(a barrier) before messages between some of its ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longlora.attention.halo_plan import Block, HaloPlan

Prefixes = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""By row and first key/value head: keys and values [1, K, P, D] from other ranks, in the order of their positions."""


class Exchange:
    """The exchange of keys and values of one layer in one forward pass, and that of their gradients.

    Every rank has to run the backward pass, or none: one whose loss does not depend on its attention leaves the others
    waiting until the timeout of the process group.
    """

    def __init__(self, plan: HaloPlan, group: dist.ProcessGroup | None) -> None:
        # The autograd nodes know the mail only: a node that knew this object would keep itself alive by the token.
        self._mail = _Mail(plan, group)
        self._arrived: list[Prefixes] = []
        self._token: Tensor | None = None

    def start(self, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Post all messages. Compute with the keys and values that this returns: they collect the gradients."""
        k_BKTD, v_BKTD, self._token = _Start.apply(k_BKTD, v_BKTD, self._mail)  # type: ignore[no-untyped-call]
        return k_BKTD, v_BKTD

    def wait(self, stage: int) -> Prefixes:
        """What arrives in a stage."""
        while len(self._arrived) <= stage:
            next_stage = len(self._arrived)
            self._token, *tensors = _Arrive.apply(self._token, self._mail, next_stage)  # type: ignore[no-untyped-call]
            pairs = zip(tensors[::2], tensors[1::2], strict=True)
            received = _by_place(self._mail.plan.receives[next_stage])
            self._arrived.append(dict(zip(received, pairs, strict=True)))
        return self._arrived[stage]


@dataclass(frozen=True)
class _Posted:
    """Messages on their way."""

    works: list[dist.Work]
    incoming: dict[int, Tensor]
    kept: list[Tensor]
    """What is being sent, which must not be freed."""

    def wait(self) -> dict[int, Tensor]:
        """Flat tensors by the rank that sent them."""
        for work in self.works:
            work.wait()
        return self.incoming


class _Mail:
    """Messages of one exchange, both ways. Holds no tensor that autograd tracks."""

    def __init__(self, plan: HaloPlan, group: dist.ProcessGroup | None) -> None:
        self.plan, self._group = plan, group
        self._out: dict[int, _Posted] = {}
        self._home: dict[int, _Posted] = {}
        self._widths: tuple[int, int] = (0, 0)
        self._like = torch.empty(0)

    def send(self, k_BKTD: Tensor, v_BKTD: Tensor) -> None:
        """Post the keys and values of all stages."""
        self._widths, self._like = (k_BKTD.shape[-1], v_BKTD.shape[-1]), k_BKTD.new_empty(0)
        for stage, blocks in enumerate(self.plan.sends):
            outgoing = [
                (block.target, [self.rows(k_BKTD, block), self.rows(v_BKTD, block)]) for block in blocks
            ]  # fmt: skip
            expected = [(block.source, block) for block in self.plan.receives[stage]]
            self._out[stage] = self._post(outgoing, expected)

    def receive(self, stage: int) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Wait for the keys and values of a stage: each block with its own, [K, tokens, D]."""
        blocks = self.plan.receives[stage]
        return self._unpack([(block.source, block) for block in blocks], self._out.pop(stage).wait())

    def send_home(self, stage: int, grads: Sequence[Tensor]) -> None:
        """Post the gradients of what arrived in a stage; later stages are home before, those without gradients with 0.

        Args:
            grads: of keys and of values in turn, for each row and range of heads.
        """
        for later in range(len(self.plan.sends) - 1, stage - 1, -1):
            if later not in self._home:
                self._post_home(later, grads if later == stage else ())

    def _post_home(self, stage: int, grads: Sequence[Tensor]) -> None:
        outgoing = []
        pairs = zip(grads[::2], grads[1::2], strict=True)
        for blocks in _by_place(self.plan.receives[stage]).values():
            sizes = [block.stop - block.start for block in blocks]
            shapes = [(1, blocks[0].kv_heads, sum(sizes), width) for width in self._widths]
            k_grad, v_grad = next(pairs, None) or (self._like.new_zeros(shape) for shape in shapes)
            parts = zip(blocks, k_grad.split(sizes, dim=2), v_grad.split(sizes, dim=2), strict=True)
            outgoing += [(block.source, [k_part, v_part]) for block, k_part, v_part in parts]
        self._home[stage] = self._post(outgoing, [(block.target, block) for block in self.plan.sends[stage]])

    def receive_home(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Wait for the gradients of all that was sent: each block with its own, [K, tokens, D]."""
        self.send_home(0, ())
        for stage in sorted(self._home, reverse=True):
            blocks = [(block.target, block) for block in self.plan.sends[stage]]
            yield from self._unpack(blocks, self._home.pop(stage).wait())

    def rows(self, x_BKTD: Tensor, block: Block) -> Tensor:
        """The view [K, tokens, D] of a block that is sent."""
        begin = self.plan.rank * self.plan.stretch
        heads = slice(block.kv_start, block.kv_start + block.kv_heads)
        return x_BKTD[block.row, heads, block.start - begin : block.stop - begin]

    def _post(self, outgoing: Iterable[tuple[int, list[Tensor]]], expected: Iterable[tuple[int, Block]]) -> _Posted:
        """One flat message to each rank in `outgoing`, and from each in `expected`."""
        parts: dict[int, list[Tensor]] = {}
        numbers: dict[int, int] = {}
        for peer, tensors in outgoing:
            parts.setdefault(peer, []).extend(tensor.reshape(-1) for tensor in tensors)
        for peer, block in expected:
            numbers[peer] = numbers.get(peer, 0) + block.vectors * sum(self._widths)
        kept = {peer: torch.cat(flat) for peer, flat in parts.items()}
        incoming = {peer: self._like.new_empty(size) for peer, size in numbers.items()}
        wanted = [dist.P2POp(dist.isend, x, group=self._group, group_peer=peer) for peer, x in kept.items()]
        wanted += [dist.P2POp(dist.irecv, x, group=self._group, group_peer=peer) for peer, x in incoming.items()]
        works = dist.batch_isend_irecv(wanted) if wanted else []
        return _Posted(works, incoming, list(kept.values()))

    def _unpack(
        self, blocks: Iterable[tuple[int, Block]], incoming: dict[int, Tensor]
    ) -> Iterator[tuple[Block, Tensor, Tensor]]:
        read = dict.fromkeys(incoming, 0)
        for peer, block in blocks:
            pair = []
            for width in self._widths:
                size = block.vectors * width
                pair.append(incoming[peer][read[peer] : read[peer] + size].view(block.kv_heads, -1, width))
                read[peer] += size
            yield block, pair[0], pair[1]


def _by_place(blocks: Iterable[Block]) -> dict[tuple[int, int], list[Block]]:
    """By row and first key/value head, in the order in which they are received."""
    return {place: list(some) for place, some in groupby(blocks, lambda block: (block.row, block.kv_start))}


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k_BKTD: Tensor, v_BKTD: Tensor, mail: _Mail) -> tuple[Tensor, Tensor, Tensor]:
        ctx.mail = mail
        mail.send(k_BKTD, v_BKTD)
        return k_BKTD, v_BKTD, k_BKTD.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, k_grad: Tensor, v_grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        # The sink tokens of a document have gradients from many ranks: in bfloat16 small ones would vanish.
        summed_in = torch.promote_types(k_grad.dtype, torch.float32)
        sums: dict[tuple[int, ...], tuple[Block, Tensor, Tensor]] = {}
        for block, *parts in ctx.mail.receive_home():
            k_part, v_part = (part.to(summed_in) for part in parts)
            place = (block.row, block.kv_start, block.start, block.stop)
            if place in sums:
                sums[place][1].add_(k_part)
                sums[place][2].add_(v_part)
            else:
                sums[place] = (block, k_part.clone(), v_part.clone())
        if sums:
            k_grad, v_grad = k_grad.clone(), v_grad.clone()  # autograd may hold them for others
        for block, k_sum, v_sum in sums.values():
            for grad, total in ((k_grad, k_sum), (v_grad, v_sum)):
                own = ctx.mail.rows(grad, block)
                own.copy_(total.add_(own))
        return k_grad, v_grad, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, mail: _Mail, stage: int) -> tuple[Tensor, ...]:
        ctx.mail, ctx.stage = mail, stage
        places: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}
        for block, k_part, v_part in mail.receive(stage):
            k_parts, v_parts = places.setdefault((block.row, block.kv_start), ([], []))
            k_parts.append(k_part)
            v_parts.append(v_part)
        tensors = [torch.cat(parts, dim=1)[None] for pair in places.values() for parts in pair]
        return token.new_empty(0), *tensors

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, token: Tensor, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.mail.send_home(ctx.stage, grads)
        return torch.zeros_like(token), None, None
