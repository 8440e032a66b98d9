"""The original code's attention beside ours: the same weights and tokens through both, values, gradients and time.

git clone https://github.com/dvlab-research/LongLoRA /tmp/original
python benchmarks/compare_original.py --original /tmp/original       writes benchmarks/results/original.csv

`original_code.py` runs the original's files as they are and says what stands in for flash-attn and old transformers.
Ours is a transformers model of one layer after `use_s2(sink_tokens=0)`. Its output projection is the identity, so that
numbers of the output belong to heads. Paths with FlashAttention are compared with the default mode, the others (and
GPT-NeoX) with `wraparound`, and also with the default mode, to show what the roll lets through. float32; padding is not
compared. Time is that of attention alone, forward and backward, without FlashAttention, interleaved in one process.

B batch, T tokens, C hidden, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from original_code import UndefinedError, forward_of, is_neox, load_original, mask_for, model_of, old_layer
from rows import append_rows, interleaved, percentiles
from torch import Tensor, nn
from transformers import GPTNeoXModel, LlamaModel

from longlora.attention.backends import attend
from longlora.attention.pattern import S2Pattern
from longlora.attention.registry import use_s2
from longlora.attention.rolled import rolled_attention
from longlora.errors import LongLoraError

FILES = ("llama_attn_replace.py", "llama_attn_replace_sft.py", "gptneox_attn_replace.py")
TOLERANCE = 1e-5
"""Of the largest number of a tensor: what float32 may round away."""
HEADS = {"MHA": (4, 4, 16), "GQA": (8, 2, 16), "odd": (9, 3, 16)}
TIMED_HEADS = (8, 8, 64)


@dataclass(frozen=True)
class Case:
    """One comparison: a path of the original, a mode of ours, and the shape of what both are given."""

    flash: bool
    mode: str
    heads: str
    tokens: int
    lengths: tuple[int, ...]
    """Of each row, before right padding."""
    group: int
    """What the original takes for it."""


def cases(file: str) -> Iterator[Case]:
    """Whole rows, padded rows, then lengths and heads that one side does not take."""
    neox, sft = "neox" in file, "sft" in file
    same = [(False, "wraparound"), (True, "wraparound" if neox else "default")]

    def case(modes: list[tuple[bool, str]], heads: str, *lengths: int, tokens: int | None = None) -> Iterator[Case]:
        T = tokens or max(lengths)
        for flash, mode in modes:  # the file for instruction tuning has groups of 8,192 at most lengths
            yield Case(flash, mode, heads, T, lengths, 8192 if sft and flash and T % 4096 else T // 4)

    for T, heads, rows in itertools.product([64, 1024, 4096], ["MHA"] if neox else ["MHA", "GQA"], [1, 2]):
        yield from case([*same, (False, "default")], heads, *[T] * rows)
    base = 4096 if sft else 64
    quarter, short = base // 4, base // 8 + 1
    # One row that ends in the second half of a group, in the first, before the end of the first group; then two rows.
    padded: list[tuple[int, ...]] = [(base - 5,), (base - quarter + 3,), (short,)]
    padded += [(3 * quarter, base), (base, 3 * quarter), (base - 3, base - 5), (short, base)]
    for lengths in padded:
        yield from case(same, "MHA", *lengths, tokens=base)
    fixed_groups: list[tuple[int, ...]] = [(6000, 5000), (10240,), (10240, 10000), (20000,)]
    for lengths in fixed_groups if sft else []:
        yield from case(same[1:], "MHA", *lengths)
    yield from case(same, "MHA", 60)  # an odd group
    yield from case(same, "MHA", 1026)
    if not neox:
        yield from case(same, "odd", 64)


def run_ours(model: LlamaModel | GPTNeoXModel, case: Case, ids_BT: Tensor, real_BT: Tensor) -> tuple[Tensor, Tensor]:
    """What reaches the attention layer and what leaves it, both [B, T, C]."""
    wraparound = case.mode == "wraparound"
    use_s2(model, group_size=case.group, sink_tokens=0, wraparound=wraparound)
    kept: list[tuple[Tensor, Tensor]] = []
    layer = model.layers[0]
    module = layer.self_attn if isinstance(model, LlamaModel) else layer.attention
    module.register_forward_hook(
        lambda _, args, kwargs, output: kept.append((args[0] if args else kwargs["hidden_states"], output[0])),
        with_kwargs=True,
    )
    # `wraparound` takes no padding; the roll of whole rows is what it is compared with.
    model(ids_BT, attention_mask=None if wraparound or real_BT.all() else real_BT.long())
    return kept[0]


def compare(original: ModuleType, case: Case) -> dict[str, Any]:
    """Whether outputs and gradients of the layer's input agree at real tokens, how far they are apart, and where."""
    H, K, D = HEADS[case.heads]
    B, T = len(case.lengths), case.tokens
    model, generator = model_of(is_neox(original), HEADS[case.heads]), torch.Generator().manual_seed(1)
    real_BT = torch.arange(T)[None] < torch.tensor(case.lengths)[:, None]
    ids_BT = torch.randint(64, (B, T), generator=generator)
    grad_BTC = torch.randn(B, T, H * D, generator=generator) * real_BT[..., None]
    row: dict[str, Any] = {
        "file": original.__name__, "path": "flash" if case.flash else "no flash", "ours": case.mode, "query_heads": H,
        "kv_heads": K, "head_dim": D, "tokens": T, "lengths": " ".join(map(str, case.lengths)),
        "group_size": case.group, "dtype": "float32", "outcome": "", "output_abs": "", "output_rel": "",
        "gradient_abs": "", "gradient_rel": "", "original / ours": "", "where": "",
    }  # fmt: skip
    try:
        hidden_BTC, our_BTC = run_ours(model, case, ids_BT, real_BT)
    except LongLoraError as error:
        return row | {"outcome": "ours refuses", "where": str(error)}
    given_BTC = hidden_BTC.detach().requires_grad_()
    try:
        their_BTC = forward_of(original, case.flash)(
            old_layer(model, HEADS[case.heads]), given_BTC, attention_mask=mask_for(original, case.flash, real_BT),
            position_ids=torch.arange(T)[None].expand(B, T),
        )[0]  # fmt: skip
    except UndefinedError as error:
        return row | {"outcome": "undefined in flash-attn", "where": str(error)}
    except (RuntimeError, ValueError) as error:
        return row | {"outcome": "original fails", "where": str(error).splitlines()[0]}
    our_grad, their_grad = (
        torch.autograd.grad(out, given, grad_BTC)[0] for out, given in ((our_BTC, hidden_BTC), (their_BTC, given_BTC))
    )
    pairs = {"output": (our_BTC.detach(), their_BTC.detach()), "gradient": (our_grad, their_grad)}
    same = True
    for name, (our, their) in pairs.items():
        apart = float(((our - their) * real_BT[..., None]).abs().max())
        largest = float((our * real_BT[..., None]).abs().max())
        row |= {f"{name}_abs": f"{apart:.1e}", f"{name}_rel": f"{apart / largest:.1e}"}
        same &= apart <= TOLERANCE * largest  # a NaN is no agreement
    our, their = pairs["output"]
    agree = (our - their).abs() <= TOLERANCE * our.abs().max()
    places_BTH = ~agree.unflatten(2, (H, D)).all(-1) & real_BT[..., None]
    return row | {"outcome": "agree" if same else "differ", "where": named(places_BTH)}


def named(places_BTH: Tensor) -> str:
    """Rows, heads and tokens, each as ranges, and the share of them that is meant if that is not all."""
    if not places_BTH.any():
        return ""
    axes = {"rows": places_BTH.flatten(1).any(1), "heads": places_BTH.any(0).any(0), "tokens": places_BTH.any(0).any(1)}
    share = float(places_BTH.sum()) / float(torch.tensor([axis.sum() for axis in axes.values()]).prod())
    text = ", ".join(f"{name} {_ranges(axis.nonzero().flatten().tolist())}" for name, axis in axes.items())
    return text if share == 1 else f"{share:.1%} of {text}"


def _ranges(numbers: list[int]) -> str:
    starts = [number for number in numbers if number - 1 not in set(numbers)]
    stops = [number for number in numbers if number + 1 not in set(numbers)]
    found = [f"{start}-{stop}" if stop > start else f"{start}" for start, stop in zip(starts, stops, strict=True)]
    return " ".join(found if len(found) <= 8 else [*found[:4], "...", found[-1]])


def times(original: ModuleType, T: int, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Rows with the time of the original's path without FlashAttention over that of ours."""
    H, K, D = TIMED_HEADS
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_BTC = (torch.randn(1, T, H * D, generator=generator).to(dtype) for _ in range(4))
    given = [x.requires_grad_() for x in (q, k, v)]
    linear = dict(zip(("q_proj", "k_proj", "v_proj"), (lambda _, x=x: x.clone() for x in given), strict=True))
    layer = SimpleNamespace(
        training=True, config=SimpleNamespace(pretraining_tp=1), num_heads=H, num_key_value_heads=K,
        num_key_value_groups=1, head_dim=D, hidden_size=H * D, rotary_emb=lambda x, seq_len: (x, x),
        o_proj=nn.Identity(), **linear,
    )  # fmt: skip
    positions = torch.arange(T)[None]
    mask = torch.full((1, 1, T, T), torch.finfo(dtype).min, dtype=dtype).triu(1)

    def step(attention: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            torch.autograd.grad(attention().reshape(1, T, -1), given, grad_BTC)

        return call

    def ours(attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def call() -> Tensor:  # on copies, because the original's roll in place needs them here
            q, k, v = (x.clone().view(1, T, H, D).transpose(1, 2) for x in given)
            return attention(q, k, v)

        return step(call)

    ways = {
        "original": step(lambda: original.forward_noflashattn(layer, q, mask, positions)[0]),
        "wraparound": ours(lambda q, k, v: rolled_attention(q, k, v, T // 4)),
        "default": ours(lambda q, k, v: attend(q, k, v, [[0, T]], S2Pattern(T // 4))),
        "default, 4 sink tokens": ours(lambda q, k, v: attend(q, k, v, [[0, T]], S2Pattern(T // 4, 4))),
    }
    with mock.patch.object(original, "apply_rotary_pos_emb", lambda q, k, *_: (q, k)):
        medians = {name: percentiles(each)[1] for name, each in interleaved(ways, repeats, torch.device("cpu")).items()}
    rows = []
    for name in list(ways)[1:]:
        ratio = f"{medians['original'] / medians[name]:.2f}"
        print(f"{T} tokens, {dtype}, {name}: original / ours {ratio}", flush=True)
        rows.append({
            "file": original.__name__, "path": "no flash", "ours": name, "query_heads": H, "kv_heads": K, "head_dim": D,
            "tokens": T, "lengths": str(T), "group_size": T // 4, "dtype": str(dtype).removeprefix("torch."),
            "outcome": "timed", "original / ours": ratio,
        })  # fmt: skip
    return rows


def files_of(path: Path) -> list[Path]:
    """The original's attention files at `path`, a checkout or one of them."""
    found = [path] if path.is_file() else [path / name for name in FILES if (path / name).is_file()]
    if not found:
        raise SystemExit(
            f"--original {path}: is none of {', '.join(FILES)} and holds none; give a checkout of the original"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, help="a checkout of the original, or one of its files")
    parser.add_argument("--timed-tokens", type=int, nargs="*", default=[4096, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in files_of(args.original):
        try:
            original = load_original(path)
        except ImportError as error:
            raise SystemExit(f"{path.name} imports {error.name}, which is not here: pip install {error.name}") from None
        for case in cases(path.name):
            rows.append(compare(original, case))
            print(*rows[-1].values(), sep="  ", flush=True)
        if path.name == FILES[0]:
            for T, dtype in itertools.product(args.timed_tokens, (torch.float32, torch.bfloat16)):
                rows += times(original, T, dtype, args.repeats)
    for key, count in Counter((row["file"], row["path"], row["ours"], row["outcome"]) for row in rows).items():
        print(*key, count, sep="  ")
    append_rows("original", [{name: row.get(name, "") for name in rows[0]} for row in rows], torch.device("cpu"))


if __name__ == "__main__":
    main()
