"""What a model folder says, read from its files, and whether that is what a run trained.

In: a folder and the run's `Sidecar`. Out: `ReadBack`, or one line with every difference.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig

from longlora.artifacts import read_json
from longlora.config import ModelConfig
from longlora.errors import ModelError, RunFolderError
from longlora.model.build import load_config, load_tokenizer, tokenizer_hash
from longlora.model.sidecar import Sidecar

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_AGAIN = "remove merged/ and run `longlora merge` again"


@dataclass(frozen=True)
class ReadBack:
    """A model as its files say: `context_length` in tokens, `parameters` counts every stored value once."""

    rope_parameters: dict[str, Any]
    context_length: int
    dtype: str
    tied: bool
    tensors: int
    parameters: int
    vocabulary: int


def read_back(folder: Path, sidecar: Sidecar) -> ReadBack:
    """Read every file of `folder`; weights are looked at one tensor at a time.

    Raises:
        ModelError: something differs from `sidecar`; the message names each difference with both values.
        RunFolderError: a file of weights is missing or damaged, or holds a value that is no number.
    """
    config = load_config(ModelConfig(name_or_path=str(folder)))
    dtypes, tensors = _weights(folder)
    # The type of most values: some models keep small buffers in float32 whatever the rest is in.
    dtype = str(max(dtypes, key=lambda kind: dtypes[kind])).removeprefix("torch.")
    found = ReadBack(
        rope_parameters=dict(config.rope_parameters or {}),
        context_length=config.max_position_embeddings,
        dtype=dtype,
        tied=bool(config.tie_word_embeddings),
        tensors=len(tensors),
        parameters=sum(dtypes.values()),
        vocabulary=config.vocab_size,
    )
    # A config that is wrong already may name no model that could be built.
    differences = _differences(found, config, sidecar) or _missing(folder, config, tensors)
    tokenizer = tokenizer_hash(load_tokenizer(ModelConfig(name_or_path=str(folder))))
    if tokenizer != sidecar.tokenizer_sha256:
        differences.append(f"tokenizer {tokenizer[:12]}, trained with {sidecar.tokenizer_sha256[:12]}")
    if differences:
        raise ModelError(f"the exported files differ from the run: {'; '.join(differences)}: not written; {_AGAIN}")
    return found


def _differences(found: ReadBack, config: PreTrainedConfig, sidecar: Sidecar) -> list[str]:
    lines = []
    if found.rope_parameters != sidecar.rope_parameters:
        lines.append(f"RoPE {found.rope_parameters}, trained with {sidecar.rope_parameters}")
    if found.context_length != sidecar.context_length:
        lines.append(f"context {found.context_length} tokens, trained for {sidecar.context_length}")
    declared = str(config.dtype).removeprefix("torch.")
    if not found.dtype == declared == sidecar.dtype:
        lines.append(f"weights in {found.dtype}, config says {declared}, trained as {sidecar.dtype}")
    return lines


def _missing(folder: Path, config: PreTrainedConfig, tensors: set[str]) -> list[str]:
    """Names that transformers would look for in vain, would not use, or that have another shape."""
    try:
        # On the meta device names and shapes are matched and nothing is loaded.
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise RunFolderError(f"the files of the merged model cannot be loaded ({reason}): {_AGAIN}") from error
    lines = [
        f"{len(info[kind])} tensors {kind.removesuffix('_keys')}, such as {sorted(map(str, info[kind]))[0]}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    ]
    tied = sorted(set(model.all_tied_weights_keys) & tensors)
    if config.tie_word_embeddings and tied:
        lines.append(f"embeddings are tied, and the files hold {tied[0]} as well")
    return lines


def _weights(folder: Path) -> tuple[Counter[torch.dtype], set[str]]:
    """How many values there are of each data type, and the names of all tensors."""
    values: Counter[torch.dtype] = Counter()
    names: set[str] = set()
    for file, expected in _files(folder).items():
        if not (folder / file).is_file():
            raise RunFolderError(f"{file} of the merged model is missing: {_AGAIN}")
        try:
            with safe_open(folder / file, framework="pt") as reader:
                held = set(reader.keys())
                for name in held:
                    tensor = reader.get_tensor(name)
                    values[tensor.dtype] += tensor.numel()
                    if not torch.isfinite(tensor).all():
                        raise RunFolderError(f"{name} of the merged model holds values that are no numbers: {_AGAIN}")
        except (SafetensorError, OSError) as error:
            raise RunFolderError(f"{file} of the merged model is damaged ({error}): {_AGAIN}") from error
        if expected and expected != held:
            raise RunFolderError(f"{file} of the merged model holds other tensors than its index says: {_AGAIN}")
        names |= held
    if not names:
        raise RunFolderError(f"the merged model has no weights: {_AGAIN}")
    return values, names


def _files(folder: Path) -> dict[str, set[str]]:
    """File of weights -> the tensors that the index says it holds; an empty set where there is no index."""
    if not (folder / _INDEX).exists():
        return {_SINGLE: set()}
    index = read_json(folder / _INDEX, _AGAIN)
    files: dict[str, set[str]] = {}
    try:
        for name, file in index["weight_map"].items():
            files.setdefault(str(file), set()).add(name)
    except (KeyError, TypeError, AttributeError):
        raise RunFolderError(f"{_INDEX} of the merged model is damaged: {_AGAIN}") from None
    return files
