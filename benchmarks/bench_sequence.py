"""Time of a training step against sequence ranks, at the same number of tokens on each rank.

python benchmarks/bench_sequence.py                    appends to benchmarks/results/sequence.csv
One document as long as all ranks together, cut on bounds of groups; forward and backward pass through `LossModel` and
DDP, as `longlora train` computes them, in processes joined by gloo on this machine with one thread each. The halo of
each rank, and so its work, stays the same. With more processes than cores wall time says how often these are shared,
so the processor time of the busiest rank stands beside it; gloo's threads are part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rows import append_rows, percentiles
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from longlora import use_s2
from longlora.data.stretches import StretchCollator
from longlora.training.distributed import Ranks
from longlora.training.loss_model import LossModel
from longlora.training.sequence import sequence_group

SHAPE = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip


def work(rank: int, world: int, folder: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(minutes=10)
    )
    tokens = world * args.tokens
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=tokens)).train()
    use_s2(model, group_size=args.group_size, sink_tokens=args.sink_tokens)
    loss_model = DistributedDataParallel(
        LossModel(model, 1024, torch.float32, sequence_group(Ranks(rank, world, rank, world)))
    )
    ids = torch.randint(SHAPE["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(1))
    row = {"input_ids": ids, "position_ids": torch.arange(tokens), "labels": ids}
    batch = StretchCollator(0, rank, world, args.group_size, weighted=False)([row])
    wall, processor = [], []
    for _ in range(args.steps + 1):
        dist.barrier()
        began = (time.perf_counter(), time.process_time())
        loss_model(**batch, num_items_in_batch=tokens - 1)["loss"].backward()
        loss_model.zero_grad()
        processor.append(time.process_time() - began[1])
        dist.barrier()
        wall.append(time.perf_counter() - began[0])
    (Path(folder) / f"{rank}.json").write_text(json.dumps([wall[1:], processor[1:]]))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=4096, help="on each rank")
    parser.add_argument("--group-size", type=int, default=1024)
    parser.add_argument("--sink-tokens", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="timed, after one that is not")
    args = parser.parse_args()
    rows = []
    for world in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, (world, folder, args), nprocs=world)
            found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
        p20, p50, p80 = percentiles([max(step) for step in zip(*(wall for wall, _ in found), strict=True)])
        busiest = max(percentiles(processor)[1] for _, processor in found)
        rows.append({
            "ranks": world, "tokens_per_rank": args.tokens, "group_size": args.group_size,
            "sink_tokens": args.sink_tokens, "steps": args.steps, "cores": os.cpu_count(),
            "seconds_p20": f"{p20:.3f}", "seconds_p50": f"{p50:.3f}", "seconds_p80": f"{p80:.3f}",
            "processor_seconds_p50": f"{busiest:.3f}",
        })  # fmt: skip
        print(f"{world} ranks: {p50:.2f} s a step ({p20:.2f}-{p80:.2f}), {busiest:.2f} s of processor on the busiest")
    append_rows("sequence", rows, torch.device("cpu"))


if __name__ == "__main__":
    main()
