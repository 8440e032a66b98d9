"""The model card of an exported model: what it was made from, how, and what was measured.

In: plain facts. Out: Markdown with YAML front matter. No path of this machine is written: models and data are named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from longlora.config import AttentionConfig, InstructConfig, Recipe
from longlora.model.sidecar import Sidecar

_NAMES_SHOWN = 20
_SHIFTS = {
    "heads": "half a group, in half of the heads",
    "layers": "half a group, in every other layer",
    "none": "none",
}
_TEMPLATES = {
    "chat": "the base model's own chat template",
    "llama2": "[INST]question[/INST]answer, as in the LongLoRA paper",
}
_PLACES = {"middle": "in the middle", "head": "at the beginning", "tail": "at the end"}


@dataclass(frozen=True)
class ShardFacts:
    """One token shard: how many documents (`noun`) and tokens, their names, and the sha256 of its manifest; how many
    were shortened, by how many tokens together, and how many were left out."""

    documents: int
    tokens: int
    names: tuple[str, ...]
    manifest_sha256: str
    noun: str = "documents"
    shortened: int = 0
    removed_tokens: int = 0
    left_out: int = 0


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
    """Everything a card tells. `front` holds front matter taken over from the base model, its licence above all;
    `attention` is what training used; `prompt` a question as the chat template writes it."""

    name: str
    base_model: str
    front: Mapping[str, Any]
    sidecar: Sidecar
    attention: AttentionConfig
    recipe: Recipe
    rope_before: Mapping[str, Any] | None
    legacy_rope: bool
    prompt: str | None
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
        f"{_plain(facts.base_model)} {_deed(facts)} by longlora {facts.version}. Trained with "
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


def _deed(facts: CardFacts) -> str:
    old, new = facts.sidecar.original_context_length, facts.sidecar.context_length
    tuned = "fine-tuned on instructions" if facts.recipe.data.kind == "instruct" else ""
    if old == new:
        return f"{tuned or 'trained'} at {new:,} tokens"
    return f"{tuned}{', ' if tuned else ''}with its context extended from {old:,} to {new:,} tokens,"


def _pattern(facts: CardFacts) -> str:
    if facts.attention.pattern == "full":
        return "full attention"
    size = facts.attention.resolve_group_size(facts.sidecar.context_length)
    return f"shifted sparse attention (S2-Attn) in groups of {size:,} tokens"


def _use(facts: CardFacts) -> str:
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")'
    )
    lines = [_readers(facts), _fenced(code, "python")]
    if facts.prompt is not None:
        lines += [
            "A question, as `tokenizer.apply_chat_template` writes it:",
            _fenced(facts.prompt.rstrip("\n"), "text"),
        ]
    lines.append(
        f"Its window is {facts.sidecar.context_length:,} tokens, prompt and answer together. From this folder:"
    )
    lines += [f"{engine}:\n\n{_fenced(command)}" for engine, command in facts.commands.items()]
    return "\n\n".join(lines)


def _readers(facts: CardFacts) -> str:
    """Which transformers reads RoPE as it was trained; yarn was looked up in 4.45, 4.51, 4.55 and run in 4.57.1."""
    if not facts.legacy_rope:
        return "Needs transformers 5: its RoPE is written under the name `rope_parameters` only."
    if facts.sidecar.rope_parameters.get("rope_type") == "yarn":
        return (
            "Needs transformers 4.57 or later: earlier ones take the factor or the bounds of yarn from "
            "`max_position_embeddings`, silently."
        )
    return "Needs transformers 4.45 or later."


def _fenced(text: str, language: str = "") -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _changes(facts: CardFacts) -> list[tuple[str, ...]]:
    old, new = facts.sidecar.original_context_length, facts.sidecar.context_length
    return [
        ("context (tokens)", f"{old:,}", f"{new:,}"),
        ("RoPE", rope_text(facts.rope_before), rope_text(facts.sidecar.rope_parameters)),
    ]


def _settings(facts: CardFacts) -> list[tuple[str, ...]]:
    attention, train = facts.attention, facts.recipe.train
    rows: list[tuple[str, ...]] = [("attention in training", _pattern(facts))]
    if attention.pattern == "s2":
        rows += [
            ("sink tokens", str(attention.sink_tokens)),
            ("shift", _SHIFTS[attention.shift]),
            ("layers with full attention", ", ".join(map(str, attention.full_attention_layers)) or "none"),
            ("last part of the steps with full attention", f"{attention.full_attention_final_fraction:.0%}"),
        ]
    rows += _trained_part(facts)
    if facts.recipe.data.kind == "instruct":
        rows += _instructions(facts.recipe.data.instruct)
    rows += [
        ("learning rate, seed", f"{train.learning_rate:g}, {train.seed}"),
        ("sequences in a step", str(train.micro_batch_size * train.grad_accum_steps)),
    ]
    return rows + _cost(facts)


def _trained_part(facts: CardFacts) -> list[tuple[str, ...]]:
    adapter = facts.recipe.adapter
    if adapter.method == "full":
        return [("trained", "every parameter, in float32")]
    targets = adapter.target_modules
    return [
        ("LoRA rank, alpha, dropout", f"{adapter.r}, {adapter.lora_alpha}, {adapter.lora_dropout:g}"),
        ("LoRA on", targets if isinstance(targets, str) else ", ".join(targets)),
        ("embeddings trained", _yes(adapter.train_embeddings)),
        ("norms trained", _yes(adapter.train_norms)),
        ("frozen weights while training", facts.recipe.model.quantization.replace("none", facts.sidecar.dtype)),
    ]


def _instructions(instruct: InstructConfig) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("predicted", "answers with their end token; questions and documents are only read"),
        ("prompt format", _TEMPLATES.get(instruct.template, "a template of its own, in chat_template.jinja")),
        ("system message where an example has none", instruct.system or "none"),
        ("documents that do not fit", f"shortened {_PLACES[instruct.shorten]}; questions and answers never are"),
        ("equal weight for", "every token of an answer" if instruct.loss_weighting == "tokens" else "every example"),
    ]
    if instruct.weights:
        rows.append(("times each source was used", ", ".join(f"{weight:g}" for weight in instruct.weights)))
    return rows


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
    noun = next(iter(shards.values())).noun
    rows: list[tuple[str, ...]] = [("set", noun, "tokens", "shortened", "left out", "sha256 of its manifest")]
    rows += [
        (
            name,
            f"{shard.documents:,}",
            f"{shard.tokens:,}",
            f"{shard.shortened:,}, by {shard.removed_tokens:,} tokens together" if shard.shortened else "0",
            f"{shard.left_out:,}",
            shard.manifest_sha256,
        )
        for name, shard in shards.items()
    ]
    lists = [f"{noun.capitalize()} of {name}: {_names(shard.names)}." for name, shard in shards.items() if shard.names]
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
