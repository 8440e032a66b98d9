"""Bytes that a rank sends for one layer of attention when rows of tokens are cut across ranks: halo, ring, Ulysses.

Integers only. `benchmarks/bench_halo.py` counts the same in running processes; tests/planning/test_traffic.py compares.
"""

from __future__ import annotations

from dataclasses import dataclass

from longlora.attention.halo_plan import Block, halo_plan
from longlora.attention.pattern import Pattern
from longlora.attention.ulysses import deal_heads

Heads = tuple[int, int]
"""Query heads and key/value heads."""


@dataclass(frozen=True)
class LayerTraffic:
    """Bytes sent for one layer and one row: `forward` and `backward` by the rank that sends most."""

    forward: int
    backward: int
    mean: float
    """Forward and backward together, of all ranks."""


def halo_traffic(tokens: int, ranks: int, heads: Heads, head_dim: int, pattern: Pattern, width: int) -> LayerTraffic:
    """Of our halo, for one document of `tokens` tokens: what `halo_plan` sends, and the gradients that come home.

    Args:
        head_dim: of keys and of values.
        width: bytes of a number.

    Raises:
        ModelError: a stretch is shorter than a group or a window, or attention is full.
    """
    padded = -(-tokens // ranks) * ranks
    plans = [halo_plan([[0, tokens]], padded, pattern, heads, rank, ranks) for rank in range(ranks)]
    size = 2 * head_dim * width  # a key and a value
    sent = [size * _vectors(plan.sends) for plan in plans]
    home = [size * _vectors(plan.receives) for plan in plans]
    return LayerTraffic(max(sent), max(home), (sum(sent) + sum(home)) / ranks)


def ring_traffic(tokens: int, ranks: int, heads: Heads, head_dim: int, width: int) -> LayerTraffic:
    """Of ring attention: keys and values go once around all ranks, in the backward pass with their gradients.

    Gradients make one more step, to come home. Whole keys and values travel also where a causal rank has no use for
    them.
    """
    own = -(-tokens // ranks) * 2 * heads[1] * head_dim * width
    forward, backward = (ranks - 1) * own, (2 * ranks - 1) * own if ranks > 1 else 0
    return LayerTraffic(forward, backward, float(forward + backward))


def ulysses_traffic(tokens: int, ranks: int, heads: Heads, head_dim: int, width: int) -> LayerTraffic:
    """Of Ulysses: all-to-all exchanges tokens for heads; queries, keys and values before attention, its output after.

    Key/value heads that are fewer than the ranks are copied, and where heads do not divide, empty places travel too.

    Raises:
        ModelError: there are more ranks than query heads.
    """
    places = sum(deal_heads(*heads, ranks).places)  # of one rank, for queries and for keys
    sent = (ranks - 1) * -(-tokens // ranks) * 2 * places * head_dim * width
    return LayerTraffic(sent, sent, float(2 * sent))


def _vectors(stages: tuple[tuple[Block, ...], ...]) -> int:
    return sum(block.vectors for stage in stages for block in stage)
