"""Whether an adapter folder holds what longlora writes and nothing else that PEFT would act on.

PEFT falls back to a pickle where safetensors is missing, asks the hub for what is not in the folder, and takes
settings that replicate layers, or initialise by decompositions of every weight. An adapter of ours has none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longlora.artifacts import read_json
from longlora.errors import RunFolderError
from longlora.model.adapters import ADAPTER_WEIGHTS

_CONFIG = "adapter_config.json"
_REMEDY = "train again or restore the adapter folder"
# What `add_adapter` sets, with the types that JSON has for it; everything else must be off.
_OURS: dict[str, Any] = {
    "task_type": (str,),
    "peft_type": (str,),
    "peft_version": (str,),
    "base_model_name_or_path": (str, type(None)),
    "revision": (str, type(None)),
    "inference_mode": (bool,),
    "r": (int,),
    "target_modules": (list, str),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "bias": (str,),
    "modules_to_save": (list, type(None)),
    "trainable_token_indices": (dict, type(None)),
    "ensure_weight_tying": (bool,),
    "init_lora_weights": (bool,),
    "qalora_group_size": (int,),
    "megatron_core": (str, type(None)),
}
_FIXED = {"peft_type": ("LORA",), "task_type": ("CAUSAL_LM",), "bias": ("none",), "init_lora_weights": (True,)}
_LARGEST_RANK = 2**16


def require_own_adapter(folder: Path) -> None:
    """Raise `RunFolderError` unless PEFT reads `folder` as longlora wrote it; the message names file and setting."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise RunFolderError(f"{folder / ADAPTER_WEIGHTS} is missing, and nothing else is read as weights: {_REMEDY}")
    values = read_json(folder / _CONFIG, _REMEDY)
    if not isinstance(values, dict):
        raise RunFolderError(f"{folder / _CONFIG} is no JSON object: {_REMEDY}")
    for name, value in values.items():
        if not _is_ours(name, value):
            raise RunFolderError(
                f"{folder / _CONFIG} has {name!r:.60} = {value!r:.60}, which longlora does not write: {_REMEDY}"
            )
    if missing := sorted({"peft_type", "task_type", "r", "lora_alpha", "target_modules"} - values.keys()):
        raise RunFolderError(f"{folder / _CONFIG} lacks {missing[0]}: {_REMEDY}")


def _is_ours(name: str, value: Any) -> bool:
    if name not in _OURS:
        return not value  # None, false, {} and 0 are how PEFT writes that a setting is off
    if not isinstance(value, _OURS[name]) or (isinstance(value, bool) and bool not in _OURS[name]):
        return False
    if name in _FIXED and value not in _FIXED[name]:
        return False
    if name == "r":
        return 0 < value <= _LARGEST_RANK
    if name == "lora_dropout":
        return 0 <= value < 1
    if name == "lora_alpha":
        return 0 < value < 1e9
    if name == "trainable_token_indices":
        return value is None or all(_is_list_of(rows, int) for rows in value.values())
    return _is_list_of(value, str) if isinstance(value, list) else True


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
