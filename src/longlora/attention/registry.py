"""The seam to transformers: `use_s2` and `use_full` switch a model between sparse and full attention.

Registering here puts ``"s2_attn"`` into transformers' AttentionInterface (the attention function) and its
AttentionMaskInterface (the mask function, `lazy_mask.py`, which builds no mask but hands on what is known of one).
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from longlora.attention.backends import Backend, attend, choose_backend
from longlora.attention.layers import Shift, attention_modules, describe_layers, has_window, layer_patterns
from longlora.attention.lazy_mask import GENERATING, LazyMask, lazy_mask
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern
from longlora.attention.rolled import rolled_attention
from longlora.errors import ModelError, UnsupportedModelError

S2_ATTENTION = "s2_attn"
_SETTINGS = "longlora_s2"
_CACHE_HOOK = "longlora_cache_hook"
# Layers of other kinds see chosen or compressed keys, and are refused.
_LAYER_TYPES = {
    "full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv", "hybrid", "hybrid_sliding",
}  # fmt: skip
# Arguments with which transformers asks an attention function for something S2-Attn does not compute.
_UNSUPPORTED = {
    "position_bias": "a learned position bias",
    "indices": "sparse attention with learned indices",
    "block_indices": "sparse attention with learned indices",
    "sinks": "sinks of its own",
    "head_mask": "a head mask",
}


@dataclass(frozen=True)
class S2Settings:
    """What `use_s2` leaves on each attention module."""

    pattern: S2Pattern
    """Of this layer in training, unless the layer has a window of its own."""
    full_attention: str
    """The implementation before `use_s2`: what evaluation uses and `use_full` brings back."""
    backend: Backend
    sparse_in_evaluation: bool
    wraparound: bool


def use_s2(
    model: nn.Module,
    *,
    group_size: int = 2048,
    sink_tokens: int = 4,
    shift: Shift = "heads",
    full_attention_layers: Sequence[int] | Literal["all"] = (),
    backend: Backend = "auto",
    sparse_in_evaluation: bool = False,
    wraparound: bool = False,
) -> None:
    """Train `model` with shifted sparse attention; evaluation and generation stay full attention.

    The sparse pattern acts while the model is in training mode (``model.train()``). The settings live on the model:
    two models in one process may differ, and a deep copy keeps them. Layers with a sliding or chunked window keep it.

    Args:
        model: a transformers causal language model, or PEFT's wrapper of one.
        group_size: tokens in a group; even. Any sequence length works.
        sink_tokens: leading tokens of each document that all groups see; 0 is the paper's pattern.
        shift: ``heads`` shifts groups by half in the second half of the heads of each layer (the paper); ``layers`` in
            all heads of every other layer (paper, table 6); ``none`` never.
        full_attention_layers: numbers of attention layers, from 0, that are trained with full attention; or ``all``.
        backend: ``grouped`` (any device), ``varlen`` or ``flex`` (CUDA); ``auto`` chooses and logs its choice.
        sparse_in_evaluation: use the sparse pattern in evaluation mode too, where no KV cache is filled.
        wraparound: the paper's Algorithm 1 instead, for comparison only: it LEAKS future tokens into the first half
            group, and needs lengths that are multiples of `group_size` and one unpadded document a row.

    Raises:
        ModelError: a value is out of range, the architecture does not dispatch through AttentionInterface, or it needs
            something that S2-Attn does not compute.
    """
    pattern = S2Pattern(group_size, sink_tokens)
    if wraparound and (sink_tokens or shift != "heads" or full_attention_layers):
        raise ModelError(
            f"wraparound with sink_tokens={sink_tokens}, shift={shift} and "
            f"full_attention_layers={full_attention_layers or None}: the paper's Algorithm 1 has none of them, "
            "set sink_tokens=0, shift=heads and no such layers"
        )
    base = _transformers_model(model)
    modules = attention_modules(base)
    _require_supported(base, modules)
    _require_backend(backend)
    full_attention = _full_attention(base, modules)
    patterns = layer_patterns(base, modules, pattern, shift, full_attention_layers)
    AttentionInterface.register(S2_ATTENTION, s2_attention_forward)
    AttentionMaskInterface.register(S2_ATTENTION, lazy_mask)
    for module, own in zip(modules, patterns, strict=True):
        setattr(module, _SETTINGS, S2Settings(own, full_attention, backend, sparse_in_evaluation, wraparound))
    base.set_attn_implementation(S2_ATTENTION)
    decoder = base.base_model
    if not hasattr(decoder, _CACHE_HOOK):
        setattr(decoder, _CACHE_HOOK, decoder.register_forward_pre_hook(_no_cache_in_training, with_kwargs=True))


def use_full(model: nn.Module) -> None:
    """Undo `use_s2`: the attention from before, in training as well. Does nothing to a model that is not sparse."""
    base = _transformers_model(model)
    modules = attention_modules(base)
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
    settings = [getattr(module, _SETTINGS) for module in attention_modules(base) if hasattr(module, _SETTINGS)]
    return base.training or any(each.sparse_in_evaluation for each in settings)


def s2_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered with transformers; q [B, H, T, D], k and v [B, K, T, D] -> [B, T, H, D].

    Args:
        attention_mask: what `lazy_mask` made; its window, not the argument ``sliding_window``, is what counts, because
            some models pass that argument on layers without a window.
        s_aux: learned sinks, one logit for each head.

    Raises:
        ModelError: the module was not prepared by `use_s2`, or asks for something S2-Attn does not compute.
    """
    settings = settings_of(module)
    generating = isinstance(attention_mask, LazyMask) and attention_mask.generating
    in_training = module.training and not generating
    if not in_training and not (settings.sparse_in_evaluation and query.shape[2] == key.shape[2]):
        own = {name: value for name, value in (("softcap", softcap), ("s_aux", s_aux)) if value is not None}
        return _full_attention_forward(
            settings, module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **own, **kwargs
        )
    if not isinstance(attention_mask, LazyMask):
        raise ModelError(
            "S2-Attn got a ready-made attention mask of type "
            f"{type(attention_mask).__name__}: pass a 2-D padding mask or position_ids instead"
        )
    _require_computable(module, kwargs)
    attention_mask.learn_positions(kwargs.get("position_ids"))
    window = attention_mask.window
    if window is not None and window >= getattr(module.config, "max_position_embeddings", window + 1):
        window = None  # hides nothing: see `has_window`
    pattern: Pattern = settings.pattern if window is None else WindowPattern(window)
    if settings.wraparound and window is None:
        _require_plain(attention_mask.bounds_B, query.shape[2], softcap, s_aux)
        return rolled_attention(query, key, value, settings.pattern.group_size, scaling), None
    output = attend(
        query, key, value, attention_mask.bounds_B, pattern, backend=settings.backend, scaling=scaling,
        dropout=dropout, softcap=softcap, sink_logits_H=s_aux, plans=attention_mask.plans,
    )  # fmt: skip
    return output, None


def _full_attention_forward(
    settings: S2Settings, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What the model would compute without `use_s2`."""
    implementation = settings.full_attention
    if isinstance(mask, LazyMask):
        mask = mask.full_for(implementation)
    if implementation == "eager":  # each architecture has its own, in its own file, under no key
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[implementation]
    return function(_Named(module, implementation), query, key, value, mask, **kwargs)  # type: ignore[no-any-return]


class _Named:
    """A module whose config names its full attention: flash functions look there for the kernel they shall load.

    The config itself is shared by all layers, and by all threads of a server, so it is never changed for a call.
    """

    def __init__(self, module: nn.Module, implementation: str) -> None:
        self._module = module
        self.config = copy.copy(module.config)
        vars(self.config)["_attn_implementation_internal"] = implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _require_computable(module: nn.Module, kwargs: dict[str, Any]) -> None:
    asked = [meaning for name, meaning in _UNSUPPORTED.items() if kwargs.get(name) is not None]
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        asked.append("attention to later tokens")
    if asked:
        raise ModelError(
            f"{type(module).__name__} has {' and '.join(asked)}, which S2-Attn does not compute; "
            "train this model with attention.pattern=full"
        )


def _require_plain(bounds_B: list[list[int]], tokens: int, softcap: float | None, s_aux: Tensor | None) -> None:
    if any(bounds != [0, tokens] for bounds in bounds_B):
        raise ModelError("wraparound takes one unpadded document a row; turn it off for packed or padded batches")
    if softcap is not None or s_aux is not None:
        raise ModelError("wraparound computes no soft-capped scores and no learned sinks; turn it off for this model")


def _no_cache_in_training(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """With a KV cache transformers ignores packed documents; training has no use for one.

    A cache without gradients is generation, by somebody who did not call ``model.eval()``: full attention as ever.
    """
    cached = kwargs.get("past_key_values") is not None
    generating = decoder.training and cached and not torch.is_grad_enabled()
    GENERATING.set(generating)  # for the masks of this forward pass, which keep it
    if decoder.training and not generating:
        if cached:
            raise ModelError("past_key_values in training: S2-Attn takes no KV cache there, or call model.eval()")
        kwargs["use_cache"] = False
    return args, kwargs


def _require_supported(model: PreTrainedModel, modules: list[nn.Module]) -> None:
    config = model.config.get_text_config(decoder=True)
    kind = f"model type {config.model_type!r}"
    if not modules or not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{kind} does not dispatch through transformers' AttentionInterface, so S2-Attn cannot be used; "
            "choose an architecture that does, or train with attention.pattern=full"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{kind} is an encoder and a decoder, and S2-Attn is for decoders alone")
    if getattr(config, "keep_window_size", None) is not None:  # Doge
        raise UnsupportedModelError(
            f"{kind} computes a mask from its values, which S2-Attn does not know; train it with attention.pattern=full"
        )
    if unknown := sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES):
        raise UnsupportedModelError(
            f"{kind} has layers of kind {', '.join(unknown)}, which S2-Attn does not compute; "
            "train it with attention.pattern=full"
        )
    if all(has_window(model, module) for module in modules):
        raise UnsupportedModelError(
            f"all layers of {kind} have a window ({getattr(config, 'sliding_window', None)} tokens) and keep it, so "
            "S2-Attn would change nothing; train it with attention.pattern=full"
        )


def _require_backend(backend: Backend) -> None:
    """Refuse a backend that this machine lacks; what depends on the tensors is known when they come."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choose_backend(backend, device, torch.bfloat16)


def settings_of(module: nn.Module) -> S2Settings:
    """What `use_s2` left on an attention module; `ModelError` in training if it did not."""
    settings: S2Settings | None = getattr(module, _SETTINGS, None)
    if settings is not None:
        return settings
    if not module.training:  # a fresh model of a config that says s2_attn, as trainers make for reference
        own = "sdpa" if _supports_sdpa(type(module)) else "eager"
        return S2Settings(FULL, own, "auto", sparse_in_evaluation=False, wraparound=False)
    raise ModelError(f"{type(module).__name__} has no S2-Attn settings: call longlora.use_s2(model) first")


def _supports_sdpa(kind: type[nn.Module]) -> bool:
    """Whether the models of an attention class's own file can use scaled_dot_product_attention."""
    models = [value for value in vars(sys.modules[kind.__module__]).values() if inspect.isclass(value)]
    return all(getattr(model, "_supports_sdpa", True) for model in models if issubclass(model, PreTrainedModel))


def describe_attention(model: nn.Module) -> str:
    """One line for a person: what attention does in training in each layer, and which backend computes it."""
    base = _transformers_model(model)
    modules = attention_modules(base)
    settings = [getattr(module, _SETTINGS) for module in modules if hasattr(module, _SETTINGS)]
    if base.config._attn_implementation != S2_ATTENTION or not settings:
        return f"full in all layers ({base.config._attn_implementation})"
    weight = next(base.parameters())
    backend = choose_backend(settings[0].backend, weight.device, weight.dtype)
    windows = [has_window(base, module) for module in modules]
    return f"{describe_layers(windows, [own.pattern for own in settings])}; backend {backend}"


def _full_attention(model: PreTrainedModel, modules: list[nn.Module]) -> str:
    """The full-attention implementation that `model` has, or had before `use_s2`."""
    if model.config._attn_implementation != S2_ATTENTION:
        return str(model.config._attn_implementation)
    return next((getattr(m, _SETTINGS).full_attention for m in modules if hasattr(m, _SETTINGS)), "sdpa")


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    unwrap: Any = getattr(model, "get_base_model", None)
    inner = unwrap() if unwrap is not None else model
    if hasattr(inner, "_orig_mod"):
        raise ModelError("the model is compiled already: call longlora.use_s2 before torch.compile")
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(f"{type(model).__name__} is not a transformers model, nor PEFT's wrapper of one")
    return inner
