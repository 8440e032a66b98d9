"""Bytes of attention across ranks: by hand, and against the rows that running processes counted."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from longlora.attention.pattern import S2Pattern, WindowPattern
from longlora.errors import ModelError
from longlora.planning.traffic import LayerTraffic, halo_traffic, ring_traffic, ulysses_traffic

COUNTED = Path(__file__).parents[2] / "benchmarks" / "results" / "halo.csv"
_BFLOAT16 = 2


def rows() -> list[dict[str, str]]:
    with COUNTED.open(encoding="utf-8") as handle:
        found = [row for row in csv.DictReader(handle) if row["dtype"] == "bfloat16"]
    assert {row["way"] for row in found} == {"halo", "ring attention", "Ulysses"}
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['way']}-{row['tokens']}-{row['ranks']}-{row['date']}")
def test_it_is_what_processes_counted(row: dict[str, str]) -> None:
    """`benchmarks/bench_halo.py` counts the messages of a forward and a backward pass."""
    tokens, ranks, head_dim = (int(row[name]) for name in ("tokens", "ranks", "head_dim"))
    heads = (int(row["query_heads"]), int(row["kv_heads"]))
    if row["way"] == "halo":
        pattern = S2Pattern(int(row["group_size"]), int(row["sink_tokens"]))
        made = halo_traffic(tokens, ranks, heads, head_dim, pattern, _BFLOAT16)
    else:
        way = ring_traffic if row["way"] == "ring attention" else ulysses_traffic
        made = way(tokens, ranks, heads, head_dim, _BFLOAT16)
    counted = tuple(int(row[name]) for name in ("forward_most_bytes", "backward_most_bytes", "mean_bytes"))
    assert (made.forward, made.backward, int(made.mean)) == counted


def test_a_halo_is_half_a_group_of_the_shifted_heads_at_any_length() -> None:
    # 4 of 8 key/value heads are shifted: 1,024 keys and values of 128 numbers for each of them.
    half_group = 4 * 1024 * 2 * 128 * 2
    for tokens in (2**16, 2**20, 10 * 2**20):
        made = halo_traffic(tokens, 8, (32, 8), 128, S2Pattern(2048), 2)
        assert made == LayerTraffic(half_group, half_group, 7 / 8 * 2 * half_group)


def test_windows_and_one_rank() -> None:
    window = halo_traffic(4096, 4, (4, 2), 16, WindowPattern(256), 4)
    assert window.forward == 2 * 255 * 2 * 16 * 4
    for made in (
        halo_traffic(4096, 1, (4, 2), 16, S2Pattern(256, 4), 2),
        ring_traffic(4096, 1, (4, 2), 16, 2),
        ulysses_traffic(4096, 1, (4, 2), 16, 2),
    ):
        assert made == LayerTraffic(0, 0, 0.0)


def test_ring_and_ulysses_grow_with_the_tokens() -> None:
    for way in (ring_traffic, ulysses_traffic):
        one, four = (way(tokens, 8, (32, 8), 128, 2) for tokens in (2**17, 2**19))
        assert four.mean == 4 * one.mean
    # Of keys and values each rank passes on 7 stretches, and 15 backward.
    assert ring_traffic(2**17, 8, (32, 8), 128, 2).forward == 7 * 2**14 * 2 * 8 * 128 * 2


def test_ulysses_copies_key_heads_that_are_too_few_and_pads_those_that_do_not_divide() -> None:
    few = ulysses_traffic(1024, 8, (8, 2), 16, 2)  # a query head and a copied key/value head for each rank
    assert few.forward == 7 * 128 * 2 * (1 + 1) * 16 * 2
    odd = ulysses_traffic(1024, 2, (9, 3), 16, 2)  # five places for four or five query heads, and as many copies
    assert odd.forward == 512 * 2 * (5 + 5) * 16 * 2
    with pytest.raises(ModelError, match="at most 8"):
        ulysses_traffic(1024, 16, (8, 2), 16, 2)


def test_a_stretch_shorter_than_a_group_is_refused() -> None:
    with pytest.raises(ModelError, match="shorter than group_size=2048"):
        halo_traffic(8192, 8, (8, 8), 16, S2Pattern(2048), 2)
