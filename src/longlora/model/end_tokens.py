"""The tokens that end an answer."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: those of the generation config and the tokenizer's end of text. May be empty."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    found = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    return frozenset(int(token) for token in found if token is not None)
