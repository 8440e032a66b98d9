"""The output head of a causal language model as a function of hidden states, so that logits can be made in chunks."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longlora.errors import ModelError

_HALF = {torch.bfloat16, torch.float16}


class OutputHead(nn.Module):
    """Hidden states [t, C] -> logits [t, V], with the scaling and soft cap that some architectures apply after it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        config = model.config.get_text_config(decoder=True)
        self.projection = model.get_output_embeddings()
        # Cohere multiplies, Granite divides; Gemma caps.
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.projection(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


@torch.no_grad()
def output_head(model: PreTrainedModel, dtype: torch.dtype | None = None) -> OutputHead:
    """The head of `model`, after checking on a few tokens that it gives the model's own logits.

    Args:
        dtype: what `model` computes in, as `mixed_precision` takes it.

    Raises:
        ModelError: the architecture does something else between hidden states and logits.
    """
    head = OutputHead(model)
    was_training = model.training
    model.eval()
    try:
        vocabulary = model.get_input_embeddings().weight.shape[0]
        tokens = (torch.arange(8, device=model.device) * 7919 % vocabulary)[None]
        with mixed_precision(model, dtype):
            expected = model(input_ids=tokens, use_cache=False).logits.float()
            made = head(hidden_states(model, tokens)).float()
    finally:
        model.train(was_training)
    if not expected.isfinite().all():
        raise ModelError(
            f"{model.name_or_path or type(model).__name__} computes logits that are not finite: its weights are "
            "damaged or its training diverged; restore them or train again"
        )
    if not torch.allclose(made, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()):
        raise ModelError(
            f"{type(model).__name__} changes its hidden states before the logits in a way longlora does not know "
            f"(difference {(made - expected).abs().max():.3g}); please report the model type"
        )
    return head


def mixed_precision(model: nn.Module, dtype: torch.dtype | None = None) -> contextlib.AbstractContextManager[object]:
    """Autocast for a model that computes in 16 bits and whose trained weights are in float32; else nothing.

    Without it the float32 output of a trained norm meets the 16-bit weights of the next frozen layer and raises.

    Args:
        dtype: what it computes in; None means that of its 16-bit weights, if it has any.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    computed = dtype or next(iter(dtypes & _HALF), torch.float32)
    if computed not in _HALF or dtypes == {computed}:
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=computed)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Last hidden states [B, T, C] without logits and without a KV cache."""
    output = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return output.last_hidden_state  # type: ignore[no-any-return]
