"""The model of a recipe without weights: built on torch's meta device, with what training would add and train.

In: a transformers config. Out: a model of meta tensors, and its `Outline`, which counts what FLOPs depend on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from longlora.artifacts import MANIFEST, RunFolder
from longlora.attention.layers import attention_modules, has_window, layer_patterns
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern
from longlora.config import AttentionConfig, Recipe
from longlora.data.shards import open_shard
from longlora.errors import ModelError, one_line
from longlora.model.adapters import is_linear, norms
from longlora.model.trainable import TrainedModel, make_trainable


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer: heads of queries and of keys, width of a query and of a value head, pattern in training."""

    heads: int
    kv_heads: int
    width: int
    value_width: int
    pattern: Pattern


@dataclass(frozen=True)
class Block:
    """Counts of parameters in a part of the model as it is trained."""

    frozen: int = 0
    trained: int = 0
    quantizable: int = 0
    """Those of the frozen ones that 4-bit storage would shrink."""


@dataclass(frozen=True)
class Outline:
    """Counts of parameters; a tied matrix counts once, except among the `..._used`, where each multiplication counts.

    `..._used` are the elements of the matrices that one token is multiplied with, of experts only the chosen ones.
    """

    total: int
    """Parameters of the base model."""
    trained: int
    """Parameters that get gradients: LoRA, and embeddings and norms in full; or all."""
    lora: int
    """Those of them that LoRA adds."""
    trained_matrices: int
    """Those of them outside of embeddings and norms: what an 8-bit optimizer keeps its states of in 8 bits."""
    quantizable: int
    """Frozen parameters in linear layers other than the head: what 4-bit storage would shrink."""
    largest_matrix: int
    projections_used: int
    mlp_used: int
    head_used: int
    head_trained: bool
    layers_trained: bool
    """Whether the matrices of the layers themselves get gradients, and not only what LoRA puts beside them."""
    layers: tuple[AttentionLayer, ...]
    block: Block
    """The largest decoder layer: what a sharded model gathers at a time."""
    outside: Block
    """What is in no decoder layer: embeddings, the last norm, the output head."""


def meta_model(config: PreTrainedConfig, recipe: Recipe) -> TrainedModel:
    """The model that training would make of `recipe`, without weights.

    Raises:
        ModelError: transformers cannot build a causal language model of the config.
    """
    return make_trainable(meta_base(config, recipe.model.dtype), recipe.adapter, embedding_rows(recipe))


def embedding_rows(recipe: Recipe) -> list[int] | None:
    """Token ids whose embeddings alone are trained; None for all, also where no prepared shard says which occur."""
    shard = RunFolder(recipe.run_path).train_shard
    if recipe.adapter.embedding_rows == "all" or not (shard / MANIFEST).exists():
        return None
    return _occurring(shard, (shard / MANIFEST).stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _occurring(shard: Path, changed: int) -> list[int]:
    return [int(token) for token in open_shard(shard, None).occurring_tokens()]


def meta_base(config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    """The base model without weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(  # type: ignore[no-any-return]
                copy.deepcopy(config), dtype=getattr(torch, dtype), trust_remote_code=False
            )
    except Exception as error:
        raise ModelError(
            f"model type {config.model_type!r} cannot be planned ({one_line(error)}): "
            "give a config of a causal language model known to transformers"
        ) from error


def outline(config: PreTrainedConfig, recipe: Recipe) -> Outline:
    """Count the model of `config` with what `recipe` trains of it, and its attention."""
    base = meta_base(config, recipe.model.dtype)
    total = sum(parameter.numel() for parameter in base.parameters())
    used = _used(base)
    layers = attention_layers(base, recipe.attention, recipe.context.context_length)
    head = base.get_output_embeddings()
    head_used = head.weight.numel() if head is not None else 0
    linear = [m.weight for m in base.modules() if is_linear(m) and m is not head]
    quantizable = sum(weight.numel() for weight in {id(w): w for w in linear}.values())
    largest = max((weight.numel() for weight in linear), default=0)
    numbers = {id(weight) for weight in linear}
    adapted = make_trainable(base, recipe.adapter, embedding_rows(recipe))
    block, outside = _blocks(adapted, base, numbers)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    lora = sum(p.numel() for n, p in trained.items() if "lora_" in n)
    count = sum(p.numel() for p in trained.values())
    whole = recipe.adapter.method == "full"
    return Outline(
        total=total,
        trained=count,
        lora=lora,
        trained_matrices=_matrices(adapted) if whole else lora,
        quantizable=quantizable,
        largest_matrix=largest,
        projections_used=used["projections"],
        mlp_used=used["mlp"],
        head_used=head_used,
        head_trained=head is not None and any(p is adapted.get_output_embeddings().weight for p in trained.values()),
        layers_trained=whole,
        layers=layers,
        block=block,
        outside=outside,
    )


def attention_layers(
    base: PreTrainedModel, settings: AttentionConfig, context_length: int
) -> tuple[AttentionLayer, ...]:
    """The attention layers of `base`, each with its pattern in training."""
    modules = attention_modules(base)
    pattern = S2Pattern(settings.resolve_group_size(context_length), settings.sink_tokens)
    full: Sequence[int] | Literal["all"] = "all" if settings.pattern == "full" else settings.full_attention_layers
    patterns: list[S2Pattern] = layer_patterns(base, modules, pattern, settings.shift, full)
    config: Any = base.config.get_text_config(decoder=True)
    layers = []
    for module, sparse in zip(modules, patterns, strict=True):
        own: Any = module
        heads = int(getattr(own, "num_heads", 0) or config.num_attention_heads)
        plain = getattr(own, "head_dim", None) or config.hidden_size // heads
        width = int(getattr(own, "qk_head_dim", None) or plain)
        value_width = int(getattr(own, "v_head_dim", None) or plain)
        kv_heads = int(getattr(own, "num_key_value_heads", 0) or getattr(config, "num_key_value_heads", 0) or heads)
        layers.append(AttentionLayer(heads, kv_heads, width, value_width, _own_pattern(base, module, sparse, config)))
    return tuple(layers)


def _own_pattern(base: PreTrainedModel, module: nn.Module, sparse: S2Pattern, config: Any) -> Pattern:
    if not has_window(base, module):
        return sparse
    size = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    return WindowPattern(int(size)) if size else FULL


def _used(base: PreTrainedModel) -> dict[str, int]:
    """Elements of the matrices that a token meets in attention modules and elsewhere, without the output head."""
    attention = tuple(f"{n}." for n, m in base.named_modules() if type(m).__name__.endswith("Attention"))
    experts, chosen = experts_of(base.config)
    used = {"projections": 0, "mlp": 0}
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if module is head:
            continue
        part = "projections" if f"{name}.".startswith(attention) else "mlp"
        if is_linear(module):
            weight: Any = module.weight
            one_of_many = ".experts." in f"{name}."
            used[part] += weight.numel() * chosen // experts if one_of_many else weight.numel()
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 2 and not is_linear(module) and not isinstance(module, nn.Embedding):  # routers
                used[part] += parameter.numel()
            if parameter.ndim == 3 and "expert" in type(module).__name__.lower():  # experts stacked in one tensor
                used[part] += parameter.numel() * chosen // parameter.shape[0]
    return used


def experts_of(config: PreTrainedConfig) -> tuple[int, int]:
    """Experts in a layer and how many of them a token meets; (1, 1) without experts."""
    text = config.get_text_config(decoder=True)

    def first(*names: str) -> int:
        return next((int(value) for name in names if (value := getattr(text, name, None))), 1)

    experts = first("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return experts, min(experts, first("num_experts_per_tok", "moe_topk", "moe_k"))


def _blocks(model: TrainedModel, base: PreTrainedModel, quantizable: set[int]) -> tuple[Block, Block]:
    """The largest decoder layer, and what is outside of all, without the originals that PEFT keeps beside trained ones.

    Args:
        quantizable: ids of the parameters that 4-bit storage would shrink.
    """
    kinds = set(base._no_split_modules or ())  # by which FSDP and DeepSpeed find the layers too
    layers = [module for module in base.modules() if type(module).__name__ in kinds]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    left = {id(p): p for n, p in model.named_parameters() if ".original_module." not in n and id(p) not in inside}
    blocks = [_block(dict(_without_originals(layer)).values(), quantizable) for layer in layers]
    largest = max(blocks, key=lambda block: block.frozen + block.trained, default=Block())
    return largest, _block(left.values(), quantizable)


def _without_originals(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in module.named_parameters() if ".original_module." not in f".{n}")


def _block(parameters: Iterable[nn.Parameter], quantizable: set[int]) -> Block:
    every = list(parameters)
    return Block(
        frozen=sum(p.numel() for p in every if not p.requires_grad),
        trained=sum(p.numel() for p in every if p.requires_grad),
        quantizable=sum(p.numel() for p in every if not p.requires_grad and id(p) in quantizable),
    )


def _matrices(model: TrainedModel) -> int:
    """Trained elements outside of embeddings and norms; a head that is tied to embeddings is one of these."""
    others = [module for module in model.modules() if isinstance(module, nn.Embedding)] + norms(model)
    left_out = {id(parameter) for module in others for parameter in module.parameters(recurse=False)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sum(parameter.numel() for parameter in trained if id(parameter) not in left_out)
