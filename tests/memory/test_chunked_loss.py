"""The chunked loss against plain cross-entropy over all logits: value and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longlora.memory.chunked_loss import IGNORE_INDEX, chunked_loss, token_losses


class Capped(nn.Module):
    """A head that does something nonlinear after the projection, as Gemma 2 does."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.projection(hidden) / 3.0) * 3.0


def problem(T: int = 23, C: int = 8, V: int = 31) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    labels = torch.randint(V, (T,), generator=generator)
    labels[::5] = IGNORE_INDEX
    return torch.randn(T, C, generator=generator, dtype=torch.float64), labels, nn.Linear(C, V, bias=False).double()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("chunk", [1, 4, 7, 23, 100])
@pytest.mark.parametrize("capped", [False, True])
def test_value_and_gradients(chunk: int, capped: bool) -> None:
    hidden, labels, projection = problem()
    head = Capped(projection) if capped else projection
    results = []
    for loss_of in (
        lambda h: chunked_loss(h, labels, head, chunk),
        lambda h: F.cross_entropy(head(h).float(), labels, ignore_index=IGNORE_INDEX, reduction="sum"),
    ):
        h = hidden.clone().requires_grad_()
        loss = loss_of(h)
        # Scaled, because a trainer divides the sum by the number of tokens.
        results.append((loss, *torch.autograd.grad(loss / 7, [h, projection.weight])))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6, check_dtype=False)


def test_frozen_head_and_frozen_hidden_states() -> None:
    hidden, labels, head = problem()
    head.requires_grad_(False)
    h = hidden.clone().requires_grad_()
    chunked_loss(h, labels, head, 4).backward()
    assert h.grad is not None
    assert head.weight.grad is None
    head.requires_grad_(True)
    chunked_loss(hidden, labels, head, 4).backward()
    assert head.weight.grad is not None


def test_all_labels_ignored_is_zero_and_finite() -> None:
    hidden, labels, head = problem()
    h = hidden.clone().requires_grad_()
    loss = chunked_loss(h, torch.full_like(labels, IGNORE_INDEX), head, 5)
    loss.backward()
    assert loss.item() == 0
    assert not h.grad.any()


def test_token_losses_sum_to_the_loss_and_uniform_logits_give_log_v() -> None:
    hidden, labels, head = problem()
    losses = token_losses(hidden, labels, head, 4)
    torch.testing.assert_close(losses.sum(), chunked_loss(hidden, labels, head, 4), rtol=1e-5, atol=1e-5)
    assert not losses[::5].any()
    nn.init.zeros_(head.weight)
    uniform = token_losses(hidden, labels, head, 4)
    torch.testing.assert_close(uniform[1], torch.tensor(31.0).log())


def test_logits_of_the_whole_sequence_never_exist() -> None:
    """The largest block that is ever allocated belongs to one chunk, not to the sequence."""
    T, C, V, chunk = 512, 4, 1000, 32
    hidden, head = torch.randn(T, C, requires_grad=True), nn.Linear(C, V, bias=False)
    labels = torch.randint(V, (T,))
    with torch.profiler.profile(profile_memory=True) as profile:
        chunked_loss(hidden, labels, head, chunk).backward()
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 8 * chunk * V * 4
    assert 8 * chunk * V * 4 < T * V * 4
