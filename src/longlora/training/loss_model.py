"""Token ids -> loss through the decoder and the chunked loss: what Trainer (and DDP) sees as the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longlora.memory.chunked_loss import IGNORE_INDEX, chunked_loss, token_losses
from longlora.model.head import hidden_states, mixed_precision, output_head
from longlora.model.trainable import TrainedModel, base_of


class LossModel(nn.Module):
    """Mean loss of a batch of `longlora.data.packing.collate`.

    B rows, T tokens, C hidden size, t tokens that are to be predicted.
    """

    # Read by Trainer: give us the number of labels in the whole step, so that every token weighs the same however the
    # step is cut into micro batches.
    accepts_loss_kwargs = True

    def __init__(self, model: TrainedModel, chunk_tokens: int, dtype: torch.dtype) -> None:
        """`chunk_tokens` get logits at one time; `dtype` is what `model` computes in, whatever its weights are."""
        super().__init__()
        self.model = model
        self._chunk_tokens, self._dtype = chunk_tokens, dtype
        # In a tuple, so that the head's parameters are not registered a second time.
        self._head = (output_head(base_of(model), dtype),)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        loss_weights: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """``{"loss": weighted sum of the losses / num_items_in_batch}``; all but the last argument are [B, T].

        Args:
            labels: unshifted, or `IGNORE_INDEX`.
            loss_weights: what the loss of each label is multiplied with; None means 1.
            num_items_in_batch: sum of the weights in the whole step (`weight_of_batches`); None means in this batch.
        """
        hidden_tC, labels_t, weights_t = self._predicting(input_ids, position_ids, labels, loss_weights)
        total = chunked_loss(hidden_tC, labels_t, self._head[0], self._chunk_tokens, weights_t)
        count = num_items_in_batch if num_items_in_batch is not None else _sum_of(labels_t, weights_t)
        return {"loss": total / count}

    @torch.no_grad()
    def measure(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, loss_weights: Tensor | None = None
    ) -> tuple[float, float]:
        """Weighted sum of the losses of a batch, and sum of the weights; arguments as in `forward`, no gradients."""
        with mixed_precision(self.model, self._dtype):
            hidden_tC, labels_t, weights_t = self._predicting(input_ids, position_ids, labels, loss_weights)
            losses_t = token_losses(hidden_tC, labels_t, self._head[0], self._chunk_tokens).double()
        total = losses_t.sum() if weights_t is None else (losses_t * weights_t).sum()
        return total.item(), _sum_of(labels_t, weights_t).item()

    def _predicting(
        self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, loss_weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, labels and weights, flat; without the positions that predict nothing where these prevail."""
        hidden_tC = hidden_states(base_of(self.model), input_ids, position_ids).flatten(0, 1)
        # The label of a position is the token after it; a document's first token has none (see data/packing.py).
        labels_t = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        weights_t = None if loss_weights is None else nn.functional.pad(loss_weights[:, 1:], (0, 1)).flatten()
        counted = labels_t != IGNORE_INDEX
        # A long document with a short answer would get logits of its whole length for nothing.
        if 2 * int(counted.sum()) < counted.numel():
            hidden_tC, labels_t = hidden_tC[counted], labels_t[counted]
            weights_t = None if weights_t is None else weights_t[counted]
        return hidden_tC, labels_t, weights_t


def weight_of_batches(batches: list[dict[str, Tensor]]) -> Tensor | None:
    """Sum of the ``loss_weights`` of all micro batches of a step; None if they have none, and every label weighs 1."""
    if not batches or "loss_weights" not in batches[0]:
        return None
    return torch.stack([batch["loss_weights"][:, 1:].sum() for batch in batches]).sum()


def _sum_of(labels_t: Tensor, weights_t: Tensor | None) -> Tensor:
    return (labels_t != IGNORE_INDEX).sum() if weights_t is None else weights_t.sum()
