"""Next-token loss, forward and backward: ours in chunks, torch's linear_cross_entropy, and plain logits.

python benchmarks/bench_loss.py            writes benchmarks/results/loss.csv
All ways run interleaved in one process; a row is the median of the repeats, with the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rows import append_rows, device_for_benchmark, interleaved, percentiles
from torch import Tensor, nn

from longlora.memory.chunked_loss import chunked_loss

HIDDEN, VOCABULARY = 576, 49152  # SmolLM2-135M


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
    device = device_for_benchmark()
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False, device=device)
    hidden = torch.randn(args.tokens, HIDDEN, dtype=torch.bfloat16, device=device).requires_grad_()
    labels = torch.randint(VOCABULARY, (args.tokens,), device=device)

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                value = loss(hidden, labels)
            value.backward()

        return call

    calls = {name: step(loss) for name, loss in ways(head, args.chunk_tokens).items()}
    rows = []
    for name, times in interleaved(calls, args.repeats, device).items():
        p20, p50, p80 = (f"{value:.3f}" for value in percentiles(times))
        rows.append({
            "way": name, "tokens": args.tokens, "hidden": HIDDEN, "vocabulary": VOCABULARY, "p20_s": p20, "p50_s": p50,
            "p80_s": p80, "repeats": args.repeats,
        })  # fmt: skip
        print(f"{name:28} p50 {p50} s")
    append_rows("loss", rows, device)


if __name__ == "__main__":
    main()
