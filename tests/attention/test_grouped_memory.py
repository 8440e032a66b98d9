"""Budgets of allocated memory: forward and backward, on the CPU's own kernel, on the path for any device, soft-capped.

In units of the queries, for 4 query heads to 1 key/value head: keys and values are a quarter each. Breaking a budget:
a copy of keys and values for each query head (1.5 more), a T x T mask (32), a zero tensor for each slice (many).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from attention_cases import PATHS, qkv, run
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longlora.attention import softcap
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern

CPU, ANY = PATHS[:2]


@dataclass(frozen=True)
class Bytes:
    """Allocated in all, freed or not; and the most at one time."""

    total: int
    peak: int


def measured(profile: torch.profiler.profile) -> Bytes:
    total = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    held = peak = 0
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return Bytes(total, peak)


def allocated(
    path: str, inputs: list[Tensor], pattern: Pattern, bounds: list[list[int]] | None = None, **extras: object
) -> tuple[Bytes, Bytes]:
    """By forward and by backward, the inputs in float32."""
    q, k, v = (x.detach().float().requires_grad_() for x in inputs)
    B, H, T, D = q.shape
    grad = torch.zeros(B, T, H, D)
    with torch.profiler.profile(profile_memory=True) as forward:
        out = run(path, [q, k, v], bounds or [[0, T]] * B, pattern, **extras)
    with torch.profiler.profile(profile_memory=True) as backward:
        torch.autograd.grad(out, (q, k, v), grad)
    return measured(forward), measured(backward)


@pytest.mark.parametrize("sinks", [0, 4])
def test_cpu_kernel(sinks: int) -> None:
    """Forward: the kernel's output and the whole output (2). Backward: the kernel's gradients and the whole ones (3),
    and the kernel's own scratch (1). Sinks add one copy of queries, keys and values to the forward pass (1.5), and to
    the backward pass that and one of the output and of its gradient (3.5). A tenth is for the rows of the sinks and for
    sums of exponentials.
    """
    forward, backward = allocated(CPU, inputs := qkv(1, 8, 2, 8192, D=32), S2Pattern(64, sinks))
    unit = inputs[0].numel() * 4
    assert forward.total < unit * 1.1 * (2 + (1.5 if sinks else 0))
    assert backward.total < unit * 1.1 * (4 + (3.5 if sinks else 0))


@pytest.mark.parametrize("documents", [1, 8])
@pytest.mark.parametrize("sinks", [0, 4])
def test_any_device(sinks: int, documents: int) -> None:
    """Forward: the kernel's output, that of both grids and that of the shifted heads in one piece each (2.5); sinks add
    the copy with them (1.5), the output without them and that of the other heads (1.5). Backward: kernel gradients
    and scratch (2.5), whole ones of both grids and of the shifted heads (2.25); with sinks 8.25. Documents add the
    output in one piece (1) and gradients in one piece (1.5).
    """
    inputs = qkv(1, 8, 2, 8192, D=32)
    bounds = [list(range(0, 8193, 8192 // documents))]
    forward, backward = allocated(ANY, inputs, S2Pattern(64, sinks), bounds)
    unit = inputs[0].numel() * 4
    assert forward.total < unit * 1.1 * (2.5 + (3 if sinks else 0) + (1 if documents > 1 else 0))
    assert backward.total < unit * 1.1 * (4.75 + (3.5 if sinks else 0) + (1.5 if documents > 1 else 0))


@pytest.mark.parametrize("window", [64, 1024])
def test_windows_on_any_device(window: int) -> None:
    """Forward: the output of the blocks, of the segments and in one piece (3), masks for 1024 tokens (0.75). Backward:
    the kernel's gradients, of which those of keys and values are twice or three times as large, its scratch, their
    sums over blocks, and whole ones (11).
    """
    inputs = qkv(1, 8, 2, 8192, D=32)
    forward, backward = allocated(ANY, inputs, WindowPattern(window))
    unit = inputs[0].numel() * 4
    assert forward.total < unit * 1.05 * (3 + (0.75 if window > 64 else 0))
    assert backward.total < unit * 1.05 * 11


@pytest.mark.parametrize("path", [CPU, ANY])
@pytest.mark.parametrize("pattern", [S2Pattern(64, 4), WindowPattern(64)], ids=str)
def test_memory_grows_linearly_with_the_sequence(pattern: Pattern, path: str) -> None:
    """4 times the tokens, 4 times the bytes; a T x T mask would take 16 times, a zero tensor for each block too."""
    short, long = (sum(x.total for x in allocated(path, qkv(1, 4, 2, T, D=16), pattern)) for T in (2048, 8192))
    assert long < 4.4 * short


@pytest.mark.parametrize("path", [CPU, ANY])
def test_keys_and_values_are_not_repeated_for_grouped_queries(path: str) -> None:
    """With 16 query heads on one key head, a copy of keys and values for each would be 32 times the keys."""
    inputs = qkv(1, 16, 1, 4096, D=16)
    forward, _ = allocated(path, inputs, S2Pattern(64))
    assert forward.total < (2.5 * 16 + 6) * inputs[1].numel() * 4


def test_soft_capped_groups() -> None:
    """Scores are 2 units. Forward: three tensors of scores (6), copies of queries (1) and of keys and values (0.5), the
    output three times (3). Backward computes the scores again and has as many gradients of them.
    """
    inputs = qkv(1, 8, 2, 4096, D=32)
    forward, backward = allocated(ANY, inputs, S2Pattern(64), softcap=30.0)
    unit = inputs[0].numel() * 4
    assert forward.total < unit * 1.05 * 10.5
    assert backward.total < unit * 1.05 * 32.5


@pytest.mark.parametrize("group", [512, 4096])
def test_soft_capped_attention_computes_few_scores_that_no_query_sees(group: int) -> None:
    """Two products for 5/8 of a square of scores, in four blocks of rows; once they were for all of it."""
    q, k, v = (x.detach().float() for x in qkv(1, 2, 1, 4096, D=8))
    with FlopCounterMode(display=False) as flops:
        run(ANY, [q, k, v], [[0, 4096]], S2Pattern(group), softcap=30.0)
    square = 2 * 2 * 2 * 4096 * group * 8
    assert flops.get_total_flops() <= 0.63 * square


@pytest.mark.parametrize("pattern", [FULL, S2Pattern(4096), WindowPattern(2048)], ids=str)
def test_soft_capped_full_attention_holds_the_scores_of_a_block(pattern: Pattern) -> None:
    """At most 4 tensors of a block's scores at once in forward, 5 in backward, each an eighth of all scores."""
    inputs = qkv(1, 4, 1, 4096, D=8)
    block = softcap._SCORES * 4
    assert block * 8 == 4 * 4096 * 4096 * 4
    forward, backward = allocated(ANY, inputs, pattern, softcap=30.0)
    assert forward.peak < 4 * block
    assert backward.peak < 5 * block
