"""A GGUF file as an ordinary model folder: transformers reads it, and we save what it read as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from longlora.artifacts import new_folder

_NOT_CONFIG = ("quantization_config", "_name_or_path", "transformers_version", "model_type")


def model_folder(gguf: Path) -> Path:
    """A cached folder beside `gguf` with its weights in bfloat16, its config and its tokenizer."""
    folder = gguf.with_suffix("")
    if folder.is_dir():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model that was read from GGUF refuses to be saved; a fresh one of the same config does not.
    values = {key: value for key, value in read.config.to_dict().items() if key not in _NOT_CONFIG}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(read.config.model_type, **values))
    model.load_state_dict(read.state_dict())
    tokenizer.model_max_length = read.config.max_position_embeddings
    with new_folder(folder) as target:
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
    return folder
