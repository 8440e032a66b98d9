"""A model with random weights and texts of random letters: what a step costs does not depend on what they say."""

from __future__ import annotations

import copy
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from longlora.artifacts import RunFolder
from longlora.data.documents import Document, ReadReport
from longlora.data.shards import write_shard
from longlora.errors import ModelError
from longlora.model.build import tokenizer_hash

_LETTERS = "abcdefghij "


def random_model(config: PreTrainedConfig, context_length: int, folder: Path) -> None:
    """Write a model of `config` in bfloat16, whose own context is half of `context_length`, with a tokenizer of bytes.

    Raises:
        ModelError: the vocabulary is smaller than a tokenizer of bytes needs, or the disk is full.
    """
    config = copy.deepcopy(config)
    text: Any = config.get_text_config(decoder=True)
    tokenizer = _byte_tokenizer()
    if text.vocab_size < len(tokenizer):
        raise ModelError(f"vocab_size={text.vocab_size}: measuring a step takes at least {len(tokenizer)}")
    text.max_position_embeddings = context_length // 2
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:  # each library's own way to say that a disk is full
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise ModelError(
            f"a model with random weights cannot be written to {folder} ({free / 1e9:.1f} GB free): {error}; "
            "set TMPDIR to a larger disk"
        ) from error


def random_shard(run: RunFolder, context_length: int, rows: int) -> None:
    """Write the training shard of `run`: documents of exactly `context_length` tokens."""
    tokenizer = _byte_tokenizer()
    generator = random.Random(0)
    texts = ("".join(generator.choices(_LETTERS, k=context_length)) for _ in range(rows))
    write_shard(
        run.train_shard,
        (Document(str(number), text) for number, text in enumerate(texts)),
        tokenizer,
        tokenizer_hash=tokenizer_hash(tokenizer),
        add_special_tokens=False,
        report=ReadReport(),
    )


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    rules = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=rules)
