"""The seam to transformers: `use_s2` and `use_full` switch a model between sparse and full attention.

Registering here puts ``"s2_attn"`` into transformers' AttentionInterface (the attention function) and its
AttentionMaskInterface (the mask function, `lazy_mask.py`, which builds no mask but hands on what is known of one).
A hook (`passes.py`) tells training from generation; `support.py` refuses what cannot be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from longlora.attention.backends import Backend, attend
from longlora.attention.full import full_attention_forward
from longlora.attention.layers import (
    Shift,
    attention_modules,
    describe_layers,
    has_window,
    hides_nothing,
    layer_numbers,
    layer_patterns,
    text_decoder,
)
from longlora.attention.lazy_mask import LazyMask, lazy_mask
from longlora.attention.passes import current_pass, unwatch_passes, watch_passes
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern
from longlora.attention.rolled import rolled_attention
from longlora.attention.sequence import attend_across, current_cut
from longlora.attention.settings import S2_ATTENTION, SETTINGS, S2Settings, settings_of, usual_attention
from longlora.attention.support import (
    layer_choice,
    require_backend,
    require_computable,
    require_supported,
    require_whole_numbers,
    transformers_model,
)
from longlora.errors import ModelError

__all__ = [
    "S2_ATTENTION",
    "describe_attention",
    "is_sparse",
    "register",
    "s2_attention_forward",
    "settings_of",
    "use_full",
    "use_s2",
]


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

    The sparse pattern acts while the model is in training mode (``model.train()``), also in passes without gradients;
    in ``model.generate(...)`` attention is full in any mode. Sparse passes fill no KV cache, ``use_cache=True`` or not,
    and refuse one that is given. The settings live on the model: two models in one process may differ, and a deep copy
    keeps them. Layers with a sliding or chunked window keep it, and so do the vision and audio towers of models of
    several modalities.

    A document begins where ``position_ids`` restart, ``seq_idx`` changes or ``cu_seq_lens_q`` says so. Positions that
    skip ahead (0, 1, 2, 100, as in PoSE) begin one as well if there is no ``attention_mask``, because transformers
    takes them for packed documents with any attention; beside an ``attention_mask`` they do not.

    Call this before ``torch.compile``; attention then runs between the compiled graphs of each layer.

    Args:
        model: a transformers causal language model, or PEFT's wrapper of one.
        group_size: tokens in a group; even. Any sequence length works.
        sink_tokens: leading tokens of each document that all groups see; 0 is the paper's pattern.
        shift: ``heads`` shifts groups by half in the second half of the heads of each layer (the paper); ``layers`` in
            all heads of every other layer (paper, table 6); ``none`` never.
        full_attention_layers: numbers of decoder layers, from 0, that are trained with full attention; or ``all``.
        backend: ``grouped`` (any device), ``varlen`` or ``flex`` (CUDA); ``auto`` chooses and logs its choice.
        sparse_in_evaluation: use the sparse pattern in evaluation mode too. Passes that fill a KV cache
            (``use_cache=True``, ``past_key_values``) are full attention all the same; others then fill none.
        wraparound: the paper's Algorithm 1 instead, for comparison only: it LEAKS future tokens into the first half
            group, and needs lengths that are multiples of `group_size` and one unpadded document a row.

    Raises:
        ModelError: a value is out of range, the architecture does not dispatch through AttentionInterface, or it needs
            something that S2-Attn does not compute.
    """
    require_whole_numbers(group_size=group_size, sink_tokens=sink_tokens)
    chosen = layer_choice(full_attention_layers)
    pattern = S2Pattern(group_size, sink_tokens)
    if wraparound and (sink_tokens or shift != "heads" or chosen):
        raise ModelError(
            f"wraparound with sink_tokens={sink_tokens}, shift={shift} and "
            f"full_attention_layers={chosen or None}: the paper's Algorithm 1 has none of them, "
            "set sink_tokens=0, shift=heads and no such layers"
        )
    base = transformers_model(model)
    decoder, modules = text_decoder(base), attention_modules(base)
    require_supported(base, decoder, modules)
    require_backend(backend)
    full_attention = _full_attention(decoder, modules)
    patterns = layer_patterns(decoder, modules, pattern, shift, chosen)
    register()
    for module, own in zip(modules, patterns, strict=True):
        setattr(module, SETTINGS, S2Settings(own, full_attention, backend, sparse_in_evaluation, wraparound))
    decoder.set_attn_implementation(S2_ATTENTION)
    watch_passes(base, full_attention, sparse_in_evaluation=sparse_in_evaluation)


def register() -> None:
    """Make the attention known to transformers in this process, for all models; only those of `use_s2` have it."""
    AttentionInterface.register(S2_ATTENTION, s2_attention_forward)
    AttentionMaskInterface.register(S2_ATTENTION, lazy_mask)


def use_full(model: nn.Module) -> None:
    """Undo `use_s2`: the attention from before, in training as well. Does nothing to a model that is not sparse."""
    base = transformers_model(model)
    decoder, modules = text_decoder(base), attention_modules(base)
    if decoder.config._attn_implementation == S2_ATTENTION:
        decoder.set_attn_implementation(_full_attention(decoder, modules))
    for module in modules:
        vars(module).pop(SETTINGS, None)
    unwatch_passes(base)


def is_sparse(model: nn.Module) -> bool:
    """Whether a forward pass of `model` in its present mode would use the sparse pattern."""
    decoder = text_decoder(transformers_model(model, compiled=True))
    if decoder.config._attn_implementation != S2_ATTENTION:
        return False
    settings = [getattr(module, SETTINGS) for module in attention_modules(decoder) if hasattr(module, SETTINGS)]
    return decoder.training or any(each.sparse_in_evaluation for each in settings)


def describe_attention(model: nn.Module) -> str:
    """One line for a person: what attention does in training in each layer.

    Which backend computes it depends on the tensors that reach it (autocast, soft caps): it is logged when they do.
    """
    decoder = text_decoder(transformers_model(model, compiled=True))
    modules = attention_modules(decoder)
    settings = [getattr(module, SETTINGS) for module in modules if hasattr(module, SETTINGS)]
    if decoder.config._attn_implementation != S2_ATTENTION or not settings:
        return f"full in all layers ({decoder.config._attn_implementation})"
    windows = [has_window(decoder, module) for module in modules]
    return describe_layers(layer_numbers(modules), windows, [own.pattern for own in settings])


# Its document bounds are Python integers, of which each value would be a graph of its own.
@torch.compiler.disable  # type: ignore[untyped-decorator]
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
    # `generate` with a static cache hands over tensors; those of other passes know which pass they were made for.
    sparse = attention_mask.sparse if isinstance(attention_mask, LazyMask) else current_pass().sparse
    if sparse is None and (module.training or settings.sparse_in_evaluation):
        raise ModelError(
            f"{type(module).__name__} was reached past the hooks of its decoder, so S2-Attn does not know what the "
            "pass is: call model(...), not model.forward(...)"
        )
    cut = attention_mask.cut if isinstance(attention_mask, LazyMask) else current_cut()
    if not sparse and cut is None:
        own = {name: value for name, value in (("softcap", softcap), ("s_aux", s_aux)) if value is not None}
        return full_attention_forward(
            settings.full_attention, module, query, key, value, attention_mask, scaling=scaling, dropout=dropout,
            **own, **kwargs,
        )  # fmt: skip
    if not isinstance(attention_mask, LazyMask):
        raise ModelError(
            "S2-Attn got a ready-made attention mask of type "
            f"{type(attention_mask).__name__}: pass a 2-D padding mask or position_ids instead"
        )
    require_computable(module, kwargs)
    window = attention_mask.window
    if window is not None and hides_nothing(window, module.config, tokens=cut.longest if cut else query.shape[2]):
        window = None
    own_pattern = settings.pattern if sparse else FULL
    pattern: Pattern = own_pattern if window is None else WindowPattern(window)
    if settings.wraparound and window is None:
        _require_plain(attention_mask, query.shape[2], dropout, softcap, s_aux)
        return rolled_attention(query, key, value, settings.pattern.group_size, scaling), None
    options: dict[str, Any] = {
        "backend": settings.backend, "scaling": scaling, "dropout": dropout, "softcap": softcap,
        "sink_logits_H": s_aux, "plans": attention_mask.plans, "full_attention": settings.full_attention,
    }  # fmt: skip
    if cut is not None:
        return attend_across(query, key, value, cut, pattern, **options), None
    return attend(query, key, value, attention_mask.bounds_B, pattern, **options), None


def _require_plain(mask: LazyMask, tokens: int, dropout: float, softcap: float | None, s_aux: Tensor | None) -> None:
    if mask.cut is not None:
        raise ModelError("wraparound takes whole rows, and these are cut across processes: turn it off")
    if any(bounds != [0, tokens] for bounds in mask.bounds_B):
        raise ModelError("wraparound takes one unpadded document a row; turn it off for packed or padded batches")
    if dropout:
        raise ModelError(
            f"wraparound computes no attention dropout, and this is {dropout:g}; set attention_dropout=0 in the "
            "model's config, or turn wraparound off"
        )
    if softcap is not None or s_aux is not None:
        raise ModelError("wraparound computes no soft-capped scores and no learned sinks; turn it off for this model")


def _full_attention(decoder: PreTrainedModel, modules: list[nn.Module]) -> str:
    """The full-attention implementation that `decoder` has, or had before `use_s2`."""
    if decoder.config._attn_implementation != S2_ATTENTION:
        return str(decoder.config._attn_implementation)
    before = (getattr(module, SETTINGS).full_attention for module in modules if hasattr(module, SETTINGS))
    return next(before, usual_attention(type(modules[0])))
