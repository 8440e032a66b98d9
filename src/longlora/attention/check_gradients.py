"""The part of the self-check that is about gradients: they reach every weight, and they are those of the loss.

Gradients of weights are looked at one at a time and freed. Whether they are right is measured at the token embeddings:
what attention sends back reaches them through all layers, and they are small enough to move along their own gradient.

B batch, T tokens, C hidden.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from longlora.attention.layers import attention_modules
from longlora.attention.probing import Outcome, ProbeSettings, tokens, training_with

# Parts of the length of what is moved: large ones meet the curvature of the loss, and the jumps where a router chooses
# another expert, small ones its rounding. Most models agree at the first or second.
_STEPS = (1e-2, 3e-3, 1e-1, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
_LIMIT = 5e-3
_SMALL = 4096


def gradients_reach(model: PreTrainedModel, settings: ProbeSettings | None) -> Outcome:
    """Whether every weight matrix that gets a gradient with full attention gets one with `settings`, all finite."""
    # Experts that no token chose and the like get no gradient with any attention.
    full, _ = _reached(model, None, settings)
    sparse, broken = _reached(model, settings, settings)
    missing = sorted(full - sparse)
    detail = f"{len(full) - len(missing)} of {len(full)} weight matrices get a gradient"
    detail += f", not {missing[0]}" if missing else ""
    detail += f"; that of {sorted(broken)[0]} is not finite" if broken else ", all finite"
    return bool(full) and not missing and not broken, detail


def gradients_are_right(model: PreTrainedModel, settings: ProbeSettings | None) -> Outcome:
    """Compare gradients with differences of the loss: along themselves, and along those of full attention.

    A gradient that lacks a part is its own direction's true derivative; that of full attention has the part.
    """
    probe = GradientProbe(model, probe_tokens(model, settings))
    with training_with(model, None):
        full = probe.gradient()
        own_error = probe.error(full, full)
    with training_with(model, settings):
        gradient = probe.gradient()
        if not 0 < gradient[0].norm() < torch.inf:
            return False, f"the gradient of the token embeddings has length {gradient[0].norm().item():.2g}"
        error = max(probe.error(gradient, along) for along in (gradient, full))
    if own_error > _LIMIT:  # HRM leaves parts out on purpose
        return None, f"not compared: with full attention they differ from those of the loss by {own_error:.1g}"
    return error <= _LIMIT, f"differ from those of the loss by {error:.1g} of their size, limit {_LIMIT:.1g}"


def probe_tokens(model: PreTrainedModel, settings: ProbeSettings | None) -> Tensor:
    """One row of more than two groups."""
    return tokens(model, 2 * (settings or ProbeSettings()).group_size + 5)


def _loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1].double(), ids[0, 1:])


def _reached(
    model: PreTrainedModel, attention: ProbeSettings | None, settings: ProbeSettings | None
) -> tuple[set[str], set[str]]:
    """Names of the weight matrices with a gradient other than 0, and of those with one that is not finite."""
    moving, broken = set(), set()
    names = {parameter: name for name, parameter in model.named_parameters()}

    def look(parameter: Tensor) -> None:
        grad = parameter.grad
        assert grad is not None
        if not bool(torch.isfinite(grad).all()):
            broken.add(names[parameter])  # type: ignore[index]
        if bool((grad != 0).any()):
            moving.add(names[parameter])  # type: ignore[index]
        parameter.grad = None  # so that there is one gradient at a time

    with ExitStack() as stack:
        stack.enter_context(training_with(model, attention))
        for parameter in names:
            parameter.grad = None
            parameter.requires_grad_(parameter.ndim >= 2 and parameter.is_floating_point())
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(look).remove)
        _loss(model, probe_tokens(model, settings)).backward()
    return moving, broken


class GradientProbe:
    """The loss on `ids` as a function of the token embeddings, and of weights that attention itself is given.

    Those are small, such as learned sinks, and the embeddings do not feel them: each is moved alone.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self._model, self._ids = model, ids
        own = (weight for module in attention_modules(model) for weight in module.parameters(recurse=False))
        self._weights = [weight for weight in own if weight.is_floating_point() and weight.numel() <= _SMALL]
        with torch.no_grad():
            self._embeddings_BTC = model.get_input_embeddings()(ids)

    def gradient(self) -> list[Tensor]:
        """Of the embeddings, then of each weight."""
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        for weight in self._weights:
            weight.requires_grad_(True)
        shift_BTC = torch.zeros_like(self._embeddings_BTC).requires_grad_(True)
        inputs = [shift_BTC, *self._weights]
        found = torch.autograd.grad(self._loss(shift_BTC), inputs, allow_unused=True)
        return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(inputs, found, strict=True)]

    def error(self, gradient: list[Tensor], along: list[Tensor]) -> float:
        """How far derivatives along `along` are from those of the loss, of the size of `gradient`, at worst."""
        places = [self._embeddings_BTC, *self._weights]
        return max(
            self._one_error(index, place, own, direction)
            for index, (place, own, direction) in enumerate(zip(places, gradient, along, strict=True))
        )

    def _one_error(self, index: int, place: Tensor, gradient: Tensor, along: Tensor) -> float:
        """At the step that fits best."""
        size, length = gradient.norm().item(), along.norm().item()
        if not 0 < length < float("inf"):
            return 0.0
        direction = along / length
        expected = (gradient.double() * direction.double()).sum().item()
        best = float("inf")
        for part in _STEPS:
            step = part * place.norm().item()
            difference = self._moved_loss(index, step * direction) - self._moved_loss(index, -step * direction)
            best = min(best, abs(difference / (2 * step) - expected) / max(size, _LIMIT * length))
            if best <= _LIMIT:
                break
        return best

    @torch.no_grad()
    def _moved_loss(self, index: int, by: Tensor) -> float:
        if index == 0:
            return self._loss(by).item()
        weight = self._weights[index - 1]
        before = weight.clone()
        weight.add_(by)
        try:
            return self._loss(None).item()
        finally:
            weight.copy_(before)

    def _loss(self, shift_BTC: Tensor | None) -> Tensor:
        if shift_BTC is None:
            return _loss(self._model, self._ids)
        embeddings = self._model.get_input_embeddings()
        hook = embeddings.register_forward_hook(lambda _module, _inputs, output: output + shift_BTC)
        try:
            return _loss(self._model, self._ids)
        finally:
            hook.remove()
