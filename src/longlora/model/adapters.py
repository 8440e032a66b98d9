"""LoRA plus trainable embeddings and norms through PEFT (paper, section 3.3).

In: a model and `AdapterConfig`. Out: a PEFT model whose adapter file holds everything that was trained.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from longlora.config import AdapterConfig
from longlora.errors import ModelError
from longlora.storage import without_home, write_atomic

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def add_adapter(
    model: PreTrainedModel, settings: AdapterConfig, embedding_rows: Sequence[int] | None = None
) -> PeftModel:
    """Freeze `model` and add what is trained, in float32: LoRA, and the chosen embeddings and norms.

    Tied embeddings stay tied. An untied output head stays frozen, as in the paper.

    Args:
        model: the base model.
        settings: what is trained.
        embedding_rows: token ids whose embeddings are trained; None means all of them.

    Raises:
        ModelError: no linear layer matches `settings.target_modules`.
    """
    modules_to_save = []
    if settings.train_norms:
        modules_to_save += norm_names(model)
    tied = _is_tied(model)
    embeddings = _name_of(model, model.get_input_embeddings())
    if settings.train_embeddings and embedding_rows is None:
        modules_to_save.append(embeddings)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias="none",
        target_modules=target_modules(model, settings.target_modules),
        modules_to_save=modules_to_save or None,
        trainable_token_indices=(
            {embeddings: list(embedding_rows)} if settings.train_embeddings and embedding_rows is not None else None
        ),
        ensure_weight_tying=tied and embeddings in modules_to_save,
    )
    wrapped = get_peft_model(model, lora, autocast_adapter_dtype=True)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def trainable_names(model: nn.Module) -> list[str]:
    """Names of all parameters that are trained, in order; a tied parameter appears once."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def target_modules(model: PreTrainedModel, wanted: str | list[str]) -> list[str] | str:
    """`wanted` in PEFT's terms: name endings, or ``all-linear``."""
    if wanted == "all-linear":
        return "all-linear"
    linear = {name for name, module in model.named_modules() if is_linear(module)}
    if wanted == "attention":
        # With the name of the attention module in front: fused and feed-forward layers share names such as c_proj.
        attention = {name for name, module in model.named_modules() if type(module).__name__.endswith("Attention")}
        names = sorted({".".join(n.rsplit(".", 2)[-2:]) for n in linear if n.rpartition(".")[0] in attention})
    else:
        names = list(wanted)
    unknown = [name for name in names if not any(f".{found}".endswith(f".{name}") for found in linear)]
    if not names or unknown:
        endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ModelError(
            f"adapter.target_modules={wanted!r} matches no linear layer of {type(model).__name__}; "
            f"it has {', '.join(endings)}"
        )
    return names


def norm_names(model: PreTrainedModel) -> list[str]:
    """Last name parts of all normalisation layers, as PEFT's `modules_to_save` matches them."""
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_norm(module)})


def norms(model: nn.Module) -> list[nn.Module]:
    """All normalisation layers; of one that PEFT wrapped, the copy in use and the original."""
    return [module for module in model.modules() if _is_norm(module)]


def cast_to_compute_dtype(model: PeftModel | PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep activations in `dtype` although embeddings, norms and LoRA, or all weights, are trained in float32.

    That is half the memory, and each is converted once: left alone, autocast converts the float32 output of a norm for
    every linear layer that reads it, and PEFT converts it back for every LoRA. The model must run under autocast then.
    """
    for module in [model.get_input_embeddings(), *norms(model)]:
        module.register_forward_hook(lambda _module, _args, output: output.to(dtype))
    if dtype is not torch.float32:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False


def load_adapter(model: PreTrainedModel, folder: str) -> PeftModel:
    """`model`, built with the RoPE of the adapter's sidecar, with the adapter of `folder` on top, in float32."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(f"adapter {folder} cannot be loaded ({error}): train again or restore the folder") from error


def save_adapter(model: PeftModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Save everything that was trained as one safetensors file, and check that nothing is missing in it.

    Args:
        model: with the adapter.
        folder: where to.
        weights: what was trained, by its names in `model`; None means as it is in `model`.

    Raises:
        ModelError: a trained parameter did not reach the file.
    """
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)
    hide_home(folder)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
    wanted = names_in_file(model)
    if missing := sorted(wanted - saved):
        raise ModelError(
            f"{folder}/{ADAPTER_WEIGHTS} lacks {len(missing)} of {len(wanted)} trained tensors, first "
            f"{missing[0]}: this is a bug of longlora, please report it"
        )


def names_in_file(model: PeftModel) -> set[str]:
    """What an adapter's file calls that which is trained: PEFT leaves names of its wrappers and of the adapter out."""
    return {
        name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")
        for name in trainable_names(model)
    }


def hide_home(folder: Path) -> None:
    """Write the home folder as ``~`` in PEFT's config, where it names the base model.

    Nothing here reads that name: the sidecar says which model belongs to the adapter. PEFT's own
    `AutoPeftModelForCausalLM` does, and would put the adapter on the model with its old RoPE, silently; it finds none.
    """
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = without_home(values.get("base_model_name_or_path") or "") or None
    write_atomic(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))


def is_linear(module: nn.Module) -> bool:
    """Whether LoRA takes it for a linear layer; GPT-2's is of another class."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted).rsplit(".", 1)[-1]
