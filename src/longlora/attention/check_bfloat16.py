"""The part of the self-check that is about bfloat16, which backends of CUDA compute that no check in float32 meets.

Everything runs under autocast, as training does, with the backend that training has. T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longlora.attention.check_gradients import GradientProbe, probe_tokens
from longlora.attention.probing import (
    Outcome,
    ProbeSettings,
    largest_difference,
    logits,
    packed_documents,
    routes_tokens,
    tolerance,
    training_with,
    worst_token,
)

_Check = Callable[[PreTrainedModel, ProbeSettings], Outcome]

# Rounding may do a few times as much, because the worst of some dozen tokens is a matter of chance; and for gradients
# a part of the largest that is far under that of any mistake.
_TIMES, _PART = 3, 1e-2


def in_bfloat16(check: _Check) -> _Check:
    """`check` under autocast; not compared where the model itself cannot run so."""

    def under_autocast(model: PreTrainedModel, settings: ProbeSettings) -> Outcome:
        if reason := _clash(model, settings):
            return None, reason
        with _autocast(model):
            return check(model, settings)

    return under_autocast


def rounds_as_full_attention(model: PreTrainedModel, settings: ProbeSettings) -> Outcome:
    """Rounding may do to sparse attention what it does to full attention, on two packed documents."""
    if reason := _clash(model, settings):
        return None, reason
    _, ids, positions = packed_documents(model, settings.group_size)

    def rounding(exact: ProbeSettings | None, rounded: ProbeSettings | None) -> float:
        with training_with(model, exact):
            expected = logits(model, ids, position_ids=positions)
        with training_with(model, rounded), _autocast(model):
            return largest_difference(logits(model, ids, position_ids=positions), expected, model)

    full, sparse = rounding(None, None), rounding(settings.for_float32(), settings)
    with training_with(model, None):
        limit = _TIMES * full + tolerance(logits(model, ids), model)
    return sparse <= limit, f"error of logits {sparse:.2g} (with full attention {full:.2g}), limit {limit:.2g}"


def gradients_agree(model: PreTrainedModel, settings: ProbeSettings) -> Outcome:
    """Gradients with the backend of `settings` may be as far from those in float32 as those with `grouped` are."""
    if reason := _clash(model, settings):
        return None, reason
    probe = GradientProbe(model, probe_tokens(model, settings))
    with training_with(model, settings, backend="grouped"):
        exact = probe.gradient()
        with _autocast(model):
            grouped = probe.gradient()
    with training_with(model, settings), _autocast(model):
        ours = probe.gradient()
    routed = routes_tokens(model)
    found = [
        (_error(own, truth, routed), _TIMES * _error(plain, truth, routed) + _PART)
        for own, plain, truth in zip(ours, grouped, exact, strict=True)
    ]
    error, limit = max(found, key=lambda pair: pair[0] - pair[1])
    return error <= limit, f"differ from those in float32 by {error:.1g} of the largest, limit {limit:.1g}"


def _error(found: Tensor, exact: Tensor, routed: bool) -> float:
    """Of the worst token, if there are tokens, in parts of the largest that is right; infinite if not finite."""
    size = exact.norm(dim=-1).max().item()
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return worst_token((found - exact).norm(dim=-1), routed) / size if size else float(bool((found != 0).any()))


def _autocast(model: PreTrainedModel) -> torch.autocast:
    # Without its cache, in which a weight that is cast while no gradient is asked for would have none later.
    return torch.autocast(model.device.type, dtype=torch.bfloat16, cache_enabled=False)


def _clash(model: PreTrainedModel, settings: ProbeSettings) -> str:
    """Why the model, with its own attention, does not run under autocast: some mix dtypes in experts; else empty."""
    try:
        with training_with(model, None), _autocast(model):
            logits(model, probe_tokens(model, settings))
    except RuntimeError as error:
        # torch has no class of its own for it. An OutOfMemoryError, a RuntimeError too, says nothing about the model.
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or not ("dtype" in text or "scalar type" in text):
            raise
        return f"not compared: the model itself does not run under autocast ({text.splitlines()[0]})"
    return ""
