"""What `use_s2` refuses, each with one line: models, and values of its arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from longlora.attention.backends import Backend, choose_backend
from longlora.attention.layers import dispatching_forward, has_window
from longlora.errors import ModelError, UnsupportedModelError

# Layers of other kinds see chosen or compressed keys, and are refused.
_LAYER_TYPES = {
    "full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "hybrid", "hybrid_sliding",
}  # fmt: skip
# Arguments of an attention function that change nothing in what it computes, or say what the mask says as well.
_HARMLESS = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "max_length_k", "max_length_q",
    "mm_token_type_ids", "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_ids", "return_dict", "seq_idx", "sliding_window", "token_type_ids", "use_cache",
}  # fmt: skip
# Arguments with which transformers asks an attention function for something S2-Attn does not compute.
_UNSUPPORTED = {
    "position_bias": "a learned position bias",
    "indices": "sparse attention with learned indices",
    "block_indices": "sparse attention with learned indices",
    "sinks": "sinks of its own",
    "head_mask": "a head mask",
}


def transformers_model(model: nn.Module, *, compiled: bool = False) -> PreTrainedModel:
    """The transformers model that `model` is or, by PEFT, wraps.

    Args:
        compiled: take a compiled one as well. Its graphs know nothing of hooks that come later.
    """
    chain = list(_wrappers(model))
    inner = chain[-1]
    if not compiled and any(_is_compiled(each) for each in chain):
        raise ModelError("the model is compiled already: call longlora.use_s2 before torch.compile")
    if isinstance(inner, PreTrainedModel):
        return inner
    kind = type(model).__name__
    if isinstance(getattr(model, "module", None), nn.Module):
        raise ModelError(f"{kind} wraps the model: hand over model.module, or call longlora.use_s2 before wrapping")
    raise ModelError(
        f"{kind} is not a transformers model, nor PEFT's wrapper of one: hand over what from_pretrained returned"
    )


def _wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """`model` and what it wraps, down to the transformers model."""
    inner: Any = model
    while inner is not None:
        yield inner
        if "_orig_mod" in inner._modules:  # of torch.compile
            inner = inner._orig_mod
        else:
            inner = inner.get_base_model() if hasattr(type(inner), "get_base_model") else None


def _is_compiled(model: nn.Module) -> bool:
    return "_orig_mod" in model._modules or model._compiled_call_impl is not None


def require_supported(model: PreTrainedModel, decoder: PreTrainedModel, modules: list[nn.Module]) -> None:
    """Raise `UnsupportedModelError` for an architecture that S2-Attn cannot train, as far as can be known now."""
    config = decoder.config.get_text_config(decoder=True)
    kind = f"model type {config.model_type!r}"
    own_attention = "train it with attention.pattern=full"
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{kind} is an encoder and a decoder, and S2-Attn is for decoders alone; choose a causal language model"
        )
    if not modules or not decoder._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{kind} does not dispatch through transformers' AttentionInterface, so S2-Attn cannot be used; "
            "choose an architecture that does, or train with attention.pattern=full"
        )
    if getattr(config, "keep_window_size", None) is not None:  # Doge
        raise UnsupportedModelError(
            f"{kind} computes a mask from its values, which S2-Attn does not know; {own_attention}"
        )
    if unknown := sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES):
        raise UnsupportedModelError(
            f"{kind} has layers of kind {', '.join(unknown)}, which S2-Attn does not compute; {own_attention}"
        )
    if asked := sorted(
        {_UNSUPPORTED[name] for module in modules for name in _keywords(type(module)) & {*_UNSUPPORTED}}
    ):
        raise UnsupportedModelError(
            f"{kind} has {' and '.join(asked)}, which S2-Attn does not compute; {own_attention}"
        )
    if all(has_window(decoder, module) for module in modules):
        raise UnsupportedModelError(
            f"all layers of {kind} have a window ({getattr(config, 'sliding_window', None)} tokens) and keep it, so "
            f"S2-Attn would change nothing; {own_attention}"
        )


def _keywords(kind: type[nn.Module]) -> set[str]:
    """Names of arguments that an attention class's forward gives by keyword: tuples among the constants of its code."""
    forward = dispatching_forward(kind)
    constants = forward.__code__.co_consts if forward is not None else ()
    return {name for names in constants if isinstance(names, tuple) for name in names if isinstance(name, str)}


def require_computable(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise `ModelError` for arguments of an attention function that S2-Attn would have to ignore."""
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    kind = type(module).__name__
    asked = [meaning for name, meaning in _UNSUPPORTED.items() if name in given]
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        asked.append("attention to later tokens")
    if asked:
        raise ModelError(
            f"{kind} has {' and '.join(asked)}, which S2-Attn does not compute; train with the model's own attention, "
            "which longlora.use_full(model) brings back"
        )
    if unknown := sorted(given - _HARMLESS - {*_UNSUPPORTED}):
        raise ModelError(
            f"{kind} is given {', '.join(unknown)}, which S2-Attn does not know and would ignore; leave "
            f"{'it' if len(unknown) == 1 else 'them'} out of the model's inputs, or train with longlora.use_full(model)"
        )


def require_backend(backend: Backend) -> None:
    """Refuse a backend that this machine lacks; what depends on the tensors is known when they come."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choose_backend(backend, device, torch.bfloat16)


def require_whole_numbers(**values: Any) -> None:
    """Raise `ModelError` for a value that is not an integer; true and false are none."""
    for name, value in values.items():
        if not _is_whole(value):
            raise ModelError(f"{name}={value!r}: must be a whole number, as {name}=8")


def layer_choice(full: Any) -> list[int] | Literal["all"]:
    """The argument ``full_attention_layers`` as a list of numbers, or ``all``."""
    if isinstance(full, str) and full == "all":
        return "all"
    chosen: list[Any] = list(full) if isinstance(full, Iterable) and not isinstance(full, str | bytes) else [None]
    if not all(_is_whole(layer) for layer in chosen):
        raise ModelError(f"full_attention_layers={full!r}: give numbers of layers, as [0, 5], or 'all'")
    return [int(layer) for layer in chosen]


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
