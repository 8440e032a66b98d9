"""Bytes that a rank sends for one layer of attention when one long document is cut across ranks.

python benchmarks/bench_halo.py            writes benchmarks/results/halo.csv
Ways: our halo; ring attention, where keys and values go once around all ranks, in the backward pass with their
gradients; and Ulysses, where all-to-all exchanges tokens for heads, before and after attention. All are counted, in
processes joined by gloo on this machine: of the halo a whole forward and backward pass, of the two others the exchange
of the same tensors alone. Ring attention sends whole keys and values also where a causal rank has no use for them.
Ulysses needs at least as many key/value heads as ranks; `--kv-heads` below is such a number.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rows import append_rows
from torch import Tensor

from longlora.attention.halo import halo_attention
from longlora.attention.halo_plan import halo_plan
from longlora.attention.pattern import S2Pattern


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes of all messages from this rank to others."""
    sent: list[int] = []
    post, exchange = dist.batch_isend_irecv, dist.all_to_all_single

    def counting_post(ops: list[dist.P2POp]) -> list[dist.Work]:
        sent.extend(op.tensor.numel() * op.tensor.element_size() for op in ops if op.op is dist.isend)
        return post(ops)

    def counting_exchange(output: Tensor, given: Tensor) -> None:
        ranks = dist.get_world_size()  # one of the equal parts stays here
        sent.append(given.numel() * given.element_size() * (ranks - 1) // ranks)
        exchange(output, given)

    with mock.patch.multiple(dist, batch_isend_irecv=counting_post, all_to_all_single=counting_exchange):
        yield sent


def halo(q: Tensor, k: Tensor, v: Tensor, tokens: int, args: argparse.Namespace) -> list[Callable[[], None]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    pattern = S2Pattern(args.group_size, args.sink_tokens)
    plan = halo_plan([[0, tokens]], tokens, pattern, (args.query_heads, args.kv_heads), rank, world)
    outputs: list[Tensor] = []
    return [
        lambda: outputs.append(halo_attention(q, k, v, plan)),
        lambda: outputs[0].sum().backward(),
    ]


def ring(q: Tensor, k: Tensor, v: Tensor, tokens: int, args: argparse.Namespace) -> list[Callable[[], None]]:
    rank, world = dist.get_rank(), dist.get_world_size()

    def around(*tensors: Tensor, steps: int) -> None:
        travelling = torch.cat([x.detach().flatten() for x in tensors])
        for _ in range(steps):
            arriving = torch.empty_like(travelling)
            there, back = (rank + 1) % world, (rank - 1) % world
            ops = [dist.P2POp(dist.isend, travelling, there), dist.P2POp(dist.irecv, arriving, back)]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            travelling = arriving

    def backward() -> None:
        around(k, v, steps=world - 1)
        around(k, v, steps=world)  # gradients, which have to come home

    return [lambda: around(k, v, steps=world - 1), backward]


def ulysses(q: Tensor, k: Tensor, v: Tensor, tokens: int, args: argparse.Namespace) -> list[Callable[[], None]]:
    def exchange() -> None:
        for x in (q, k, v, q):  # the last for the output, of the size of the queries
            given = x.detach().transpose(0, 1).contiguous()  # heads first: equal parts are for the ranks
            dist.all_to_all_single(torch.empty_like(given), given)

    return [exchange, exchange]


WAYS = {"halo": halo, "ring attention": ring, "Ulysses": ulysses}


def work(rank: int, folder: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.ranks, timeout=timedelta(minutes=10)
    )
    found = []
    for tokens in args.tokens:
        for name, way in WAYS.items():
            heads = (args.query_heads, args.kv_heads, args.kv_heads)
            shapes = [(1, count, tokens // args.ranks, args.head_dim) for count in heads]
            qkv = [torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
            sizes = []
            for half in way(*qkv, tokens, args):
                with counted() as sent:
                    half()
                sizes.append(sum(sent))
            found.append((name, tokens, *sizes))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072, 524288])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=2048)
    parser.add_argument("--sink-tokens", type=int, default=4)
    parser.add_argument("--query-heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, args), nprocs=args.ranks)
        by_rank = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(args.ranks)]
    rows = []
    for same in zip(*by_rank, strict=True):
        way, tokens = same[0][:2]
        forward, backward = ([found[place] for found in same] for place in (2, 3))
        rows.append({
            "way": way, "tokens": tokens, "ranks": args.ranks, "group_size": args.group_size,
            "sink_tokens": args.sink_tokens, "query_heads": args.query_heads, "kv_heads": args.kv_heads,
            "head_dim": args.head_dim, "dtype": "bfloat16", "forward_most_bytes": max(forward),
            "backward_most_bytes": max(backward), "mean_bytes": sum(forward + backward) // args.ranks,
        })  # fmt: skip
        print(f"{way:16} {tokens:8} tokens: forward {max(forward):>12,}, backward {max(backward):>12,} bytes at most")
    append_rows("halo", rows, torch.device("cpu"))


if __name__ == "__main__":
    main()
