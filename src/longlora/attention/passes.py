"""Forward passes of a model: which are full attention whatever the model's mode, and where documents begin in them.

A hook in front of the decoder looks at what each pass is given and leaves it to the masks of that pass. Generation
makes some masks ahead of a pass, without the hook: `MasksForGeneration`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from longlora.errors import ModelError

_HOOK = "longlora_hook"
_MASKS = "create_masks_for_generate"  # transformers looks for a model's own under this name
_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__


@dataclass(frozen=True)
class ForwardPass:
    """What a forward pass of the decoder is given, as far as attention is concerned."""

    full: bool = False
    """Full attention, in training mode or with `sparse_in_evaluation` too."""
    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    """Document bounds of a batch of one row, as FlashAttention takes them."""
    seq_idx: Tensor | None = None
    """[B, T] the number of each token's document."""


_UNWATCHED = ForwardPass()
CURRENT: ContextVar[ForwardPass] = ContextVar("longlora_forward_pass", default=_UNWATCHED)
"""The pass that now makes its masks, which keep it."""

AHEAD: ContextVar[str | None] = ContextVar("longlora_masks_ahead", default=None)
"""While `generate` makes masks ahead of a pass: the implementation of full attention they are for."""


def watch_passes(model: PreTrainedModel, full_attention: str, *, sparse_in_evaluation: bool) -> None:
    """Hook into the passes of `model`, in place of earlier hooks."""
    unwatch_passes(model)
    # Some models call their decoder past the base model (OPT), some make masks outside of it (Gemma 3).
    hook = partial(_before_forward, sparse_in_evaluation)
    for module in {model.base_model, model.get_decoder()}:
        if isinstance(module, PreTrainedModel):  # one calls its output head the decoder (ModernBERT)
            setattr(module, _HOOK, module.register_forward_pre_hook(hook, with_kwargs=True))
    own = getattr(model, _MASKS, create_masks_for_generate)
    vars(model)[_MASKS] = MasksForGeneration(own, full_attention)


def unwatch_passes(model: PreTrainedModel) -> None:
    """Undo `watch_passes`."""
    for module in model.modules():
        if (handle := vars(module).pop(_HOOK, None)) is not None:
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
    sparse_in_evaluation: bool, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Say what this pass is. With a KV cache transformers ignores packed documents, so sparse passes fill none."""
    cached = kwargs.get("past_key_values") is not None
    if decoder.training:
        # A model in training mode that generates: somebody did not call ``model.eval()``. Not by the gradients alone,
        # because other passes without them (log-probabilities of a policy) must compute what training computes.
        full = not torch.is_grad_enabled() and (cached or _inside_generate())
        if cached and not full:
            raise ModelError("past_key_values in training: S2-Attn takes no KV cache there, or call model.eval()")
    else:
        full = not sparse_in_evaluation or cached or bool(kwargs.get("use_cache")) or _inside_generate()
    if not full:
        _refuse_weights(decoder, kwargs)
        kwargs["use_cache"] = False
    CURRENT.set(ForwardPass(full, kwargs.get("position_ids"), kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")))
    return args, kwargs


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
