"""The tables of docs/scale.md on what processes that share a row send: planned for an 8B model, and counted."""

from __future__ import annotations

from results_rows import every

from longlora.attention.pattern import S2Pattern
from longlora.errors import ModelError
from longlora.planning.traffic import LayerTraffic, halo_traffic, ring_traffic, ulysses_traffic

K, M = 2**10, 2**20
# A layer of Llama-3.1-8B or Qwen3-8B: query heads, key/value heads, head dim.
_LAYER = ((32, 8), 128)
_TRAFFIC = ((128 * K, 8), (M, 8), (M, 64), (10 * M, 64), (10 * M, 128))


def traffic_block() -> str:
    """Planned bytes of a layer of an 8B model."""
    heads, width = _LAYER
    lines = [
        "| context | GPUs that share a row | halo | ring attention | Ulysses |",
        "|---|---|---|---|---|",
    ]
    for tokens, ranks in _TRAFFIC:
        sizes = [
            megabytes(halo_traffic(tokens, ranks, heads, width, S2Pattern(8192, 4), 2)),
            megabytes(ring_traffic(tokens, ranks, heads, width, 2)),
        ]
        try:
            sizes.append(megabytes(ulysses_traffic(tokens, ranks, heads, width, 2)))
        except ModelError:
            sizes.append(f"needs {ranks} heads")
        lines.append(f"| {written(tokens)} | {ranks} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def megabytes(traffic: LayerTraffic) -> str:
    """Forward and backward together, in 10^6 bytes."""
    return f"{(traffic.forward + traffic.backward) / 1e6:,.1f}"


def measured_block() -> str:
    """Counted bytes of a tiny layer, from benchmarks/results/halo.csv."""
    rows = every("halo")
    last = rows[-1]
    same = [row for row in rows if row["commit"] == last["commit"] and row["ranks"] == last["ranks"]]
    ways = list(dict.fromkeys(row["way"] for row in same))
    contexts = sorted({int(row["tokens"]) for row in same})
    lines = [
        f"{last['ranks']} processes, groups of {int(last['group_size']):,}, {last['sink_tokens']} sink tokens, "
        f"{last['query_heads']} query and {last['kv_heads']} key/value heads of {last['head_dim']}, {last['dtype']}; "
        f"{last['date']}, commit {last['commit']}.",
        "",
        f"| kB of a layer | {' | '.join(map(written, contexts))} |",
        f"|---|{'---|' * len(contexts)}",
    ]
    for way in ways:
        found = {int(row["tokens"]): row for row in same if row["way"] == way}
        sizes = [int(row["forward_most_bytes"]) + int(row["backward_most_bytes"]) for _, row in sorted(found.items())]
        lines.append(f"| {way} | {' | '.join(f'{size / 1e3:,.0f}' for size in sizes)} |")
    return "\n".join(lines)


def written(tokens: int) -> str:
    """128k, 1M, 10M."""
    return f"{tokens // M}M" if tokens % M == 0 else f"{tokens // K}k"
