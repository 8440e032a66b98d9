"""Next-token loss, forward and backward: ours in chunks, torch's linear_cross_entropy, and plain logits.

python benchmarks/bench_loss.py            writes benchmarks/results/loss.csv
All ways run interleaved in one process; a row is the median of the repeats, with the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlora.evaluation.run import device_name
from longlora.memory.chunked_loss import chunked_loss

HIDDEN, VOCABULARY = 576, 49152  # SmolLM2-135M
RESULTS = Path(__file__).parent / "results" / "loss.csv"


def ways(head: nn.Linear, chunk_tokens: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    def plain(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), labels, reduction="sum")

    def torch_chunked(hidden: Tensor, labels: Tensor) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        weight = head.weight.to(hidden.dtype)
        return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)

    def ours(hidden: Tensor, labels: Tensor) -> Tensor:
        return chunked_loss(hidden, labels, head, chunk_tokens)

    return {"plain logits": plain, "torch linear_cross_entropy": torch_chunked, f"chunked {chunk_tokens}": ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--chunk-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False, device=device)
    hidden = torch.randn(args.tokens, HIDDEN, dtype=torch.bfloat16, device=device).requires_grad_()
    labels = torch.randint(VOCABULARY, (args.tokens,), device=device)
    seconds: dict[str, list[float]] = {}
    for _ in range(args.repeats + 1):
        for name, loss in ways(head, args.chunk_tokens).items():
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                value = loss(hidden, labels)
            value.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.setdefault(name, []).append(time.perf_counter() - began)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        if handle.tell() == 0:
            writer.writerow(
                "way tokens hidden vocabulary p20_s p50_s p80_s repeats device torch commit date".split()  # noqa: SIM905
            )
        for name, times in seconds.items():
            p20, p50, p80 = (statistics.quantiles(times[1:], n=10)[i] for i in (1, 4, 7))
            row = [name, args.tokens, HIDDEN, VOCABULARY, f"{p20:.3f}", f"{p50:.3f}", f"{p80:.3f}", args.repeats]
            writer.writerow([*row, device_name(device), torch.__version__, commit.strip(), date.today().isoformat()])
            print(f"{name:28} p50 {p50:.3f} s")


if __name__ == "__main__":
    main()
