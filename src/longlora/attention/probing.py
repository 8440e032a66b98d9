"""Running a model for a look at it: with given attention, without noise, and left as it was.

In: a transformers model and `ProbeSettings`. Out: its logits in training mode. Used by `check.py` and `picture.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from longlora.attention.backends import Backend, choose_backend, unlogged
from longlora.attention.layers import Shift
from longlora.attention.registry import S2_ATTENTION, s2_attention_forward, use_full, use_s2

_GROUP = 16

Outcome = tuple[bool | None, str]
"""Of a check: whether it passed, None if there is nothing to compare with; and the measured number with its limit."""

# What makes two passes in training mode differ, as parts of names: dropout, layer drop, noise of routers.
_NOISE = ("drop", "jitter")
_ROUTED = ("moe", "expert", "router")


@dataclass(frozen=True)
class ProbeSettings:
    """Arguments of `use_s2`, by default on groups small enough for inputs of some dozen tokens."""

    group_size: int = _GROUP
    sink_tokens: int = 2
    shift: Shift = "heads"
    full_attention_layers: Sequence[int] | Literal["all"] = ()
    backend: Backend = "auto"

    def scaled_down(self) -> ProbeSettings:
        """The same on groups of at most 16 tokens; of sink tokens a quarter of a group, or their share if larger."""
        if self.group_size <= _GROUP:
            return self
        sinks = min(self.sink_tokens, max(_GROUP // 4, self.sink_tokens * _GROUP // self.group_size))
        return replace(self, group_size=_GROUP, sink_tokens=sinks)

    def for_float32(self) -> ProbeSettings:
        """The same with a backend that computes float32."""
        return replace(self, backend="auto") if self.backend == "varlen" else self


@contextmanager
def as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Leave `model` in the mode it was in, with the gradients it had and asked for, and with full attention."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        with unlogged():
            yield
    finally:
        use_full(model)
        for module, training in modes:
            module.training = training
        for parameter, wanted, grad in gradients:
            parameter.requires_grad_(wanted)
            parameter.grad = grad


@contextmanager
def training_with(model: PreTrainedModel, settings: ProbeSettings | None, **changes: Any) -> Iterator[None]:
    """`model` in training mode without noise, with `settings` after `changes`, or its own attention if there are none.

    Training mode and not evaluation with the sparse pattern: what training does is what counts.
    """
    if settings is None:
        use_full(model)
    else:
        use_s2(model, **vars(replace(settings, **changes)))
    model.train()
    try:
        with without_noise(model):
            yield
    finally:
        use_full(model)


@contextmanager
def without_noise(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, layer drop or jitter of routers inside, so that two passes in training mode agree."""
    # Models keep rates as nn.Dropout, as numbers of any module, and in their config, which modules share.
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    rates = [
        (owner, name, value)
        for owner in (*model.modules(), *configs.values())
        for name, value in vars(owner).items()
        if isinstance(value, float) and value > 0
        if any(part in name for part in _NOISE) or (name == "p" and isinstance(owner, nn.Dropout))
    ]
    for owner, name, _ in rates:
        setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for owner, name, value in rates:
            setattr(owner, name, value)


@contextmanager
def attention_function(function: Callable[..., tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """`function` in the place of `s2_attention_forward`, which it may call."""
    AttentionInterface.register(S2_ATTENTION, function)
    try:
        yield
    finally:
        AttentionInterface.register(S2_ATTENTION, s2_attention_forward)


def backends_in_training(model: PreTrainedModel, settings: ProbeSettings, dtype: torch.dtype) -> list[Backend]:
    """The backends that a step of training computes attention with, in `dtype`: asked with what reaches the layers.

    Raises:
        ModelError: the backend of `settings` cannot compute it.
    """
    found: dict[Backend, None] = {}

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        backend = choose_backend(
            settings.backend,
            query.device,
            dtype,
            head_dims=(query.shape[-1], value.shape[-1]),
            dropout=bool(options.get("dropout")),
            softcap=options.get("softcap") is not None,
            learned_sinks=options.get("s_aux") is not None,
        )
        found[backend] = None
        return s2_attention_forward(module, query, key, value, mask, **options)

    with as_it_was(model):
        use_s2(model, **vars(settings.for_float32()))  # as the model is here; what computes that is not the question
        model.train()
        with attention_function(forward):
            logits(model, tokens(model, 2 * settings.group_size))
    return list(found)


def vocabulary(model: PreTrainedModel) -> int:
    """Tokens that the model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def tokens(model: PreTrainedModel, length: int, seed: int = 0) -> Tensor:
    """Random token ids [1, length], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary(model), (1, length), generator=generator).to(model.device)


def packed_documents(model: PreTrainedModel, group: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Two documents, both in one row, and their positions."""
    documents = [tokens(model, 2 * group + 3, seed=1), tokens(model, group + 7, seed=2)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None].to(model.device)
    return documents, torch.cat(documents, dim=1), positions


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Tensor) -> Tensor:
    """In float32, in the mode that the model is in."""
    return model(input_ids=ids, use_cache=False, **kwargs).logits.float()  # type: ignore[no-any-return]


def tolerance(logits: Tensor, model: PreTrainedModel) -> float:
    """Rounding of the model's data type, or of autocast's, relative to the spread of its logits."""
    unit = 1e-4 if model.dtype is torch.float32 and not _rounds(model) else 5e-2
    return unit * (logits.max() - logits.min()).item()


def largest_difference(one_BTV: Tensor, other_BTV: Tensor, model: PreTrainedModel) -> float:
    """Of the logits of any token; under autocast with the exception of `worst_token`."""
    return worst_token((one_BTV - other_BTV).abs().amax(-1), _rounds(model) and routes_tokens(model))


def worst_token(error_T: Tensor, routed: bool) -> float:
    """The largest error of a token; if tokens are `routed` and rounded, that of three quarters of them.

    Where two experts are next to equal, rounding sends a token to the other one: a large error of few tokens that says
    nothing about attention. Where nothing is routed a single wrong token is a mistake.
    """
    return error_T.flatten().quantile(0.75).item() if routed else error_T.max().item()


def routes_tokens(model: PreTrainedModel) -> bool:
    """Whether the model is a mixture of experts, by the names of its classes."""
    names = {type(module).__name__.lower() for module in model.modules()}
    return any(part in name for name in names for part in _ROUTED)


def _rounds(model: PreTrainedModel) -> bool:
    return torch.is_autocast_enabled(model.device.type)
