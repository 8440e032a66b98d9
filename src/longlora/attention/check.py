"""The self-check: does S2-Attn do on a given model what it promises? Run by ``longlora check MODEL`` and by the tests.

Every check compares outputs of the whole model in training mode, through transformers, not of our functions alone. A
check that a broken switch could pass is paired with one that it can't: sparse attention must also differ from full
attention. Gradients are in `check_gradients.py`, bfloat16 is in `check_bfloat16.py`. What makes each check fail is in
tests/attention/test_check.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longlora.attention.check_bfloat16 import gradients_agree, in_bfloat16, rounds_as_full_attention
from longlora.attention.check_gradients import gradients_are_right, gradients_reach
from longlora.attention.layers import attention_modules, has_window, layer_numbers
from longlora.attention.pattern import FULL
from longlora.attention.probing import (
    Outcome,
    ProbeSettings,
    as_it_was,
    largest_difference,
    logits,
    packed_documents,
    tokens,
    tolerance,
    training_with,
    vocabulary,
)
from longlora.attention.registry import settings_of, use_full, use_s2
from longlora.errors import LongLoraError, UnsupportedModelError

_SMALL = ProbeSettings()


@dataclass(frozen=True)
class CheckResult:
    """One line of the self-check."""

    name: str
    passed: bool | None
    """None if there is nothing to compare with: with full attention the model doesn't do it either."""
    detail: str
    """The measured number and its limit, or what went wrong."""


_Check = Callable[[PreTrainedModel, ProbeSettings], Outcome]


def check_model(
    model: PreTrainedModel, settings: ProbeSettings | None = _SMALL, *, bfloat16: bool | None = None
) -> Iterator[CheckResult]:
    """Run all checks on `model`, which is in float32, yielding each result as it is known.

    The model is left as it was, but with full attention.

    Args:
        settings: what training would use, on groups of some tokens; None is the model's own attention, of which the
            checks ask what has nothing to do with groups.
        bfloat16: check under autocast as well, with the backend that training has; if None, on CUDA only, where that is
            one that float32 does not reach.
    """
    if bfloat16 is None:
        bfloat16 = model.device.type == "cuda"
    with as_it_was(model):
        for name, check in _checks(model, settings, bfloat16):
            yield _result(model, name, check)


def _result(model: PreTrainedModel, name: str, check: Callable[[], Outcome]) -> CheckResult:
    with as_it_was(model):
        try:
            return CheckResult(name, *check())
        except LongLoraError as error:
            return CheckResult(name, False, str(error))


def _checks(
    model: PreTrainedModel, settings: ProbeSettings | None, bfloat16: bool
) -> list[tuple[str, Callable[[], Outcome]]]:
    """Names and checks: those of groups only where a layer has groups."""
    exact = None if settings is None else settings.for_float32()
    checks: list[tuple[str, Any, ProbeSettings | None]] = [("no token sees a later one", _no_leak, exact)]
    if exact is not None and _has_groups(model, exact):
        checks += [
            ("nor with other shifts and layers of full attention", _no_leak_with_other_settings, exact),
            ("sparse attention is in effect", _differs_from_full, exact),
            ("a group as long as the sequence is full attention", _long_group_is_full, exact),
        ]
    elif exact is not None:
        checks += [("training is full attention", _training_is_full, exact)]
    checks += [
        ("packed documents do not see each other", _documents_are_isolated, exact),
        ("right padding changes nothing", _padding_changes_nothing, exact),
    ]
    if exact is not None:
        checks += [("evaluation is full attention", _evaluation_is_full, exact)]
    checks += [
        ("gradients are finite and reach all layers", gradients_reach, exact),
        ("gradients are those of the loss", gradients_are_right, exact),
    ]
    if settings is not None and bfloat16:
        again = (_no_leak, _documents_are_isolated, _padding_changes_nothing, gradients_reach)
        checks += [(f"in bfloat16 {name}", in_bfloat16(check), settings) for name, check, _ in checks if check in again]
        checks += [
            ("in bfloat16 gradients are those of the grouped backend", gradients_agree, settings),
            ("in bfloat16 logits are as exact as with full attention", rounds_as_full_attention, settings),
        ]
    return [(name, lambda check=check, own=own: check(model, own)) for name, check, own in checks]  # type: ignore[misc]


def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether packed documents train as separate ones do, with S2-Attn or, where that is unsupported, without.

    States and convolutions of hybrid models carry over from one document to the next, and some architectures do not
    tell their attention where documents begin. Leaves the model as it was, but with full attention.
    """
    with as_it_was(model):
        try:
            passed, _ = _documents_are_isolated(model, _SMALL)
        except UnsupportedModelError:
            passed, _ = _documents_are_isolated(model, None)
    return bool(passed)


def _has_groups(model: PreTrainedModel, settings: ProbeSettings) -> bool:
    try:
        use_s2(model, **vars(settings))
    except LongLoraError:
        return True  # the checks will say what is wrong
    modules = attention_modules(model)
    found = any(settings_of(module).pattern != FULL and not has_window(model, module) for module in modules)
    use_full(model)
    return found


def _compare(model: PreTrainedModel, one: Tensor, other: Tensor) -> Outcome:
    limit, found = tolerance(one, model), largest_difference(one, other, model)
    return found <= limit, f"largest difference of logits {found:.2g}, limit {limit:.2g}"


def _training_logits(model: PreTrainedModel, settings: ProbeSettings | None, ids: Tensor, **kwargs: Tensor) -> Tensor:
    with training_with(model, settings):
        return logits(model, ids, **kwargs)


def _no_leak(model: PreTrainedModel, settings: ProbeSettings | None) -> Outcome:
    group = (settings or _SMALL).group_size
    worst = limit = 0.0
    # A roll leaks only where the length is a multiple of the group: the end meets the beginning.
    for length in (3 * group, 3 * group + 5):
        ids = tokens(model, length)
        with training_with(model, settings):
            before = logits(model, ids)
            for position in sorted({1, group // 2, group, 2 * group + group // 4, length - 1}):
                changed = ids.clone()
                changed[0, position] = (changed[0, position] + 1) % vocabulary(model)
                after = logits(model, changed)
                worst = max(worst, largest_difference(after[:, :position], before[:, :position], model))
        limit = tolerance(before, model)
    return worst <= limit, f"largest change before a changed token {worst:.2g}, limit {limit:.2g}"


def _no_leak_with_other_settings(model: PreTrainedModel, settings: ProbeSettings) -> Outcome:
    numbers = layer_numbers(attention_modules(model))
    others: list[dict[str, Any]] = [
        {"shift": "layers"},
        {"shift": "none"},
        {"full_attention_layers": [numbers[0], numbers[-1]]},
    ]
    results = [_no_leak(model, replace(settings, **each)) for each in others]
    return all(passed for passed, _ in results), next((text for passed, text in results if not passed), results[0][1])


def _differs_from_full(model: PreTrainedModel, settings: ProbeSettings) -> Outcome:
    ids = tokens(model, 3 * settings.group_size)
    full = _training_logits(model, None, ids)
    found = (_training_logits(model, settings, ids) - full).abs().max().item()
    limit = tolerance(full, model)
    return found > limit, f"sparse differs from full by {found:.2g}, must be more than {limit:.2g}"


def _training_is_full(model: PreTrainedModel, settings: ProbeSettings) -> Outcome:
    ids = tokens(model, 3 * settings.group_size + 1)
    return _compare(model, _training_logits(model, None, ids), _training_logits(model, settings, ids))


def _long_group_is_full(model: PreTrainedModel, settings: ProbeSettings) -> Outcome:
    group = 2 * settings.group_size
    ids = tokens(model, group - 1)
    one_group = replace(settings, group_size=group)
    return _compare(model, _training_logits(model, None, ids), _training_logits(model, one_group, ids))


def _documents_are_isolated(model: PreTrainedModel, settings: ProbeSettings | None) -> Outcome:
    documents, packed, positions = packed_documents(model, (settings or _SMALL).group_size)
    with training_with(model, settings):
        alone = torch.cat([logits(model, document) for document in documents], dim=1)
        return _compare(model, alone, logits(model, packed, position_ids=positions))


def _padding_changes_nothing(model: PreTrainedModel, settings: ProbeSettings | None) -> Outcome:
    group = (settings or _SMALL).group_size
    # No group of the last document is cut, as long as its padding does not count.
    rows = [tokens(model, 2 * group + 9, seed=3), tokens(model, group + 3, seed=4), tokens(model, group - 1, seed=5)]
    ids = torch.zeros(len(rows), rows[0].shape[1], dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : row.shape[1]], mask[index, : row.shape[1]] = row, 1
    with training_with(model, settings):
        alone = torch.cat([logits(model, row) for row in rows], dim=1)
        return _compare(model, alone, logits(model, ids, attention_mask=mask)[mask.bool()][None])


def _evaluation_is_full(model: PreTrainedModel, settings: ProbeSettings) -> Outcome:
    ids = tokens(model, 3 * settings.group_size + 1)
    use_full(model)
    full = logits(model.eval(), ids)
    use_s2(model, **vars(settings))
    return _compare(model, full, logits(model, ids))
