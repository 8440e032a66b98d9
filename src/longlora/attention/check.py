"""The self-check: does S2-Attn do on a given model what it promises? Run by ``longlora check MODEL`` and by the tests.

Every check compares outputs of the whole model, through transformers, not of our functions alone. A check that a broken
switch could pass is paired with one that it can't: sparse attention must also differ from full attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longlora.attention.layers import attention_modules
from longlora.attention.registry import use_full, use_s2
from longlora.errors import LongLoraError, UnsupportedModelError

_GROUP = 16
_SINKS = 2


@dataclass(frozen=True)
class CheckResult:
    """One line of the self-check; `detail` holds the measured number and its limit."""

    name: str
    passed: bool
    detail: str


def check_model(model: PreTrainedModel) -> Iterator[CheckResult]:
    """Run all checks on `model` (float32 recommended), yielding each result as it is known.

    The model is left as it was: full attention, evaluation mode, same weights.
    """
    checks: list[tuple[str, Callable[[PreTrainedModel], tuple[bool, str]]]] = [
        ("no token sees a later one", _no_leak),
        ("nor with other shifts and layers of full attention", _no_leak_with_other_settings),
        ("sparse attention is in effect", _differs_from_full),
        ("a group as long as the sequence is full attention", _long_group_is_full),
        ("packed documents do not see each other", _documents_are_isolated),
        ("right padding changes nothing", _padding_changes_nothing),
        ("evaluation is full attention", _evaluation_is_full),
        ("gradients are finite and reach all layers", _gradients),
    ]
    for name, run in checks:
        try:
            passed, detail = run(model)
        except LongLoraError as error:
            passed, detail = False, str(error)
        finally:
            model.eval()
            use_full(model)
        yield CheckResult(name, passed, detail)


def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether packed documents train as separate ones do, with S2-Attn or, where that is unsupported, without.

    States and convolutions of hybrid models carry over from one document to the next, and some architectures do not
    tell their attention where documents begin. Leaves the model in evaluation mode with full attention.
    """
    model.eval()
    try:
        passed, _ = _documents_are_isolated(model)
    except UnsupportedModelError:
        passed, _ = _compare_packed(model)
    return passed


@contextmanager
def _sparse(model: PreTrainedModel, group_size: int = _GROUP, **settings: Any) -> Iterator[None]:
    # The sparse pattern without dropout: evaluation mode with the option that keeps the pattern.
    model.eval()
    use_s2(model, group_size=group_size, sink_tokens=_SINKS, sparse_in_evaluation=True, **settings)
    try:
        yield
    finally:
        use_full(model)


def _tokens(model: PreTrainedModel, length: int, seed: int = 0) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (1, length), generator=generator).to(model.device)


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor, **kwargs: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False, **kwargs).logits.float()  # type: ignore[no-any-return]


def _tolerance(logits: Tensor, model: PreTrainedModel) -> float:
    """Rounding of the model's data type, relative to the spread of its logits."""
    unit = 1e-4 if model.dtype is torch.float32 else 5e-2
    return unit * (logits.max() - logits.min()).item()


def _compare(model: PreTrainedModel, one: Tensor, other: Tensor) -> tuple[bool, str]:
    limit, found = _tolerance(one, model), (one - other).abs().max().item()
    return found <= limit, f"largest difference of logits {found:.2g}, limit {limit:.2g}"


def _no_leak(model: PreTrainedModel, **settings: Any) -> tuple[bool, str]:
    worst = limit = 0.0
    # A roll leaks only where the length is a multiple of the group: the end meets the beginning.
    for length in (3 * _GROUP, 3 * _GROUP + 5):
        ids = _tokens(model, length)
        with _sparse(model, **settings):
            before = _logits(model, ids)
            for position in (1, _GROUP // 2, _GROUP, 2 * _GROUP + 3, length - 1):
                changed = ids.clone()
                changed[0, position] = (changed[0, position] + 1) % model.get_input_embeddings().weight.shape[0]
                worst = max(worst, (_logits(model, changed) - before)[:, :position].abs().max().item())
        limit = _tolerance(before, model)
    return worst <= limit, f"largest change before a changed token {worst:.2g}, limit {limit:.2g}"


def _no_leak_with_other_settings(model: PreTrainedModel) -> tuple[bool, str]:
    last = len(attention_modules(model)) - 1
    settings: list[dict[str, Any]] = [{"shift": "layers"}, {"shift": "none"}, {"full_attention_layers": [0, last]}]
    results = [_no_leak(model, **each) for each in settings]
    return all(passed for passed, _ in results), next((text for passed, text in results if not passed), results[0][1])


def _differs_from_full(model: PreTrainedModel) -> tuple[bool, str]:
    ids = _tokens(model, 3 * _GROUP)
    full = _logits(model, ids)
    with _sparse(model):
        found = (_logits(model, ids) - full).abs().max().item()
    limit = _tolerance(full, model)
    return found > limit, f"sparse differs from full by {found:.2g}, must be more than {limit:.2g}"


def _long_group_is_full(model: PreTrainedModel) -> tuple[bool, str]:
    ids = _tokens(model, 2 * _GROUP - 1)
    full = _logits(model, ids)
    with _sparse(model, group_size=2 * _GROUP):
        return _compare(model, full, _logits(model, ids))


def _documents_are_isolated(model: PreTrainedModel) -> tuple[bool, str]:
    with _sparse(model):
        return _compare_packed(model)


def _compare_packed(model: PreTrainedModel) -> tuple[bool, str]:
    first, second = _tokens(model, 2 * _GROUP + 3, seed=1), _tokens(model, _GROUP + 7, seed=2)
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(first.shape[1]), torch.arange(second.shape[1])])[None].to(model.device)
    alone = torch.cat([_logits(model, first), _logits(model, second)], dim=1)
    return _compare(model, alone, _logits(model, packed, position_ids=positions))


def _padding_changes_nothing(model: PreTrainedModel) -> tuple[bool, str]:
    long, short = _tokens(model, 2 * _GROUP + 9, seed=3), _tokens(model, _GROUP + 3, seed=4)
    padded = torch.cat([short, short.new_zeros(1, long.shape[1] - short.shape[1])], dim=1)
    mask = torch.ones(2, long.shape[1], dtype=torch.long, device=model.device)
    mask[1, short.shape[1] :] = 0
    with _sparse(model):
        alone = _logits(model, short)
        together = _logits(model, torch.cat([long, padded]), attention_mask=mask)
        return _compare(model, alone, together[1:, : short.shape[1]])


def _evaluation_is_full(model: PreTrainedModel) -> tuple[bool, str]:
    ids = _tokens(model, 3 * _GROUP + 1)
    full = _logits(model, ids)
    use_s2(model, group_size=_GROUP, sink_tokens=_SINKS)
    return _compare(model, full, _logits(model.eval(), ids))


def _gradients(model: PreTrainedModel) -> tuple[bool, str]:
    # Experts that no token chose and the like get no gradient with any attention.
    full = {name for name, grad in _matrix_gradients(model).items() if bool((grad != 0).any())}
    use_s2(model, group_size=_GROUP, sink_tokens=_SINKS)
    sparse = _matrix_gradients(model)
    finite = all(bool(torch.isfinite(grad).all()) for grad in sparse.values())
    moving = sum(name in sparse and bool((sparse[name] != 0).any()) for name in full)
    return (
        finite and bool(full) and moving == len(full),
        f"{moving} of {len(full)} weight matrices get a gradient, {'all' if finite else 'NOT all'} finite",
    )


def _matrix_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients of the loss of a training step by name, of all weight matrices that have one."""
    ids = _tokens(model, 2 * _GROUP + 5)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    matrices = {name: p.requires_grad_(True) for name, p in model.named_parameters() if p.ndim == 2}
    model.train()
    try:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        grads = torch.autograd.grad(loss, list(matrices.values()), allow_unused=True)
    finally:
        for parameter, before in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(before)
    return {name: grad for name, grad in zip(matrices, grads, strict=True) if grad is not None}
