"""Tiny tokenizers and shards that need no download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from longlora.data.documents import Document, ReadReport
from longlora.data.shards import TokenShard, write_shard

LINES = ["the sea was calm and the ship was slow", "she read the long book by the window", "käse und brot"]
BOS, EOS = "<s>", "</s>"


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Byte-level BPE trained on `LINES`; `template` is what it puts around a text by itself."""

    def make(template: str = f"{BOS} $A", strip: bool = False) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        if strip:
            tokenizer.normalizer = normalizers.Replace("#", "")
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(LINES, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(BOS, 0), (EOS, 1)])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=16
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """Puts BOS in front and nothing behind, like most models."""
    return make_tokenizer()


@pytest.fixture
def written(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> TokenShard:
    """A good shard of three documents."""
    documents = [Document(f"line{number}", line) for number, line in enumerate(LINES)]
    return write_shard(
        tmp_path / "shard", documents, tokenizer, tokenizer_hash="abc", add_special_tokens=True, report=ReadReport()
    )


@pytest.fixture(scope="session")
def shard_of() -> Callable[[list[int]], TokenShard]:
    """A shard in memory whose tokens are 0, 1, 2, ..., so that each token tells where it came from."""

    def make(lengths: list[int]) -> TokenShard:
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        names = tuple(f"document{number}" for number in range(len(lengths)))
        return TokenShard(Path("memory"), np.arange(offsets[-1], dtype=np.int32), offsets, names, "abc")

    return make
