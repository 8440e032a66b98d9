"""What `ablate.py` compares: for each experiment its variants, as overrides of one recipe.

A variant that measures ``rope_only`` is not trained. Rows of a few thousand tokens stand for the long context, because
a CPU has to train dozens of runs; RoPE is rescaled as it is for SmolLM2's 8,192 tokens times the factor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

# Position interpolation, as in the paper: it costs more loss before training than yarn, so that there is much to win.
COMMON = (
    "context.rope_type=linear", "context.rope_factor=2", "attention.group_size=null", "attention.group_size_ratio=0.25",
    "attention.sink_tokens=4", "train.learning_rate=3e-4", "train.grad_accum_steps=1", "train.warmup_steps=0",
    "train.save_steps=1000000", "train.validation_steps=null", "train.activation_checkpointing=false",
    "eval.variants=[trained]", "eval.tasks=[perplexity,passkey]",
    "eval.perplexity.max_documents=2", "eval.passkey.depths=[0.05,0.3,0.55,0.8]",
)  # fmt: skip


Texts = Literal["whole", "cut", "half cut"]
"""Training documents: each at least a row long; all of them cut into short ones; every other one cut."""


@dataclass(frozen=True)
class Size:
    """Of every run of an experiment."""

    context: int
    """Tokens of a row."""
    steps: int
    """Of one row each."""

    def lengths(self, *, far: bool) -> list[int]:
        """Tokens of a held-out document within which loss and retrieval are measured, always with full attention."""
        return [self.context * times for times in ((1, 2, 4) if far else (1, 2))]


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    name: str
    overrides: tuple[str, ...] = ()
    matters: bool = True
    """Whether it is repeated with more seeds."""
    far: bool = False
    """Whether the first seed is measured at four times the row as well."""
    texts: Texts = "whole"

    def settings(self, size: Size, seed: int) -> list[str]:
        """All overrides of a run; of a key that is given twice the last value counts."""
        lengths = size.lengths(far=self.far and seed == 0)
        shortest = size.context if self.texts == "whole" else 0
        sized = (
            f"context.context_length={size.context}", f"data.min_document_tokens={shortest}",
            f"train.steps={size.steps}", f"train.seed={seed}", f"eval.perplexity.context_lengths={lengths}",
            f"eval.passkey.lengths={lengths}", f"eval.prefill_chunk_tokens={lengths[-1]}",
        )  # fmt: skip
        found = {key: value for key, _, value in (one.partition("=") for one in (*COMMON, *sized, *self.overrides))}
        found["model.original_context_length"] = str(size.context // int(found["context.rope_factor"]))
        return sorted(f"{key}={value}" for key, value in found.items())

    def identity(self, size: Size, seed: int) -> str:
        """What tells runs apart, whatever they are called: a variant whose settings change is measured again."""
        what = self.settings(size, seed) + ([] if self.texts == "whole" else [self.texts])
        return hashlib.sha256("\n".join(what).encode()).hexdigest()[:12]


def _s2(
    name: str, *, ratio: float = 0.25, sinks: int = 0, matters: bool = False, more: tuple[str, ...] = ()
) -> Variant:
    overrides = (f"attention.group_size_ratio={ratio}", f"attention.sink_tokens={sinks}", *more)
    return Variant(name, overrides, matters, far=matters)


UNTRAINED = Variant("RoPE only, untrained", ("eval.variants=[rope_only]",), matters=False, far=True)
FULL_ATTENTION = Variant("full attention", ("attention.pattern=full",), far=True)
_EVERY_4TH = f"attention.full_attention_layers={list(range(3, 30, 4))}"
_NO_SHIFT = "attention.shift=none"


def _last(part: float) -> str:
    return f"attention.full_attention_final_fraction={part}"


_ATTENTION = (
    UNTRAINED,
    FULL_ATTENTION,
    _s2("S2, T/4, no sinks (paper)", matters=True),
    _s2("S2, T/4, 4 sinks", sinks=4, matters=True),
    _s2("no shift, T/4, 4 sinks", sinks=4, matters=True, more=(_NO_SHIFT,)),
    _s2("S2, T/4, 4 sinks, last 20% full", sinks=4, matters=True, more=(_last(0.2),)),
    _s2("S2, T/4, no sinks, last 20% full", matters=True, more=(_last(0.2),)),
    _s2("S2, T/4, 1 sink", sinks=1),
    _s2("S2, T/4, 16 sinks", sinks=16),
    _s2("no shift, T/4, no sinks", more=(_NO_SHIFT,)),
    _s2("S2, T/4, 4 sinks, every 4th layer full", sinks=4, more=(_EVERY_4TH,)),
    _s2("S2, T/4, no sinks, every 4th layer full", more=(_EVERY_4TH,)),
    _s2("S2, T/2, 4 sinks", ratio=0.5, sinks=4),
    _s2("S2, T/8, 4 sinks", ratio=0.125, sinks=4),
    _s2("S2, T/2, no sinks", ratio=0.5),
    _s2("S2, T/8, no sinks", ratio=0.125),
    _s2("S2, T/4, 4 sinks, last 10% full", sinks=4, more=(_last(0.1),)),
    _s2("S2, T/4, 4 sinks, all heads of every other layer shifted", sinks=4, more=("attention.shift=layers",)),
)

# Interpolation makes SmolLM2 forget how to look a number up, and few steps do not bring that back; yarn does not.
_YARN = ("context.rope_type=yarn", "eval.passkey.num_trials=2")


def _with_yarn(name: str, *how: str, matters: bool = True) -> Variant:
    return Variant(f"{name}, yarn", (*_YARN, *how), matters)


_SLOW = "train.learning_rate=1e-4"
_RETRIEVAL = (
    _with_yarn("RoPE only, untrained", *UNTRAINED.overrides, matters=False),
    _with_yarn("full attention", *FULL_ATTENTION.overrides),
    _with_yarn("S2, T/4, no sinks (paper)", "attention.sink_tokens=0"),
    _with_yarn("S2, T/4, 4 sinks"),
    _with_yarn("no shift, T/4, 4 sinks", _NO_SHIFT),
    _with_yarn("S2, T/4, 4 sinks, last 20% full", _last(0.2)),
    _with_yarn("S2, T/4, 4 sinks, rate 1e-4", _SLOW),
    _with_yarn("full attention, rate 1e-4", *FULL_ATTENTION.overrides, _SLOW),
    _with_yarn("S2, T/2, 4 sinks", "attention.group_size_ratio=0.5", matters=False),
    _with_yarn("S2, T/4, 4 sinks, every 4th layer full", _EVERY_4TH, matters=False),
    _with_yarn("S2, T/4, 16 sinks", "attention.sink_tokens=16", matters=False),
    _with_yarn("S2, T/8, 4 sinks", "attention.group_size_ratio=0.125", matters=False),
)

# Needles are sentences of their own among distractors, each prompt over another part of the text; those asked for stand
# beyond a group of T/4 from the question, of 2,048 tokens as of 4,096.
_NEEDLES = ("eval.tasks=[perplexity,passkey,needle]", "eval.needle.depths=[0.05,0.3,0.55]", "eval.needle.num_trials=3")


def _with_needles(variant: Variant, *, matters: bool = True) -> Variant:
    return Variant(f"{variant.name}, needles", (*variant.overrides, *_NEEDLES), matters)


_RETRIEVED = {variant.name.removesuffix(", yarn"): variant for variant in _RETRIEVAL}
_NEEDLE = (
    _with_needles(_RETRIEVED["RoPE only, untrained"], matters=False),
    *(
        _with_needles(_RETRIEVED[name])
        for name in (
            "full attention", "S2, T/4, no sinks (paper)", "S2, T/4, 4 sinks", "S2, T/4, 4 sinks, last 20% full",
            "S2, T/2, 4 sinks", "S2, T/4, 4 sinks, every 4th layer full", "full attention, rate 1e-4",
            "S2, T/4, 4 sinks, rate 1e-4",
        )
    ),
)  # fmt: skip

# The first two are rows of retrieval as well. Cut documents are packed, so that a row holds as many tokens of text.
_DATA = (
    Variant("RoPE only, untrained", (*_YARN, *UNTRAINED.overrides), matters=False),
    Variant("documents of a row or more", _YARN),
    Variant("half of them cut into short ones", _YARN, texts="half cut"),
    Variant("all cut into short ones", _YARN, texts="cut"),
)

_LORA_ALONE = ("adapter.train_embeddings=false", "adapter.train_norms=false")
_FULL = ("adapter.method=full",)

_TRAINED = (
    UNTRAINED,
    Variant("LoRA r=8", ("adapter.r=8", *_LORA_ALONE)),
    Variant("LoRA r=8 + norms", ("adapter.r=8", "adapter.train_embeddings=false")),
    Variant("LoRA r=8 + embeddings", ("adapter.r=8", "adapter.train_norms=false")),
    Variant("LoRA r=8 + both", far=True),
    Variant("LoRA r=64", ("adapter.r=64", *_LORA_ALONE)),
    Variant("LoRA r=64 + both", ("adapter.r=64",), matters=False),
    Variant("LoRA r=8, all linear layers", ("adapter.r=8", "adapter.target_modules=all-linear", *_LORA_ALONE), False),
    Variant("LoRA r=8, all linear layers + both", ("adapter.r=8", "adapter.target_modules=all-linear"), False),
    Variant("full fine-tuning, rate 3e-5", (*_FULL, "train.learning_rate=3e-5"), matters=False),
    Variant("full fine-tuning, rate 1e-4", (*_FULL, "train.learning_rate=1e-4")),
    Variant("full fine-tuning, rate 3e-4", (*_FULL, "train.learning_rate=3e-4"), matters=False),
)


def _rope(kind: str, factor: int) -> tuple[Variant, Variant]:
    how = (f"context.rope_type={kind}", f"context.rope_factor={factor}")
    name, untrained = f"{kind} x{factor}", ("eval.variants=[rope_only]", *how)
    far = (kind, factor) == ("linear", 2)  # which the other experiments have as well
    return Variant(f"{name}, untrained", untrained, False, far), Variant(name, how, False, far)


_RATES = tuple(
    Variant(f"{name}, rate {rate}", (*how, f"train.learning_rate={rate}"), matters=False)
    for rate in ("1e-4", "1e-3")
    for name, how in (("full attention", ("attention.pattern=full",)), ("S2, T/4, 4 sinks", ()))
)

EXPERIMENTS: dict[str, tuple[Variant, ...]] = {
    "attention": _ATTENTION,
    "retrieval": _RETRIEVAL,
    "needle": _NEEDLE,
    "trained": _TRAINED,
    "rope": tuple(
        variant for factor in (2, 4) for kind in ("linear", "yarn", "theta") for variant in _rope(kind, factor)
    ),
    "rate": _RATES,
    "data": _DATA,
}
