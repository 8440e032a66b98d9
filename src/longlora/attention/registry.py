"""The seam to transformers: `use_s2` and `use_full` switch a model between sparse and full attention.

Registering here puts ``"s2_attn"`` into transformers' AttentionInterface (the attention function) and its
AttentionMaskInterface (the mask function). The mask function builds no mask: it hands the arguments on in a `LazyMask`,
from which sparse attention reads document bounds, O(T), and full attention asks for the ordinary mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longlora.attention.grouped import grouped_attention
from longlora.attention.pattern import S2Pattern
from longlora.attention.rolled import rolled_attention
from longlora.errors import ModelError

S2_ATTENTION = "s2_attn"
_SETTINGS = "longlora_s2"
_CACHE_HOOK = "longlora_cache_hook"
# Arguments with which transformers asks an attention function for something S2-Attn does not compute.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")
# Settings of a config that mean something S2-Attn does not compute, known before the first forward pass.
_UNSUPPORTED_CONFIG = {
    "attn_logit_softcapping": "soft-capped scores",
    "attention_chunk_size": "chunked attention layers",
}


@dataclass(frozen=True)
class S2Settings:
    """What `use_s2` leaves on each attention module."""

    pattern: S2Pattern
    full_attention: str
    """The implementation before `use_s2`: what evaluation uses and `use_full` brings back."""
    sparse_in_evaluation: bool = False
    wraparound: bool = False


def use_s2(
    model: nn.Module,
    *,
    group_size: int = 2048,
    sink_tokens: int = 4,
    sparse_in_evaluation: bool = False,
    wraparound: bool = False,
) -> None:
    """Train `model` with shifted sparse attention; evaluation and generation stay full attention.

    The sparse pattern acts while the model is in training mode (``model.train()``). The settings live on the model:
    two models in one process may differ, and a deep copy keeps them.

    Args:
        model: a transformers causal language model, or PEFT's wrapper of one.
        group_size: tokens in a group; even. Any sequence length works.
        sink_tokens: leading tokens of each document that all groups see; 0 is the paper's pattern.
        sparse_in_evaluation: use the sparse pattern in evaluation mode too, where no KV cache is filled.
        wraparound: the paper's Algorithm 1 instead, for comparison only: it LEAKS future tokens into the first half
            group, and needs lengths that are multiples of `group_size` and one unpadded document a row.

    Raises:
        ModelError: a value is out of range, the architecture does not dispatch through AttentionInterface, or it needs
            something that S2-Attn does not compute (soft-capped scores, chunked layers).
    """
    pattern = S2Pattern(group_size=group_size, sink_tokens=sink_tokens)
    if wraparound and sink_tokens:
        raise ModelError(f"wraparound with sink_tokens={sink_tokens}: the paper has none, set sink_tokens=0")
    base = _transformers_model(model)
    modules = _attention_modules(base)
    if not modules or not base._can_set_attn_implementation() or not base._supports_attention_backend:
        raise ModelError(
            f"model type {base.config.model_type!r} does not dispatch through transformers' AttentionInterface, "
            "so S2-Attn cannot be used; choose an architecture that does, or train with attention.pattern=full"
        )
    config = base.config.get_text_config(decoder=True)
    for setting, meaning in _UNSUPPORTED_CONFIG.items():
        if getattr(config, setting, None) is not None:
            raise ModelError(
                f"model type {config.model_type!r} has {meaning} ({setting}={getattr(config, setting)}), which S2-Attn "
                "does not compute; train it with attention.pattern=full"
            )
    full_attention = _full_attention(base, modules)
    if full_attention == "eager" and not getattr(base, "_supports_sdpa", True):
        raise ModelError(
            f"model type {config.model_type!r} computes attention in a way that only its own eager code knows; "
            "train it with attention.pattern=full"
        )
    if _all_layers_have_a_window(config):
        raise ModelError(
            f"all layers of model type {config.model_type!r} have a sliding window ({config.sliding_window}) and "
            "keep it, so S2-Attn would change nothing; train it with attention.pattern=full"
        )
    AttentionInterface.register(S2_ATTENTION, s2_attention_forward)
    AttentionMaskInterface.register(S2_ATTENTION, lazy_mask)
    for module in modules:
        setattr(module, _SETTINGS, S2Settings(pattern, full_attention, sparse_in_evaluation, wraparound))
    base.set_attn_implementation(S2_ATTENTION)
    decoder = base.base_model
    if not hasattr(decoder, _CACHE_HOOK):
        setattr(decoder, _CACHE_HOOK, decoder.register_forward_pre_hook(_no_cache_in_training, with_kwargs=True))


def use_full(model: nn.Module) -> None:
    """Undo `use_s2`: the attention from before, in training as well. Does nothing to a model that is not sparse."""
    base = _transformers_model(model)
    modules = _attention_modules(base)
    if base.config._attn_implementation == S2_ATTENTION:
        base.set_attn_implementation(_full_attention(base, modules))
    for module in modules:
        if hasattr(module, _SETTINGS):
            delattr(module, _SETTINGS)
    decoder = base.base_model
    if hasattr(decoder, _CACHE_HOOK):
        getattr(decoder, _CACHE_HOOK).remove()
        delattr(decoder, _CACHE_HOOK)


def is_sparse(model: nn.Module) -> bool:
    """Whether a forward pass of `model` in its present mode would use the sparse pattern."""
    base = _transformers_model(model)
    if base.config._attn_implementation != S2_ATTENTION:
        return False
    settings = [getattr(module, _SETTINGS) for module in _attention_modules(base) if hasattr(module, _SETTINGS)]
    return base.training or any(each.sparse_in_evaluation for each in settings)


class LazyMask:
    """What the mask function returns: enough to derive document bounds or, where asked, an ordinary mask."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._full: dict[str, Any] = {}

    def full_for(self, implementation: str) -> Any:
        """The mask that transformers makes for this implementation; None means plain causal. Kept for other layers."""
        if implementation not in self._full:
            self._full[implementation] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self._arguments)
        return self._full[implementation]

    @cached_property
    def bounds_B(self) -> list[list[int]]:
        """Document bounds of each row, from 0 to the end of its last document; what follows is padding.

        transformers says which tokens belong together only through a function of (batch, head, query, key). Asking it
        about neighbours gives the bounds of packed documents in O(T), for every architecture.
        """
        arguments = self._arguments
        B, T, device = arguments["batch_size"], arguments["q_length"], arguments["device"]
        if arguments["kv_length"] != T:
            raise ModelError(
                f"{arguments['kv_length']} keys for {T} queries: S2-Attn in training takes no KV cache; "
                "pass no past_key_values, or call model.eval()"
            )
        later = torch.arange(1, T, device=device)[None]
        rows = torch.arange(B, device=device)[:, None]
        together = arguments["mask_function"](rows, torch.zeros_like(rows), later, later - 1).expand(B, T - 1)
        lengths = _lengths(arguments.get("attention_mask"), B, T)
        cuts_B: list[list[int]] = [[] for _ in range(B)]
        for row, position in (~together).nonzero().tolist():
            cuts_B[row].append(position + 1)
        return [
            [0, *(cut for cut in cuts if cut < length), length] if length else [0]
            for cuts, length in zip(cuts_B, lengths, strict=True)
        ]


def lazy_mask(**arguments: Any) -> LazyMask:
    """The mask function registered with transformers."""
    return LazyMask(arguments)


def s2_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers; q [B, H, T, D], k and v [B, K, T, D] -> [B, T, H, D].

    Raises:
        ModelError: the module was not prepared by `use_s2`, or asks for something S2-Attn does not compute.
    """
    settings: S2Settings | None = getattr(module, _SETTINGS, None)
    if settings is None:
        raise ModelError(f"{type(module).__name__} has no S2-Attn settings: call longlora.use_s2(model) first")
    sparse = module.training or (settings.sparse_in_evaluation and query.shape[2] == key.shape[2])
    if not sparse or sliding_window is not None:
        # A layer with a sliding window is local already: it keeps its own pattern in training as well.
        # "eager" is a function of each architecture's own file and has no key: its equal here is sdpa.
        implementation = "sdpa" if settings.full_attention == "eager" else settings.full_attention
        mask = attention_mask.full_for(implementation) if isinstance(attention_mask, LazyMask) else attention_mask
        full = ALL_ATTENTION_FUNCTIONS[implementation]
        output, _ = full(
            module, query, key, value, mask, scaling=scaling, dropout=dropout, sliding_window=sliding_window, **kwargs
        )
        return output, None
    if not isinstance(attention_mask, LazyMask):
        raise ModelError(
            "S2-Attn got a ready-made attention mask of type "
            f"{type(attention_mask).__name__}: pass a 2-D padding mask or position_ids instead"
        )
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked:
        raise ModelError(f"{type(module).__name__} needs {', '.join(asked)}, which S2-Attn does not compute")
    if settings.wraparound:
        _require_plain(attention_mask.bounds_B, query.shape[2])
        return rolled_attention(query, key, value, settings.pattern.group_size, scaling), None
    output = grouped_attention(query, key, value, attention_mask.bounds_B, settings.pattern, scaling, dropout)
    return output, None


def _lengths(padding_mask: Tensor | None, batch: int, tokens: int) -> list[int]:
    """Tokens before the right padding of each row."""
    if padding_mask is None:
        return [tokens] * batch
    lengths = padding_mask.sum(-1)
    expected = torch.arange(tokens, device=padding_mask.device)[None] < lengths[:, None]
    if not torch.equal(expected, padding_mask.bool()):
        raise ModelError("attention_mask has padding before or between tokens: S2-Attn in training pads on the right")
    return [int(length) for length in lengths.tolist()]


def _require_plain(bounds_B: list[list[int]], tokens: int) -> None:
    if any(bounds != [0, tokens] for bounds in bounds_B):
        raise ModelError("wraparound takes one unpadded document a row; turn it off for packed or padded batches")


def _no_cache_in_training(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """With a KV cache transformers ignores packed documents; training has no use for one."""
    if decoder.training:
        if kwargs.get("past_key_values") is not None:
            raise ModelError("past_key_values in training: S2-Attn takes no KV cache there, or call model.eval()")
        kwargs["use_cache"] = False
    return args, kwargs


def _all_layers_have_a_window(config: Any) -> bool:
    if getattr(config, "sliding_window", None) is None:
        return False
    layer_types = getattr(config, "layer_types", None)
    return layer_types is None or all(kind == "sliding_attention" for kind in layer_types)


def _full_attention(model: PreTrainedModel, modules: list[nn.Module]) -> str:
    """The full-attention implementation that `model` has, or had before `use_s2`."""
    if model.config._attn_implementation != S2_ATTENTION:
        return str(model.config._attn_implementation)
    return next((getattr(m, _SETTINGS).full_attention for m in modules if hasattr(m, _SETTINGS)), "sdpa")


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = unwrap() if unwrap is not None else model
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is not a transformers model, nor PEFT's wrapper of one")
    return inner


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("Attention")]
