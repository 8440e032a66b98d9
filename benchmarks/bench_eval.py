"""What answers to many prompts cost: sharing the KV cache, batching, and a cache that is not copied for each token.

python benchmarks/bench_eval.py            appends to benchmarks/results/eval_cost.csv
python benchmarks/bench_eval.py --quick    a small one, appends nothing

SmolLM2-135M's shape with random weights in bfloat16. The ways of a case run interleaved in one process; `speed_up` is
against the first way of the case. Cases:

- grid: passkey on lengths x depths, an answer of 5 tokens. Each cell from scratch with our reader; each by
  transformers' `generate`; all by our reader, which shares what prompts begin with; and that with attention behind the
  cache in two calls instead of a mask, as `longlora eval` does on a CPU
- read: a long text in pieces, with transformers' mask and without
- short: prompts of about 512 tokens that have nothing in common, 32 tokens generated: one by one, side by side
- generate: 64 tokens after a long text, one pass each: transformers' DynamicCache, ours
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from bench_train_step import SHAPES
from rows import append_rows, device_for_benchmark, interleaved, percentiles
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from longlora.attention.cached import cached_attention
from longlora.evaluation.reading.answering import PromptReader, Work
from longlora.evaluation.retrieval.prompt import Prompt
from longlora.model.head import OutputHead, output_head
from longlora.model.kv_cache import GrowingCache, read_on

SHAPE = "SmolLM2-135M"
TASK, FILLER, SENTENCE, QUESTION, ANSWER = 40, 24, 24, 10, 5  # tokens of the passkey prompt's parts


def passkey_grid(lengths: Sequence[int], depths: Sequence[float]) -> list[Prompt]:
    """Prompts of the passkey test, with random numbers for the words of its parts."""
    same = random.Random(0)
    task, filler, question = (same.choices(range(1000), k=count) for count in (TASK, FILLER, QUESTION))
    prompts = []
    for length in lengths:
        for depth in depths:
            key = random.Random(f"{length}-{depth}").choices(range(1000), k=SENTENCE)
            room = length - TASK - SENTENCE - QUESTION - ANSWER
            text = filler * (room // FILLER + 1)
            at = round(depth * room)
            tokens = (*task, *text[:at], *key, *text[at:room], *question)
            prompts.append(Prompt(tokens, ("none",), "all", tuple(key[:ANSWER])))
    return prompts


def strangers(count: int, length: int, new_tokens: int) -> list[Prompt]:
    generator = random.Random(0)
    lengths = [length - generator.randrange(length // 8) for _ in range(count)]
    texts = [tuple(generator.choices(range(1000), k=each)) for each in lengths]
    return [Prompt(text, ("none",), "all", (), new_tokens) for text in texts]


def reader_of(model: PreTrainedModel, head: OutputHead, batch_tokens: int = 1) -> PromptReader:
    return PromptReader(model, head, lambda tokens: "", (), chunk_tokens=2048, batch_tokens=batch_tokens)


class Case:
    """Ways to do one thing: the first is what the others are compared with."""

    def __init__(self, name: str, tokens: int, generated: int) -> None:
        self.name, self.tokens, self.generated = name, tokens, generated
        self.ways: dict[str, Callable[[], None]] = {}
        self.read: dict[str, int] = {}

    def answer(self, way: str, prompts: Sequence[Sequence[Prompt]], reader: Callable[[], PromptReader]) -> None:
        """A way that answers lists of prompts, each with a cache of its own."""

        def call() -> None:
            work = Work()
            for each in prompts:
                one = reader()
                for _ in one.answers(each):
                    pass
                work.tokens_read += one.work.tokens_read
            self.read[way] = work.tokens_read

        self.ways[way] = call

    def rows(self, repeats: int, device: torch.device) -> list[dict[str, Any]]:
        seconds: Mapping[str, list[float]] = interleaved(self.ways, repeats, device)
        slowest = percentiles(next(iter(seconds.values())))[1]
        rows = []
        for way, times in seconds.items():
            p20, p50, p80 = percentiles(times)
            rows.append({
                "shape": SHAPE, "case": self.name, "way": way, "prompt_tokens": self.tokens,
                "tokens_read": self.read.get(way, self.tokens), "tokens_generated": self.generated,
                "p20_s": f"{p20:.3f}", "p50_s": f"{p50:.3f}", "p80_s": f"{p80:.3f}", "repeats": repeats,
                "speed_up": f"{slowest / p50:.2f}",
            })  # fmt: skip
            print(rows[-1], flush=True)
        return rows


def grid(model: PreTrainedModel, head: OutputHead, lengths: Sequence[int], depths: Sequence[float]) -> Case:
    prompts = passkey_grid(lengths, depths)
    name = f"grid {len(lengths)} lengths to {max(lengths)} x {len(depths)} depths"
    case = Case(name, sum(len(prompt.tokens) for prompt in prompts), 0)
    case.answer("each from scratch", [[prompt] for prompt in prompts], lambda: reader_of(model, head))

    def generate() -> None:
        for prompt in prompts:
            ids = torch.tensor([prompt.tokens], device=model.device)
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False)

    case.ways["each by generate"] = generate
    case.answer("shared", [prompts], lambda: reader_of(model, head))
    shared = case.ways["shared"]

    def as_longlora_does() -> None:
        with cached_attention(model):
            shared()
        case.read["shared, attention without a mask"] = case.read["shared"]

    case.ways["shared, attention without a mask"] = as_longlora_does
    return case


def chunks(model: PreTrainedModel, length: int) -> Case:
    case = Case(f"read {length} in pieces of 2048", length, 0)
    text = torch.randint(1000, (1, length), device=model.device)

    @torch.inference_mode()
    def read() -> None:
        cache = GrowingCache(model.config, length)
        for piece in text.split(2048, dim=1):
            read_on(model, piece, cache)

    def without_mask() -> None:
        with cached_attention(model):
            read()

    case.ways |= {"transformers' mask": read, "two calls, no mask": without_mask}
    return case


def short(model: PreTrainedModel, head: OutputHead, count: int, length: int, new_tokens: int) -> Case:
    prompts = strangers(count, length, new_tokens)
    case = Case(f"short {count} of about {length}", sum(len(prompt.tokens) for prompt in prompts), count * new_tokens)
    case.answer("one by one", [prompts], lambda: reader_of(model, head))
    case.answer("side by side", [prompts], lambda: reader_of(model, head, batch_tokens=count * length))
    return case


def generation(model: PreTrainedModel, head: OutputHead, length: int, new_tokens: int) -> Case:
    case = Case(f"generate {new_tokens} after {length}", length, new_tokens)
    text = torch.randint(1000, (1, length), device=model.device)
    for way, cache in (("DynamicCache", DynamicCache()), ("ours", GrowingCache(model.config, length + new_tokens))):
        with torch.inference_mode():
            for piece in text.split(2048, dim=1):
                last = read_on(model, piece, cache)[:, -1:]

        @torch.inference_mode()
        def generate(cache: Any = cache, last: torch.Tensor = last) -> None:
            token = head(last[0]).argmax(-1)
            for _ in range(new_tokens):
                token = head(read_on(model, token[None], cache)[0]).argmax(-1)
            cache.crop(-new_tokens)

        case.ways[way] = generate
        case.read[way] = 0
    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 6144, 8192])
    parser.add_argument("--depths", nargs="+", type=float, default=[0.1, 0.5, 0.9])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["grid", "read", "short", "generate"],
        default=["grid", "read", "short", "generate"],
    )
    parser.add_argument("--quick", action="store_true", help="short lengths, print, append nothing")
    args = parser.parse_args()
    lengths, short_length, count, spoken = (args.lengths, 512, 16, 32) if not args.quick else ([256, 512], 64, 4, 8)
    device = device_for_benchmark()
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPES[SHAPE], max_position_embeddings=max(lengths), eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
    head = output_head(model)
    made: dict[str, Callable[[], Case]] = {
        "grid": lambda: grid(model, head, lengths, args.depths),
        "read": lambda: chunks(model, max(lengths)),
        "short": lambda: short(model, head, count, short_length, spoken),
        "generate": lambda: generation(model, head, max(lengths), 2 * spoken),
    }
    for name in args.only:
        rows = made[name]().rows(args.repeats, device)
        if not args.quick:
            append_rows("eval_cost", rows, device)


if __name__ == "__main__":
    main()
