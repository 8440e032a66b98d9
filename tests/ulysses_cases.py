"""What a process of a group computes for the tests of full attention across ranks; see `halo_cases.py`.

B batch, T tokens of a whole row, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from halo_cases import Case, relative_error, two_layers
from torch import Tensor

from longlora.attention.backends import Plans
from longlora.attention.grouped import grouped_attention
from longlora.attention.pattern import FULL, WindowPattern
from longlora.attention.sequence import SequenceCut
from longlora.attention.ulysses import deal_heads, ulysses_attention
from longlora.errors import LongLoraError

PACKED = [0, 7, 30, 31, 77, 90, 95]
"""Cut at 24, 48 and 72, in documents; one token of padding."""
COUNTED = [((4, 4), 64), ((9, 3), 64), ((8, 1), 64), ((8, 1), 256)]
"""Heads and tokens."""


def cases() -> list[Case]:
    """Stretches are of 24 tokens on 4 ranks, and of 48 on 2."""
    capped: dict[str, Any] = {"softcap": 1.5, "scaling": 0.3}
    return [
        *(
            Case(f"heads {heads}", [PACKED, [0, 96]], 96, FULL, heads)
            for heads in ((4, 4), (5, 5), (9, 3), (4, 2), (8, 1), (14, 2))
        ),
        Case("padding", [[0, 20], [0], [0, 23, 91]], 96, FULL, (9, 3)),
        Case("documents end at the cuts", [[0, 24, 48, 96]], 96, FULL),
        Case("wider values", [PACKED], 96, FULL, (9, 3), value_width=8),
        Case("narrower values", [PACKED], 96, FULL, (4, 2), value_width=2),
        Case("learned sinks", [PACKED], 96, FULL, (9, 3), extras={"learned_sinks": True}),
        Case("soft cap", [PACKED, [0, 96]], 96, FULL, (9, 3), extras=capped),
        Case("soft cap and learned sinks", [PACKED], 96, FULL, (8, 1), extras={"learned_sinks": True, **capped}),
        Case("a window longer than a stretch", [PACKED], 96, WindowPattern(55), (9, 3)),
    ]


def cut_of(case: Case, rank: int, world: int, group: dist.ProcessGroup | None = None) -> SequenceCut:
    bounds = tuple(map(tuple, case.bounds_B))
    return SequenceCut(group or dist.group.WORLD, rank, world, bounds, case.tokens)  # type: ignore[arg-type]


def own_stretch(case: Case, rank: int, world: int) -> list[Tensor]:
    """The inputs of this rank."""
    size = case.tokens // world
    return [x.detach().narrow(2, rank * size, size).clone().requires_grad_() for x in case.inputs()[:3]] + [
        x.detach().clone().requires_grad_() for x in case.inputs()[3:]
    ]


def errors_of_case(case: Case, rank: int, world: int) -> dict[str, float]:
    """Against one process, relative: of the output and of all gradients of this rank's stretch."""
    whole, weight = case.inputs(), case.weight()
    truth = grouped_attention(*whole[:3], case.bounds_B, case.pattern, **case.options(whole))
    expected = torch.autograd.grad((truth * weight).sum(), whole)
    stretch = case.tokens // world
    own = own_stretch(case, rank, world)
    options = {"pattern": case.pattern, **case.options(own)}
    out = ulysses_attention(*own[:3], cut_of(case, rank, world), **options)
    grads = list(torch.autograd.grad((out * weight.narrow(1, rank * stretch, stretch)).sum(), own))
    with torch.no_grad():
        evaluated = ulysses_attention(*own[:3], cut_of(case, rank, world), plans=Plans(), **options)
    assert not evaluated.requires_grad
    assert torch.equal(evaluated, out)
    errors = {"output": relative_error(out, truth.narrow(1, rank * stretch, stretch))}
    for name, grad, wanted in zip("qkv", grads, expected, strict=False):
        # Of a stretch of padding all gradients are 0, which has no relative error.
        wanted_here = wanted.narrow(2, rank * stretch, stretch)
        errors[f"d{name}"] = ((grad - wanted_here).abs().max() / wanted.abs().max()).item()
    if len(grads) > 3:
        dist.all_reduce(grads[3])
        errors["d sink logits"] = relative_error(grads[3], expected[3])
    return errors


def errors_of_layers(rank: int, world: int, checkpointed: str) -> dict[str, float]:
    """Two layers one after the other, recomputed in the backward pass, on every mesh row by itself.

    A world of 4 is a mesh of 2 data ranks x 2 sequence ranks, each data rank with a batch of its own.
    """
    groups = [dist.new_group([2 * data, 2 * data + 1]) for data in range(world // 2)]
    data, place = divmod(rank, 2)
    case = Case("", [[[0, 7, 30, 96], [0, 61, 90]][data]], 96, FULL, (5, 5))
    whole = [x + data for x in case.inputs()]

    layers = partial(two_layers, checkpointed=checkpointed)
    x = whole[0].detach().requires_grad_()
    truth = layers(x, lambda q, k, v: grouped_attention(q, k, v, case.bounds_B, FULL))
    (truth * case.weight().transpose(1, 2)).sum().backward()
    own = x.detach().narrow(2, 48 * place, 48).clone().requires_grad_()
    cut = cut_of(case, place, 2, groups[data])
    out = layers(own, lambda q, k, v: ulysses_attention(q, k, v, cut))
    (out * case.weight().transpose(1, 2).narrow(2, 48 * place, 48)).sum().backward()
    return {
        "output": relative_error(out, truth.narrow(2, 48 * place, 48)),
        "gradient": relative_error(own.grad, x.grad.narrow(2, 48 * place, 48)),
    }


@contextmanager
def counted_sends() -> Iterator[list[int]]:
    """Bytes that this process sends to others in each all-to-all."""
    sent: list[int] = []
    exchange = dist.all_to_all_single

    def counting(output: Tensor, input: Tensor, *, group: Any, **options: Any) -> Any:
        ranks = dist.get_world_size(group)  # one of the equal parts stays here
        sent.append(input.numel() * input.element_size() * (ranks - 1) // ranks)
        return exchange(output, input, group=group, **options)

    with mock.patch.object(dist, "all_to_all_single", counting):
        yield sent


def sent_bytes(rank: int, world: int) -> list[list[int]]:
    """Of each of `COUNTED`: bytes of the forward and of the backward pass, in bfloat16 by autocast."""
    sizes = []
    for heads, tokens in COUNTED:
        case = Case("", [[0, tokens]], tokens, FULL, heads)
        own = own_stretch(case, rank, world)
        with torch.autocast("cpu", torch.bfloat16), counted_sends() as forward:
            out = ulysses_attention(*own, cut_of(case, rank, world))
        assert out.dtype == torch.bfloat16
        with counted_sends() as backward:
            out.sum().backward()
        sizes.append([sum(forward), sum(backward)])
    return sizes


def expected_bytes(heads: tuple[int, int], tokens: int, world: int) -> int:
    """Queries and the output, keys and values of 4 numbers of 2 bytes, to each other rank its places."""
    queries, kv = deal_heads(*heads, world).places
    return (world - 1) * (tokens // world) * (2 * queries + 2 * kv) * 4 * 2


def peak_bytes(rank: int, world: int) -> list[int]:
    """Held at most by forward and backward pass, for two lengths."""
    peaks = []
    for tokens in (1024, 4096):
        case = Case("", [[0, tokens]], tokens, FULL, (4, 2))
        own = own_stretch(case, rank, world)
        with torch.profiler.profile(profile_memory=True) as profile:
            ulysses_attention(*own, cut_of(case, rank, world)).sum().backward()
        held = most = 0
        changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(changes, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        peaks.append(most)
    return peaks


def of_padding_alone(rank: int, world: int) -> bool:
    """Whether output and gradients of a batch without tokens are 0, and there: a rank has to run backward."""
    case = Case("", [[0], [0]], 96, FULL, (9, 3), extras={"learned_sinks": True})
    own = own_stretch(case, rank, world)
    out = ulysses_attention(*own[:3], cut_of(case, rank, world), **case.options(own))
    grads = torch.autograd.grad(out.sum(), own)
    return not any(x.any() for x in (out, *grads))


def refusals(rank: int, world: int) -> list[str]:
    """Messages for too few heads, another batch, another group and rows that are not cut evenly."""
    few = Case("", [[0, 96]], 96, FULL, (world - 1, 1))
    case = Case("", [[0, 96]], 96, FULL)
    attempts = [
        (few, cut_of(few, rank, world)),
        (case, cut_of(Case("", [[0, 96], [0, 96]], 96, FULL), rank, world)),
        (case, cut_of(case, world - 1 - rank, world)),
        (case, cut_of(Case("", [[0, 98]], 98, FULL), rank, world)),
    ]
    messages = []
    for each, cut in attempts:
        try:
            ulysses_attention(*own_stretch(each, rank, world), cut)
        except LongLoraError as error:
            messages.append(str(error))
        else:
            messages.append("accepted")
    return messages


def everything(rank: int, world: int) -> dict[str, Any]:
    """All that the tests want to know: starting processes takes longest."""
    return {
        "cases": {case.name: errors_of_case(case, rank, world) for case in cases()},
        "layers": {name: errors_of_layers(rank, world, name) for name in ("no", "reentrant", "not reentrant")},
        "bytes": sent_bytes(rank, world),
        "peaks": peak_bytes(rank, world),
        "padding": of_padding_alone(rank, world),
        "refused": refusals(rank, world),
    }
