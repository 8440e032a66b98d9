"""Recipes and configs that the tests of the planner share."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from longlora.config import Recipe, build_recipe

LLAMA_2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
PAPER = {"attention.group_size": None, "attention.group_size_ratio": 0.25, "attention.sink_tokens": 0}


def llama_2_7b() -> PreTrainedConfig:
    return AutoConfig.for_model("llama", **LLAMA_2_7B)


def recipe(context: int = 8192, **settings: Any) -> Recipe:
    """Settings under dotted names; small groups and chunks unless they say otherwise."""
    values: dict[str, Any] = {
        "run_dir": "run",
        "model": {"name_or_path": "model"},
        "context": {"context_length": context},
        "attention": {"group_size": 256},
        "train": {"loss_chunk_tokens": 256},
    }
    for key, value in settings.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    return build_recipe(values)


def small(kind: str = "llama", **sizes: Any) -> PreTrainedConfig:
    values: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "pad_token_id": 0,
    }  # fmt: skip
    return AutoConfig.for_model(kind, **values | sizes)
