"""The tokens that end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora.artifacts import read_json

_GENERATION = "generation_config.json"


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: those of the generation config and the tokenizer's end of text. May be empty."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    found = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    return frozenset(int(token) for token in found if token is not None)


def with_end(known: Any, token: int | None) -> list[int] | None:
    """``eos_token_id`` of a generation config (a number, a list or None) with `token` as well; None if it is there."""
    ends = list(known) if isinstance(known, list) else [known] if known is not None else []
    return None if token is None or token in ends else [*ends, token]


def end_answers(folder: Path, token: int | None) -> None:
    """Let generation end at `token` too where the model in `folder` is used: it may only know the end of a text.

    In the file: `save_pretrained` takes a published generation config that contradicts itself, but not once it changed.
    """
    path = folder / _GENERATION
    values = read_json(path, "remove merged/ and run `longlora merge` again") if path.exists() else {}
    if ends := with_end(values.get("eos_token_id"), token):
        path.write_text(json.dumps(values | {"eos_token_id": ends}, indent=2) + "\n", encoding="utf-8")
