"""Dropout of attention weights: that it acts, on average changes nothing, and is the same when computed again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import qkv
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longlora.attention import softcap
from longlora.attention.backends import attend
from longlora.attention.grouped import grouped_attention
from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern

PATTERNS = [S2Pattern(8, 2), WindowPattern(6), FULL]
EXTRAS = [{}, {"softcap": 2.0}, {"sink_logits_H": torch.tensor([0.5, -1.0, 1.0, 0.0], dtype=torch.float64)}]
KINDS = ["plain", "soft cap", "learned sinks"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft-capped scores in several blocks of queries, each recomputed in backward."""
    monkeypatch.setattr(softcap, "_SCORES", 4 * 8 * 8)
    monkeypatch.setattr(softcap, "_MIN_ROWS", 8)


@pytest.mark.parametrize("function", [attend, grouped_attention])
@pytest.mark.parametrize("extras", EXTRAS, ids=KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_dropout_acts_and_its_mean_is_attention_without(
    pattern: Pattern, extras: dict[str, object], function: Callable[..., Tensor]
) -> None:
    """Each head 2000 times, dropped independently; the mean within 6 of its standard errors, per half of the heads."""
    copies = 2000
    inputs = [x.detach().repeat(1, copies, 1, 1) for x in qkv(1, 2, 1, 20)]
    bounds = [[0, 17, 19]]
    extras = {name: value.repeat(copies // 2) if isinstance(value, Tensor) else value for name, value in extras.items()}
    plain, dropped = (
        function(*inputs, bounds, pattern, dropout=dropout, **extras)[0].unflatten(1, (2, copies // 4, 4))
        for dropout in (0.0, 0.3)
    )
    assert (dropped[:19] != plain[:19]).any(-1).float().mean() > 0.3
    assert len({tuple(copy) for copy in dropped[15, 0, :, 0].tolist()}) > 30, "heads must not share what they drop"
    error = dropped.std(2) / (copies // 4) ** 0.5
    assert ((dropped.mean(2) - plain.mean(2)).abs() <= 6 * error + 1e-12).all()


@pytest.mark.parametrize("function", [attend, grouped_attention])
@pytest.mark.parametrize("extras", EXTRAS, ids=KINDS)
def test_no_dropout_is_attention_without(extras: dict[str, object], function: Callable[..., Tensor]) -> None:
    inputs = qkv(1, 4, 2, 20)
    plain = function(*inputs, [[0, 20]], PATTERNS[0], **extras)
    assert torch.equal(function(*inputs, [[0, 20]], PATTERNS[0], dropout=0.0, **extras), plain)


@pytest.mark.parametrize("extras", EXTRAS, ids=KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradients_are_those_of_what_forward_dropped(pattern: Pattern, extras: dict[str, object]) -> None:
    """Against the slope of the function with one seed, also with torch's random numbers moved on before backward."""
    inputs = qkv(1, 4, 2, 20)
    steps = [x.detach() * 1e-6 for x in qkv(1, 4, 2, 20, seed=5)]

    def loss(sign: float) -> Tensor:
        torch.manual_seed(3)
        moved = [x + sign * step for x, step in zip(inputs, steps, strict=True)]
        return attend(*moved, [[0, 20]], pattern, dropout=0.3, **extras).square().sum()

    made = loss(0.0)
    torch.rand(7)
    found = torch.autograd.grad(made, inputs)
    slope = sum((grad * step).sum() for grad, step in zip(found, steps, strict=True))
    torch.testing.assert_close(slope, (loss(1.0) - loss(-1.0)) / 2, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("extras", EXTRAS, ids=KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gradient_checkpointing_drops_the_same_again(
    pattern: Pattern, extras: dict[str, object], reentrant: bool
) -> None:
    inputs = qkv(1, 4, 2, 20)

    def attention(*qkv: Tensor) -> Tensor:
        return attend(*qkv, [[0, 17, 19]], pattern, dropout=0.3, **extras)

    torch.manual_seed(0)
    plain = torch.autograd.grad(attention(*inputs).square().sum(), inputs)
    torch.manual_seed(0)
    out = checkpoint(attention, *inputs, use_reentrant=reentrant)
    torch.rand(7)
    out.square().sum().backward()
    for x, grad in zip(inputs, plain, strict=True):
        torch.testing.assert_close(x.grad, grad)
