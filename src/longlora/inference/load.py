"""A merged model, an adapter or a run folder -> a model that answers, and its tokenizer with the stored template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora.artifacts import SIDECAR, RunFolder
from longlora.config import ModelConfig
from longlora.errors import ModelError, RunFolderError
from longlora.model.build import device_for_run, load_config, load_model, load_tokenizer
from longlora.model.merge import merged_model, tokenizer_of
from longlora.model.sidecar import read_sidecar


@dataclass(frozen=True)
class Source:
    """What the name that a person gave stands for."""

    kind: Literal["model", "adapter"]
    name: str
    """A folder, or a hub id."""


def locate(name: str) -> Source:
    """What `name` is: a model folder, an adapter folder, a run folder (its merged/, else its adapter/) or a hub id.

    Raises:
        RunFolderError: a run folder without a model, or an adapter that longlora did not make.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return Source("model", name)
    if (folder / "config.json").is_file():  # first: a fully fine-tuned model has a sidecar too
        return Source("model", str(folder))
    if (folder / SIDECAR).is_file():
        return Source("adapter", str(folder))
    if (folder / "adapter_config.json").is_file():
        raise RunFolderError(
            f"{folder} is an adapter without {SIDECAR}, so its RoPE and base model are not known: merge it with the "
            "tool that made it, and give the merged folder"
        )
    run = RunFolder(folder)
    if run.merged.is_dir():
        return Source("model", str(run.merged))
    if run.adapter.is_dir():
        return Source("adapter", str(run.adapter))
    if run.recipe.is_file():
        raise RunFolderError(f"run folder {folder} holds neither merged/ nor adapter/: run `longlora train` first")
    raise RunFolderError(
        f"{folder} holds no model (config.json), adapter ({SIDECAR}) or run: give a merged model, an adapter or a run"
    )


def load(name: str, template: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on this machine's device, and its tokenizer; an adapter is merged in memory.

    Args:
        name: as `locate` takes it. Remote code is never run.
        template: a Jinja chat template instead of the stored one.

    Raises:
        ModelError: the model or the tokenizer cannot be read, or there is no chat template.
        RunFolderError: as `locate`; or the adapter is damaged.
    """
    source = locate(name)
    tokenizer = _tokenizer(source)
    if template is not None:
        tokenizer.chat_template = _read_template(template)
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {source.name} has no chat template, so it is not known how to ask: give "
            "--chat-template FILE, or a model that was fine-tuned on instructions"
        )
    if source.kind == "adapter":
        model = merged_model(Path(source.name))
    else:
        config = load_config(ModelConfig(name_or_path=source.name))
        model = load_model(ModelConfig(name_or_path=source.name), config, dtype=config.dtype or torch.float32)
    return model.to(device_for_run()), tokenizer


def _tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """That of the model; of an adapter its base model's, with the template that it was trained on."""
    if source.kind == "model":
        return load_tokenizer(ModelConfig(name_or_path=source.name))
    return tokenizer_of(read_sidecar(Path(source.name)))


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"chat template {path} cannot be read ({error}): give a Jinja file in UTF-8") from None
