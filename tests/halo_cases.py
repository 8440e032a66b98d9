"""What the tests of sequence parallelism share: batches, ranks as processes, and what each of them computes.

B batch, T tokens of a whole row, H query heads, K key/value heads, D head dim. Functions that a process runs are here
and not in a test module, which a new process can't import.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from attention_cases import qkv
from forked_ranks import fork_server_of_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longlora.attention.grouped import grouped_attention
from longlora.attention.halo import halo_attention
from longlora.attention.halo_plan import HaloPlan, halo_plan
from longlora.attention.pattern import Pattern, S2Pattern, WindowPattern
from longlora.errors import LongLoraError

SECONDS = 200
"""How long the processes of a test may take, their start included, on a machine that does much else."""
LENGTHS = [64, 256, 2048]
GROUPS_AND_SINKS = [(8, 0), (8, 4), (16, 4)]


@dataclass(frozen=True)
class Case:
    """A batch of whole rows; `tokens` is a multiple of 4."""

    name: str
    bounds_B: list[list[int]]
    tokens: int
    pattern: Pattern
    heads: tuple[int, int] = (4, 2)
    value_width: int = 4
    dtype: torch.dtype = torch.float32
    extras: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> list[Tensor]:
        """Of the whole rows: queries, keys, values, and where they are asked for the learned sinks."""
        made = qkv(len(self.bounds_B), *self.heads, self.tokens, dtype=self.dtype, value_width=self.value_width)
        if self.extras.get("learned_sinks"):
            made.append(torch.linspace(-1, 1, self.heads[0], dtype=self.dtype, requires_grad=True))
        return made

    def options(self, inputs: list[Tensor]) -> dict[str, Any]:
        options = {name: value for name, value in self.extras.items() if name != "learned_sinks"}
        return options | ({"sink_logits_H": inputs[3]} if len(inputs) > 3 else {})

    def plan(self, rank: int, world: int) -> HaloPlan:
        return halo_plan(self.bounds_B, self.tokens, self.pattern, self.heads, rank, world)

    def weight(self) -> Tensor:
        """Gradient of the output [B, T, H, D] of the whole rows."""
        shape = (len(self.bounds_B), self.tokens, self.heads[0], self.value_width)
        generator = torch.Generator().manual_seed(9)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)


def cases() -> list[Case]:
    """Stretches are of 24 tokens on 4 ranks, and of 48 on 2."""
    packed = [0, 7, 30, 31, 77, 90, 95]  # cuts at 24, 48 and 72: in documents, some no longer than a group
    return [
        *(
            Case(f"one document, {sinks} sinks, heads {heads}", [[0, 96]], 96, S2Pattern(8, sinks), heads)
            for sinks in (0, 4)
            for heads in ((4, 2), (9, 3), (4, 1), (2, 2))
        ),
        *(
            Case(f"packed, {sinks} sinks, groups of {size}", [packed, [0, 96]], 96, S2Pattern(size, sinks), (9, 3))
            for sinks in (0, 4)
            for size in (6, 10, 14, 24)
        ),
        Case("odd tail and padding", [[0, 91], [0, 23, 49]], 96, S2Pattern(10, 4)),
        Case("more sinks than half a group", [[0, 23, 96], [0, 47, 96]], 96, S2Pattern(10, 9)),
        Case("documents begin just before the cuts", [[0, 23, 71, 96], [0, 46, 96]], 96, S2Pattern(8, 4)),
        Case("documents end at the cuts", [[0, 24, 48, 96]], 96, S2Pattern(8, 4)),
        Case("a row of padding", [[0], [0, 50]], 96, S2Pattern(8, 2)),
        Case("all heads shifted", [[0, 90]], 96, S2Pattern(10, 3, "all"), (4, 2)),
        Case("no heads shifted", [[0, 90]], 96, S2Pattern(7, 3, "none"), (4, 2)),
        Case("window", [packed, [0, 96]], 96, WindowPattern(11), (4, 2)),
        Case("wider values", [packed], 96, S2Pattern(10, 4), value_width=8),
        Case("learned sinks", [packed], 96, S2Pattern(10, 4), extras={"learned_sinks": True}),
        Case("soft cap", [packed], 96, S2Pattern(10, 4), extras={"softcap": 1.5, "scaling": 0.3}),
    ]


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return ((ours - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).item()


def errors_of_case(case: Case, rank: int, world: int) -> dict[str, float]:
    """Against one process, relative: of the output and of all gradients of this rank's stretch."""
    whole, weight = case.inputs(), case.weight()
    truth = grouped_attention(*whole[:3], case.bounds_B, case.pattern, **case.options(whole))
    expected = torch.autograd.grad((truth * weight).sum(), whole)
    stretch = case.tokens // world
    begin = rank * stretch
    own = [x.detach().narrow(2, begin, stretch).clone().requires_grad_() for x in whole[:3]] + [
        x.detach().clone().requires_grad_() for x in whole[3:]
    ]
    out = halo_attention(*own[:3], case.plan(rank, world), **case.options(own))
    grads = list(torch.autograd.grad((out * weight.narrow(1, begin, stretch)).sum(), own))
    errors = {"output": relative_error(out, truth.narrow(1, begin, stretch))}
    for name, grad, wanted in zip("qkv", grads, expected, strict=False):
        errors[f"d{name}"] = relative_error(grad, wanted.narrow(2, begin, stretch))
    if len(grads) > 3:
        dist.all_reduce(grads[3])
        errors["d sink logits"] = relative_error(grads[3], expected[3])
    return errors


@contextmanager
def counted_sends() -> Iterator[list[tuple[int, int]]]:
    """The rank in the group and the bytes of each message that this process sends."""
    sent: list[tuple[int, int]] = []
    post = dist.batch_isend_irecv

    def counting(ops: list[dist.P2POp]) -> list[dist.Work]:
        sent.extend((op.group_peer, op.tensor.numel() * op.tensor.element_size()) for op in ops if op.op is dist.isend)
        return post(ops)

    with mock.patch.object(dist, "batch_isend_irecv", counting):
        yield sent


def run_ranks(
    world: int, work: Callable[..., Any], folder: Path, *arguments: Any, seconds: float = SECONDS
) -> list[Any]:
    """``work(rank, world, *arguments)`` in processes joined by gloo; what each returned (JSON), by rank.

    Raises:
        TimeoutError: they took longer than `seconds`, and were killed.
    """
    fork_server_of_ranks()
    context = mp.start_processes(
        _rank, (world, work, str(folder), seconds, arguments), nprocs=world, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{work.__name__} on {world} ranks took over {seconds} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def _rank(
    rank: int, world: int, work: Callable[..., Any], folder: str, seconds: float, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=seconds),
    )
    try:
        result = work(rank, world, *arguments)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
        dist.barrier()
    except BaseException:  # of several that fail, the first to end may only say that another is gone
        traceback.print_exc()
        raise
    dist.destroy_process_group()


def sent_bytes(rank: int, world: int, group_size: int, sinks: int) -> list[list[list[int]]]:
    """For one document of each of `LENGTHS`, [rank, bytes] of the messages of the forward and of the backward pass."""
    sizes = []
    for length in LENGTHS:
        case = Case("", [[0, length]], length, S2Pattern(group_size, sinks), (4, 2))
        own = [x.detach().narrow(2, rank * length // world, length // world).requires_grad_() for x in case.inputs()]
        for backward in (False, True):
            with counted_sends() as sent:
                if not backward:
                    out = halo_attention(*own, case.plan(rank, world))
                else:
                    out.sum().backward()
            sizes.append([list(message) for message in sent])
    return sizes


def two_layers(x: Tensor, attention: Callable[..., Tensor], checkpointed: str) -> Tensor:
    """Two layers of attention of q, k and v made from x, recomputed in the backward pass or not."""

    def layer(x: Tensor) -> Tensor:
        return torch.tanh(attention(x, 2 * x, x + 1).transpose(1, 2)) + x

    for _ in range(2):
        x = layer(x) if checkpointed == "no" else checkpoint(layer, x, use_reentrant=checkpointed == "reentrant")
    return x


def errors_of_layers(rank: int, world: int, checkpointed: str) -> dict[str, float]:
    """Two layers of attention after one another, recomputed in the backward pass, on every mesh row by itself.

    A world of 4 is a mesh of 2 data ranks x 2 sequence ranks, each data rank with a batch of its own.
    """
    data_ranks = world // 2
    groups = [dist.new_group([2 * data, 2 * data + 1]) for data in range(data_ranks)]
    data, place = divmod(rank, 2)
    case = Case("", [[[0, 7, 30, 96], [0, 61, 90]][data]], 96, S2Pattern(10, 3), (4, 4))
    whole = [x + data for x in case.inputs()]

    layers = partial(two_layers, checkpointed=checkpointed)
    x = whole[0].detach().requires_grad_()
    truth = layers(x, lambda q, k, v: grouped_attention(q, k, v, case.bounds_B, case.pattern))
    (truth * case.weight().transpose(1, 2)).sum().backward()
    own = x.detach().narrow(2, 48 * place, 48).clone().requires_grad_()
    plan = case.plan(place, 2)
    out = layers(own, lambda q, k, v: halo_attention(q, k, v, plan, groups[data]))
    (out * case.weight().transpose(1, 2).narrow(2, 48 * place, 48)).sum().backward()
    return {
        "output": relative_error(out, truth.narrow(2, 48 * place, 48)),
        "gradient": relative_error(own.grad, x.grad.narrow(2, 48 * place, 48)),
    }


def errors_in_bfloat16(rank: int, world: int) -> dict[str, list[float]]:
    """Ours and one process's, both in bfloat16 under autocast, against one process in float64."""
    case = Case("", [[0, 5, 96]], 96, S2Pattern(8, 4), (9, 3))
    stretch, weight = case.tokens // world, case.weight()
    here = slice(rank * stretch, (rank + 1) * stretch)
    whole = case.inputs()
    exact = [x.detach().double().requires_grad_() for x in whole]
    truth = grouped_attention(*exact, case.bounds_B, case.pattern)
    truths = [truth[:, here], *(x[:, :, here] for x in torch.autograd.grad((truth * weight).sum(), exact))]
    own = [x.detach()[:, :, here].clone().requires_grad_() for x in whole]
    with torch.autocast("cpu", torch.bfloat16), counted_sends() as sent:
        naive = grouped_attention(*whole, case.bounds_B, case.pattern)
        ours = halo_attention(*own, case.plan(rank, world))
    assert ours.dtype == torch.bfloat16
    naives = [naive[:, here], *(x[:, :, here] for x in torch.autograd.grad((naive * weight).sum(), whole))]
    mine = [ours, *torch.autograd.grad((ours * weight[:, here]).sum(), own)]
    pairs = {
        name: [relative_error(one.double(), exact), relative_error(other.double(), exact)]
        for name, one, other, exact in zip(("output", "dq", "dk", "dv"), mine, naives, truths, strict=True)
    }
    return pairs | {"bytes": [float(size) for _, size in sent]}


def refused_group(rank: int, world: int) -> str:
    """What a plan for other ranks gives."""
    case = Case("", [[0, 96]], 96, S2Pattern(8), (4, 2))
    own = [x.narrow(2, 0, 48 // world) for x in case.inputs()]
    try:
        halo_attention(*own, case.plan(rank, 2 * world))
    except LongLoraError as error:
        return str(error)
    return "accepted"


def one_rank_dies(rank: int, world: int) -> str:
    """The last rank ends before the exchange; the message that the others get."""
    case = Case("", [[0, 96]], 96, S2Pattern(8, 4), (4, 2))
    if rank == world - 1:
        os._exit(1)
    own = [x.detach().narrow(2, rank * 96 // world, 96 // world).requires_grad_() for x in case.inputs()]
    halo_attention(*own, case.plan(rank, world)).sum().backward()
    return "went on"


def hang(rank: int, world: int) -> None:
    time.sleep(600)


def everything(rank: int, world: int) -> dict[str, Any]:
    """All that the tests want to know of processes that work: starting them takes longest."""
    return {
        "cases": {case.name: errors_of_case(case, rank, world) for case in cases()},
        "layers": {name: errors_of_layers(rank, world, name) for name in ("no", "reentrant", "not reentrant")},
        "bytes": [sent_bytes(rank, world, *pattern) for pattern in GROUPS_AND_SINKS],
        "bfloat16": errors_in_bfloat16(rank, world),
        "refused": refused_group(rank, world),
    }
