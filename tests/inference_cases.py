"""A tiny model that can be asked: a token for every byte, a chat template, and an adapter on it."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import llama_config, stir
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from longlora.artifacts import write_manifest
from longlora.config import AdapterConfig, AttentionConfig, ModelConfig
from longlora.model.adapters import add_adapter, save_adapter
from longlora.model.build import load_config, load_model, load_tokenizer, tokenizer_hash, weights_fingerprint
from longlora.model.rope import rescale_rope
from longlora.model.sidecar import Sidecar, write_sidecar

WINDOW = 1024
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def askable_tokenizer() -> PreTrainedTokenizerFast:
    """Every text has as many tokens as bytes of UTF-8, so that an accented letter takes two tokens."""
    letters = {letter: index + 3 for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "<s>": 1, "</s>": 2} | letters, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        chat_template=TEMPLATE,
    )  # fmt: skip


def askable_model(window: int = WINDOW) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(vocab_size=259, max_position_embeddings=window)).eval()


def save_askable(folder: Path, window: int = WINDOW) -> Path:
    """A model folder as a merge leaves it."""
    askable_model(window).save_pretrained(folder)
    askable_tokenizer().save_pretrained(folder)
    return folder


def save_askable_adapter(base: Path, folder: Path, context_length: int) -> Path:
    """An adapter on the model in `base` that changes it, with RoPE for `context_length`."""
    source = ModelConfig(name_or_path=str(base), dtype="float32")
    config, change = rescale_rope(load_config(source), context_length, "linear")
    model = load_model(source, config, dtype=torch.float32)
    fingerprint = weights_fingerprint(model)
    wrapped = add_adapter(model, AdapterConfig())
    stir(wrapped, seed=1)
    folder.mkdir(parents=True)
    save_adapter(wrapped, folder)
    sidecar = Sidecar(
        str(base), None, "float32", change.original_context_length, change.context_length, config.rope_parameters,
        AttentionConfig().model_dump(), tokenizer_hash(load_tokenizer(source)), fingerprint,
    )  # fmt: skip
    write_sidecar(folder, sidecar)
    write_manifest(folder)
    return folder
