"""One table of embeddings in training instead of two.

PEFT trains a copy of the embeddings and keeps the frozen original for a switched-off adapter: one and a half tables of
float32 where the model is in 16 bits, two where it is in 32. Training never switches the adapter off, and saving,
loading and merging read the copy alone, so the original can go.
"""

from __future__ import annotations

from typing import Any, NoReturn

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from longlora.errors import ModelError


def free_frozen_embeddings(model: PeftModel) -> int:
    """Drop the frozen originals of trained embeddings (and of tied output embeddings); returns the bytes freed.

    Afterwards the adapter cannot be switched off: a forward pass through a freed table is an error.
    """
    base = model.get_base_model()
    tables: dict[int, int] = {}
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        original: nn.Module = module.original_module
        for name, parameter in list(original.named_parameters(recurse=False)):
            tables[id(parameter)] = parameter.numel() * parameter.element_size()  # tied ones count once
            original.register_parameter(name, None)
        original.register_forward_pre_hook(_refuse)
    return sum(tables.values())


def _refuse(*_: Any) -> NoReturn:
    raise ModelError(
        "the frozen embeddings were freed for training, so the adapter cannot be switched off here: load the base model"
    )
