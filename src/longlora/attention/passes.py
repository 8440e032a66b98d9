"""Forward passes of a model: which are sparse, and where documents begin in them.

Hooks around the decoder look at what each pass is given, decide once, and leave it to the masks of that pass.
Generation makes some masks ahead of a pass, without the hooks: `MasksForGeneration`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from itertools import takewhile
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from longlora.attention.sequence import SequenceCut, current_cut
from longlora.attention.settings import S2_ATTENTION
from longlora.errors import ModelError

_HOOKS = "longlora_hooks"
_MASKS = "create_masks_for_generate"  # transformers looks for a model's own under this name
_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


@dataclass(frozen=True)
class ForwardPass:
    """What a forward pass of the decoder is given, as far as attention is concerned."""

    sparse: bool | None = None
    """Decided for all layers, also where one is computed again in another mode; None: the pass went past the hooks."""
    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    """Document bounds of a batch of one row, as FlashAttention takes them."""
    seq_idx: Tensor | None = None
    """[B, T] the number of each token's document."""
    cut: SequenceCut | None = None
    """How the rows are cut across processes; None if they are whole."""


_UNWATCHED = ForwardPass()
_UNDER_WAY: ContextVar[tuple[tuple[nn.Module, ForwardPass], ...]] = ContextVar("longlora_passes", default=())
"""Decoders that are being called, one inside the other, each with its pass."""

AHEAD: ContextVar[str | None] = ContextVar("longlora_masks_ahead", default=None)
"""While `generate` makes masks ahead of a pass: the implementation of full attention they are for."""


def current_pass() -> ForwardPass:
    """The pass that now makes its masks, which keep it."""
    passes = _UNDER_WAY.get()
    return passes[-1][1] if passes else _UNWATCHED


def watch_passes(model: PreTrainedModel, full_attention: str, *, sparse_in_evaluation: bool) -> None:
    """Hook into the passes of `model`, in place of earlier hooks."""
    unwatch_passes(model)
    # Some models call their decoder past the base model (OPT), some make masks outside of it (Gemma 3).
    before = partial(_before_forward, sparse_in_evaluation)
    for module in {model.base_model, model.get_decoder()}:
        if isinstance(module, PreTrainedModel):  # one calls its output head the decoder (ModernBERT)
            handles = (
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(_after_forward, always_call=True),
            )
            setattr(module, _HOOKS, handles)
    own = getattr(model, _MASKS, create_masks_for_generate)
    vars(model)[_MASKS] = MasksForGeneration(own, full_attention)


def unwatch_passes(model: PreTrainedModel) -> None:
    """Undo `watch_passes`."""
    for module in model.modules():
        for handle in vars(module).pop(_HOOKS, ()):
            handle.remove()
    if isinstance(vars(model).get(_MASKS), MasksForGeneration):
        delattr(model, _MASKS)


class MasksForGeneration:
    """Makes the masks that `generate` wants ahead of a pass, for static caches: tensors, which a graph can take."""

    def __init__(self, make: Callable[..., Any], full_attention: str) -> None:
        self._make, self._full_attention = make, full_attention

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = AHEAD.set(self._full_attention)
        try:
            return self._make(*args, **kwargs)
        finally:
            AHEAD.reset(token)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before_forward(
    sparse_in_evaluation: bool, decoder: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Say what this pass is. With a KV cache transformers ignores packed documents, so sparse passes fill none."""
    if decoder.config.get_text_config(decoder=True)._attn_implementation != S2_ATTENTION:
        return args, kwargs  # somebody set another implementation: none of our business
    args, kwargs = _by_name(decoder, args, kwargs)
    sparse = _is_sparse(decoder, kwargs, sparse_in_evaluation)
    if sparse:
        _refuse_weights(decoder, kwargs)
        kwargs["use_cache"] = False
    known = ForwardPass(
        sparse, kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx"), current_cut()
    )
    _UNDER_WAY.set((*_around(decoder), (decoder, known)))
    return args, kwargs


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_forward(decoder: nn.Module, args: Any, output: Any) -> None:
    """What this pass was is not what a later one is that no hook saw."""
    _UNDER_WAY.set(_around(decoder))


def _around(decoder: nn.Module) -> tuple[tuple[nn.Module, ForwardPass], ...]:
    """The passes inside of which `decoder` is called; an earlier one of itself may have been interrupted."""
    return tuple(takewhile(lambda each: each[0] is not decoder, _UNDER_WAY.get()))


def _is_sparse(decoder: nn.Module, kwargs: dict[str, Any], sparse_in_evaluation: bool) -> bool:
    cached = kwargs.get("past_key_values") is not None
    if not decoder.training:
        return sparse_in_evaluation and not (cached or kwargs.get("use_cache") or _inside_generate())
    # A model in training mode that generates: somebody did not call ``model.eval()``. Nothing else is told apart by
    # gradients or caches: passes without gradients (log-probabilities of a policy) must compute what training does.
    if _inside_generate():
        return False
    if cached:
        raise ModelError(
            "past_key_values in training mode: S2-Attn takes no KV cache there; leave it out, or call model.eval()"
        )
    return True


def _by_name(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with positional arguments by name, so that none is overlooked."""
    names = _positional(type(decoder).forward)[: len(args)]
    if len(names) < len(args) or kwargs.keys() & names:
        return args, kwargs  # the call itself will say what is wrong with it
    return (), {**dict(zip(names, args, strict=True)), **kwargs}


@cache
def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments that the forward of a class takes by position."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)


def _refuse_weights(decoder: nn.Module, kwargs: dict[str, Any]) -> None:
    wanted = kwargs.get("output_attentions")
    if wanted if wanted is not None else getattr(decoder.config, "output_attentions", False):
        raise ModelError(
            "output_attentions=True: S2-Attn keeps no attention weights; leave it out, or ask in evaluation mode of a "
            "model with attn_implementation='eager'"
        )


def _inside_generate() -> bool:
    """Whether this is called by transformers' `generate`, which tells it to nobody."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not _GENERATE:
        frame = frame.f_back
    return frame is not None
