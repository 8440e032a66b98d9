"""A tiny Llama with SmolLM2's odd head counts and a tokenizer of bytes, made in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 128


def llama_config(**changes: object) -> LlamaConfig:
    values: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 72,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        # Large enough that attention is not uniform: a leak must show.
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**values, **changes})


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: every text has as many tokens as bytes, and nothing in ASCII is unknown."""
    # Space and line break first: as letters of the byte alphabet they come behind all printable ones.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (letter not in "ĠĊ", letter))
    letters = {letter: index + 3 for index, letter in enumerate(alphabet[: VOCABULARY - 3])}
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | letters
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def save_tiny_model(folder: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(**changes)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def stir(model: torch.nn.Module, seed: int, scale: float = 0.05) -> None:
    """Move every trained weight away from where it began, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def bear_texts(folder: Path) -> Path:
    """Four short texts to train on, in `folder`, which may hold them already."""
    if not folder.exists():
        folder.mkdir()
        for number in range(4):
            text = f"once upon a time there were {number} bears. " * 12
            (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder
