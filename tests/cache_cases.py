"""Tiny models of every kind of KV cache, and tokens for them."""

from __future__ import annotations

from functools import cache

import torch
from architectures import ARCHITECTURES
from transformers import PreTrainedModel

# GQA, windows of 8 tokens, learned positions, value heads of another size, layers that use keys of others, experts.
MODELS = ("llama", "gemma3_text", "qwen2", "gpt2", "deepseek_v3", "gemma3n_text", "gpt_oss")


@cache
def model_of(model_type: str) -> PreTrainedModel:
    return next(a for a in ARCHITECTURES if a.model_type == model_type and not a.refused).build()


def random_tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist())
