"""The training loss against its formula: labels, weights and what they are divided by."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from longlora.data.packing import IGNORE_INDEX, collate
from longlora.data.stretches import StretchCollator
from longlora.memory.chunked_loss import _CACHED, chunked_loss
from longlora.training.loss_model import LossModel


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_both_collators_is_the_formula(tiny_llama: LlamaForCausalLM, weighted: bool) -> None:
    """Labels and weights of a token count where it is predicted, one position before it."""
    rows, total, count = [], 0.0, 0.0
    for length in (9, 6):
        ids = torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(length))
        labels = ids.where(torch.arange(length) % 3 > 0, IGNORE_INDEX)
        weights = torch.linspace(0.5, 2, length).where(labels != IGNORE_INDEX, 0.0)
        row = {"input_ids": ids, "position_ids": torch.arange(length), "labels": labels}
        rows.append(row | ({"loss_weights": weights} if weighted else {}))
        with torch.no_grad():
            losses = F.cross_entropy(tiny_llama(ids[None]).logits[0, :-1], labels[1:], reduction="none")
        own = weights[1:] if weighted else (labels[1:] != IGNORE_INDEX).float()
        total, count = total + (losses * own).sum().item(), count + own.sum().item()
    model = LossModel(tiny_llama, 4, torch.float32)
    for batch in (collate(rows, 0), StretchCollator(0, weighted=weighted)(rows)):
        assert model(**batch)["loss"].item() == pytest.approx(total / count, rel=1e-5)
        assert model(**batch, num_items_in_batch=7.0)["loss"].item() == pytest.approx(total / 7, rel=1e-5)
        assert model.measure(**batch) == pytest.approx((total, count), rel=1e-5)


def test_blocks_within_a_chunk_take_their_own_labels_and_weights() -> None:
    """A vocabulary of which two rows of logits fill the cache."""
    V = _CACHED // 2
    hidden, head = torch.randn(5, 1, generator=torch.Generator().manual_seed(0)), torch.nn.Linear(1, V, bias=False)
    labels, weights = torch.tensor([3, V - 1, IGNORE_INDEX, 7, 11]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    results = []
    for direct in (True, False):
        h = hidden.clone().requires_grad_()
        if direct:
            loss = (F.cross_entropy(head(h), labels, reduction="none") * weights).sum()
        else:
            loss = chunked_loss(h, labels, head, 5, weights)
        results.append((loss, *torch.autograd.grad(loss, [h, head.weight])))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
