"""Attention alone, forward and backward in bfloat16: full, the paper's roll, ours, and the floor no grouping can beat.

python benchmarks/bench_attention.py                 writes benchmarks/results/attention.csv
python benchmarks/bench_attention.py --tokens 16384 --repeats 5 --profile

Ways, on queries, keys and values as a transformers layer has them ([B, T, heads, D] in memory):

- full: `scaled_dot_product_attention` over the whole sequence
- Algorithm 1: the paper's, letter by letter, on one tensor of queries, keys and values, repeated to all heads
- roll: the same without the one tensor (`attention/rolled.py`)
- ours, 0 and 4 sink tokens: the backend that is chosen for the device
- floor: one batched causal `scaled_dot_product_attention` over contiguous tensors that were cut into groups beforehand

One process, ways interleaved, median of the repeats. Bytes are all that one forward and backward pass allocates, freed
or not (CPU), or the peak (CUDA).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rows import append_rows, device_for_benchmark, interleaved, percentiles
from torch import Tensor

from longlora.attention.backends import attend, choose_backend
from longlora.attention.pattern import S2Pattern
from longlora.attention.rolled import rolled_attention
from longlora.memory.allocator import keep_freed_memory

# Name: query heads, key/value heads, head dim.
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3.2-1B": (32, 8, 64)}
DTYPE = torch.bfloat16


def algorithm_1(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, group: int) -> Tensor:
    """S2-Attn as the paper's Algorithm 1 has it, on a tensor [B, T, 3, H, D] -> [B, T, H, D]. It leaks."""
    B, H, T, D = q_BHTD.shape
    repeat = H // k_BKTD.shape[1]
    k_BHTD, v_BHTD = k_BKTD.repeat_interleave(repeat, 1), v_BKTD.repeat_interleave(repeat, 1)
    qkv = torch.stack([x.transpose(1, 2) for x in (q_BHTD, k_BHTD, v_BHTD)], dim=2)
    still, shifted = qkv.chunk(2, 3)
    qkv = torch.cat([still, shifted.roll(-group // 2, 1)], 3).view(B * T // group, group, 3, H, D)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, H, D)
    still, shifted = out.chunk(2, 2)
    return torch.cat([still, shifted.roll(group // 2, 1)], 2)


Way = tuple[str, str]
"""Group as given on the command line, and what computes it."""


def make_ways(
    shape: tuple[int, int, int], T: int, groups: dict[str, int], device: torch.device
) -> dict[Way, Callable[[], None]]:
    """One forward and backward pass each."""
    H, K, D = shape
    generator = torch.Generator().manual_seed(0)

    def tensor(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float32).to(device, DTYPE)

    q, k, v = (tensor(1, T, heads, D).transpose(1, 2).requires_grad_() for heads in (H, K, K))
    grad_BTHD = tensor(1, T, H, D)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def step(out_BTHD: Tensor) -> None:
        torch.autograd.grad(out_BTHD, (q, k, v), grad_BTHD)

    def ours(group: int, sinks: int) -> Callable[[], None]:
        return lambda: step(attend(q, k, v, [[0, T]], S2Pattern(group, sinks)))

    def roll(group: int) -> Callable[[], None]:
        return lambda: step(rolled_attention(q, k, v, group))

    def paper(group: int) -> Callable[[], None]:
        return lambda: step(algorithm_1(q, k, v, group))

    def floor(group: int) -> Callable[[], None]:
        cut = [
            x.detach().squeeze(0).unflatten(1, (T // group, group)).transpose(0, 1).contiguous().requires_grad_()
            for x in (q, k, v)
        ]
        cut_grad = tensor(T // group, H, group, D)
        return lambda: torch.autograd.grad(sdpa(*cut), cut, cut_grad) and None

    ways: dict[Way, Callable[[], None]] = {("", "full"): lambda: step(sdpa(q, k, v).transpose(1, 2))}
    for name, group in groups.items():
        ways[name, "Algorithm 1"] = paper(group)
        ways[name, "roll"] = roll(group)
        ways[name, "ours, 0 sinks"] = ours(group, 0)
        ways[name, "ours, 4 sinks"] = ours(group, 4)
        ways[name, "floor"] = floor(group)
    return ways


def allocated_bytes(call: Callable[[], None], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    return sum(max(0, event.self_cpu_memory_usage) for event in profile.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--groups", nargs="+", default=["T/4", "1024"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--full-up-to", type=int, default=65536, help="longest context at which full attention is timed"
    )
    parser.add_argument("--profile", action="store_true", help="print where the time of ours goes; write nothing")
    args = parser.parse_args()
    device = device_for_benchmark()
    keep_freed_memory()
    print(f"backend {choose_backend('auto', device, DTYPE)}")
    for name in args.shapes:
        for T in args.tokens:
            groups = {group: T // 4 if group == "T/4" else int(group) for group in args.groups}
            ways = make_ways(SHAPES[name], T, groups, device)
            if args.full_up_to < T:
                del ways["", "full"]
            if args.profile:
                profile(ways, device)
            else:
                measure(name, T, groups, ways, args.repeats, device)


def measure(
    shape: str, T: int, groups: dict[str, int], ways: dict[Way, Callable[[], None]], repeats: int, device: torch.device
) -> None:
    seconds = interleaved(ways, repeats, device)
    medians = {way: percentiles(times)[1] for way, times in seconds.items()}
    rows = []
    for (group, way), times in seconds.items():
        p20, p50, p80 = percentiles(times)
        others = {
            "floor": (group, "floor"), "Algorithm 1": (group, "Algorithm 1"), "roll": (group, "roll"),
            "full": ("", "full"),
        }  # fmt: skip
        against = {name: medians[other] / p50 for name, other in others.items() if other in medians}
        rows.append({
            "shape": shape, "tokens": T, "group": group, "group_size": groups.get(group, T), "way": way,
            "p20_s": f"{p20:.4f}", "p50_s": f"{p50:.4f}", "p80_s": f"{p80:.4f}", "repeats": repeats,
            **{f"{name} / this": f"{against[name]:.3f}" if name in against else "" for name in others},
            "bytes": allocated_bytes(ways[group, way], device),
        })  # fmt: skip
        print(
            f"{shape:14} T {T:6} group {group or '-':5} {way:14} p50 {p50:8.4f} s",
            *(f"  {name} / this {ratio:5.2f}" for name, ratio in against.items()),
            f"  {rows[-1]['bytes'] / 2**20:7.0f} MiB",
            flush=True,
        )
    append_rows("attention", rows, device)


def profile(ways: dict[Way, Callable[[], None]], device: torch.device) -> None:
    for (group, way), call in ways.items():
        if way in ("full", "roll", "Algorithm 1"):
            continue
        call()
        with torch.profiler.profile() as recorded:
            call()
        print(f"group {group}, {way}")
        print(recorded.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=8))


if __name__ == "__main__":
    main()
