"""The model card of an exported model: what it was made from, how, and what was measured.

In: plain facts. Out: Markdown with YAML front matter. No path of this machine is written: models and data are named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from longlora.config import Recipe
from longlora.model.sidecar import Sidecar

_NAMES_SHOWN = 20


@dataclass(frozen=True)
class ShardFacts:
    """One token shard: how many documents and tokens, their names, and the sha256 of its manifest."""

    documents: int
    tokens: int
    names: tuple[str, ...]
    manifest_sha256: str


@dataclass(frozen=True)
class TrainingFacts:
    """What training took: steps done, tokens read and seconds where they were logged, loss at both ends (nats)."""

    steps: int
    first_loss: float
    last_loss: float
    tokens: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class CardFacts:
    """Everything a card tells. `front` holds front matter taken over from the base model, its licence above all."""

    name: str
    base_model: str
    front: Mapping[str, Any]
    sidecar: Sidecar
    recipe: Recipe
    rope_before: Mapping[str, Any] | None
    tensors: int
    parameters: int
    shards: Mapping[str, ShardFacts]
    training: TrainingFacts | None
    evaluation: str | None
    commands: Mapping[str, str]
    version: str


def model_card(facts: CardFacts) -> str:
    """The whole ``README.md``."""
    front = {
        "base_model": facts.base_model,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **facts.front,
        "tags": ["longlora", "long-context"],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {_plain(facts.name)}",
        f"{_plain(facts.base_model)} {_deed(facts.sidecar)} by longlora {facts.version}: trained with "
        f"{_pattern(facts)}, evaluated and to be used with full attention. An ordinary transformers model: no code of "
        f"longlora is needed to load it. {facts.parameters:,} parameters in {facts.tensors:,} tensors, "
        f"{facts.sidecar.dtype}.",
        "## Use",
        _use(facts),
        "## What was changed",
        _table([("", "before", "after"), *_changes(facts)]),
        "## How it was trained",
        _table([("setting", "value"), *_settings(facts)]),
        "## Data",
        _data(facts.shards),
        "## Evaluation",
        facts.evaluation or "This model was not measured.",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def rope_text(parameters: Mapping[str, Any] | None) -> str:
    """RoPE parameters on one line, the type first."""
    if not parameters:
        return "not known"
    flat = parameters.get("full_attention", parameters)
    ordered = sorted(flat.items(), key=lambda pair: (pair[0] != "rope_type", pair[0]))
    return ", ".join(f"{name} {value}" for name, value in ordered if value is not None)


def _deed(sidecar: Sidecar) -> str:
    old, new = sidecar.original_context_length, sidecar.context_length
    if old == new:
        return f"trained at {new:,} tokens"
    return f"with its context extended from {old:,} to {new:,} tokens"


def _pattern(facts: CardFacts) -> str:
    attention = facts.recipe.attention
    if attention.pattern == "full":
        return "full attention"
    size = attention.resolve_group_size(facts.sidecar.context_length)
    return f"shifted sparse attention (S2-Attn) in groups of {size:,} tokens"


def _use(facts: CardFacts) -> str:
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
    )
    lines = [f"```python\n{code}\n```", f"Its window is {facts.sidecar.context_length:,} tokens. From this folder:"]
    lines += [f"{engine}:\n\n```\n{command}\n```" for engine, command in facts.commands.items()]
    return "\n\n".join(lines)


def _changes(facts: CardFacts) -> list[tuple[str, ...]]:
    old, new = facts.sidecar.original_context_length, facts.sidecar.context_length
    return [
        ("context (tokens)", f"{old:,}", f"{new:,}"),
        ("RoPE", rope_text(facts.rope_before), rope_text(facts.sidecar.rope_parameters)),
    ]


def _settings(facts: CardFacts) -> list[tuple[str, ...]]:
    attention, adapter, train = facts.recipe.attention, facts.recipe.adapter, facts.recipe.train
    rows: list[tuple[str, ...]] = [("attention in training", _pattern(facts))]
    if attention.pattern == "s2":
        rows += [
            ("sink tokens", str(attention.sink_tokens)),
            ("shift", f"{attention.shift} (half a group)"),
            ("layers with full attention", ", ".join(map(str, attention.full_attention_layers)) or "none"),
            ("last part of the steps with full attention", f"{attention.full_attention_final_fraction:.0%}"),
        ]
    targets = adapter.target_modules
    rows += [
        ("LoRA rank, alpha, dropout", f"{adapter.r}, {adapter.lora_alpha}, {adapter.lora_dropout:g}"),
        ("LoRA on", targets if isinstance(targets, str) else ", ".join(targets)),
        ("embeddings trained", _yes(adapter.train_embeddings)),
        ("norms trained", _yes(adapter.train_norms)),
        ("frozen weights while training", facts.recipe.model.quantization.replace("none", facts.sidecar.dtype)),
        ("learning rate, seed", f"{train.learning_rate:g}, {train.seed}"),
        ("sequences in a step", str(train.micro_batch_size * train.grad_accum_steps)),
    ]
    return rows + _cost(facts)


def _cost(facts: CardFacts) -> list[tuple[str, ...]]:
    training = facts.training
    if training is None:
        return [("steps", str(facts.recipe.train.steps)), ("cost", "not recorded")]
    rows = [("steps", f"{training.steps:,}")]
    if training.tokens is not None:
        rows.append(("tokens read", f"{training.tokens:,.0f}"))
    if training.seconds is not None:
        rows.append(("time", f"{training.seconds:,.0f} s ({training.seconds / 3600:.2f} h)"))
    rows.append(("training loss, first to last logged step", f"{training.first_loss:.3f} to {training.last_loss:.3f}"))
    return list(rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _data(shards: Mapping[str, ShardFacts]) -> str:
    if not shards:
        return "The shards of the run are not at hand, so the data is not named here."
    rows: list[tuple[str, ...]] = [("set", "documents", "tokens", "sha256 of its manifest")]
    rows += [
        (name, f"{shard.documents:,}", f"{shard.tokens:,}", shard.manifest_sha256) for name, shard in shards.items()
    ]
    lists = [f"Documents of {name}: {_names(shard.names)}." for name, shard in shards.items() if shard.names]
    return "\n\n".join([_table(rows), *lists])


def _names(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return _plain(shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN:,} more")


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [head, tuple("---" for _ in head), *body]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """`text` on one line, with nothing in it that Markdown or HTML would act on."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*|~\[\]]", r"\\\g<0>", text)
