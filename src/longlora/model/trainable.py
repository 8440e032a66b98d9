"""What of a model is trained: an adapter on it, or all of it. The one place that knows both.

In: a base model and `AdapterConfig`. Out: the model as it is trained, and its trained weights in a file and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from longlora.config import AdapterConfig, ModelConfig, Recipe
from longlora.errors import RunFolderError
from longlora.model.adapters import ADAPTER_WEIGHTS, add_adapter, names_in_file, save_adapter

TrainedModel: TypeAlias = PeftModel | PreTrainedModel
"""A base model in PEFT's wrapper, or one of which every parameter is trained."""
_WHOLE_WEIGHTS = "model.safetensors"


def source_of_training(recipe: Recipe) -> ModelConfig:
    """The model of `recipe` as its weights are to be read.

    Those that are trained are float32, so a base that is stored in float32 must not be rounded on the way.
    """
    whole = recipe.adapter.method == "full"
    return recipe.model.model_copy(update={"dtype": "float32"}) if whole else recipe.model


def make_trainable(
    base: PreTrainedModel, settings: AdapterConfig, embedding_rows: Sequence[int] | None = None
) -> TrainedModel:
    """`base` with what `settings` name to be trained, in float32; what is tied stays tied.

    What an architecture itself keeps from training, such as the biases that balance experts, stays frozen with
    ``method: full`` too.

    Args:
        embedding_rows: as `add_adapter` takes it.

    Raises:
        ModelError: as `add_adapter`.
    """
    if settings.method == "lora":
        return add_adapter(base, settings, embedding_rows)
    for parameter in base.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return base


def base_of(model: TrainedModel) -> PreTrainedModel:
    """The transformers model inside."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def parameter_counts(model: TrainedModel) -> tuple[int, int]:
    """How many parameters are trained, and how many there are; 4-bit ones count as what they stand for."""
    if isinstance(model, PeftModel):
        trained, every = model.get_nb_trainable_parameters()
        return int(trained), int(every)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(p.numel() for p in model.parameters())


def trained_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter by its name in memory, on the CPU; a tied one once."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}


def weights_file(settings: AdapterConfig) -> str:
    """The name of the file that `save_trained` writes of a model trained with `settings`."""
    return ADAPTER_WEIGHTS if settings.method == "lora" else _WHOLE_WEIGHTS


def save_trained(model: TrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write everything that is trained, in float32, as one safetensors file.

    Args:
        model: as it is trained.
        folder: exists.
        weights: the trained weights by their names in memory, where `model` itself does not hold them whole because
            processes share them; None means those of `model`.

    Raises:
        ModelError: a trained parameter did not reach the file.
    """
    if isinstance(model, PeftModel):
        save_adapter(model, folder, weights)
    else:
        save_file(weights or trained_weights(model), folder / _WHOLE_WEIGHTS, metadata={"format": "pt"})


def load_trained(model: TrainedModel, folder: Path) -> None:
    """Put what `save_trained` wrote into `model`, which stays where it is.

    Raises:
        RunFolderError: the file is of another model or of other settings.
    """
    if isinstance(model, PeftModel):
        weights = load_file(folder / ADAPTER_WEIGHTS)
        if missing := sorted(names_in_file(model) - weights.keys()):
            raise RunFolderError(f"{folder} does not fit the recipe: it lacks {', '.join(missing[:3])}")
        result = set_peft_model_state_dict(model, weights)
        if result.unexpected_keys:
            raise RunFolderError(f"{folder} does not fit the recipe: {result.unexpected_keys[:3]}")
        return
    copy_weights(model, load_file(folder / _WHOLE_WEIGHTS), str(folder))


@torch.no_grad()
def copy_weights(model: PreTrainedModel, weights: dict[str, Tensor], source: str) -> None:
    """Copy `trained_weights` of the same architecture into `model`.

    Raises:
        RunFolderError: a name or a shape differs.
    """
    own = dict(model.named_parameters())
    wrong = sorted(own.keys() ^ weights.keys()) or [name for name in own if own[name].shape != weights[name].shape]
    if wrong:
        raise RunFolderError(f"{source} does not fit the recipe: {len(wrong)} parameters differ, first {wrong[0]}")
    for name, parameter in own.items():
        parameter.copy_(weights[name])
