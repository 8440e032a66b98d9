"""Token ids -> loss through the decoder and the chunked loss: what Trainer (and DDP) sees as the model."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longlora.attention.sequence import SequenceCut, rows_cut
from longlora.data.stretches import Stretch
from longlora.memory.chunked_loss import IGNORE_INDEX, chunked_loss, token_losses
from longlora.model.head import OutputHead, hidden_states, mixed_precision, output_head
from longlora.model.trainable import TrainedModel, base_of


class LossModel(nn.Module):
    """Mean loss of a batch of `longlora.data.stretches.StretchCollator` or `longlora.data.packing.collate`.

    Where processes share rows, each has the loss of its own stretches: those of all add up to that of the step. One
    that has no label must run backward too, and can: its loss of 0 depends on all that others depend on.

    B rows, T tokens, C hidden size, t tokens that are to be predicted.
    """

    # Read by Trainer: give us the number of labels in the whole step, so that every token weighs the same however the
    # step is cut into micro batches.
    accepts_loss_kwargs = True

    def __init__(
        self, model: TrainedModel, chunk_tokens: int, dtype: torch.dtype, group: dist.ProcessGroup | None = None
    ) -> None:
        """`chunk_tokens` get logits at one time; `dtype` is what `model` computes in, whatever its weights are.

        Args:
            group: the processes that share rows, in the order of their stretches.
        """
        super().__init__()
        self.model = model
        self._group = group
        self._dtype = dtype
        self.head_loss = HeadLoss(output_head(base_of(model), dtype), chunk_tokens)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        loss_weights: Tensor | None = None,
        stretch: Stretch | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """``{"loss": weighted sum of the losses / num_items_in_batch}``; the tensors but for the last are [B, T].

        Args:
            labels: `IGNORE_INDEX`, or with a `stretch` the next token, without one that of the position itself.
            loss_weights: what the loss of each label is multiplied with; None means 1.
            stretch: what this is of whole rows.
            num_items_in_batch: sum of the weights in the whole step (`weight_of_batches`); None means in this batch.
        """
        hidden_tC, labels_t, weights_t = self._predicting(input_ids, position_ids, labels, loss_weights, stretch)
        total = self.head_loss(hidden_tC, labels_t, weights_t)
        count = num_items_in_batch if num_items_in_batch is not None else _sum_of(labels_t, weights_t)
        return {"loss": total / count}

    @torch.no_grad()
    def measure(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        loss_weights: Tensor | None = None,
        stretch: Stretch | None = None,
    ) -> tuple[float, float]:
        """Weighted sum of the losses of a batch, and sum of the weights; arguments as in `forward`, no gradients.

        Of all stretches together, where processes share the rows.
        """
        with mixed_precision(self.model, self._dtype):
            hidden_tC, labels_t, weights_t = self._predicting(input_ids, position_ids, labels, loss_weights, stretch)
            losses_t = self.head_loss(hidden_tC, labels_t, apart=True).double()
        total = losses_t.sum() if weights_t is None else (losses_t * weights_t).sum()
        found = torch.stack([total, _sum_of(labels_t, weights_t).double()])
        if stretch is not None and stretch.world > 1:
            dist.all_reduce(found, group=self._group)
        return found[0].item(), found[1].item()

    def _predicting(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        loss_weights: Tensor | None,
        stretch: Stretch | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, labels and weights, flat; without the positions that predict nothing where these prevail."""
        with rows_cut(self._cut(stretch)):
            hidden_tC = hidden_states(base_of(self.model), input_ids, position_ids).flatten(0, 1)
        if stretch is None:
            # The label of a position is the token after it; a document's first token has none (see data/packing.py).
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
            loss_weights = None if loss_weights is None else nn.functional.pad(loss_weights[:, 1:], (0, 1))
        labels_t, weights_t = labels.flatten(), None if loss_weights is None else loss_weights.flatten()
        counted = labels_t != IGNORE_INDEX
        # A long document with a short answer would get logits of its whole length for nothing.
        if 2 * int(counted.sum()) < counted.numel():
            hidden_tC, labels_t = hidden_tC[counted], labels_t[counted]
            weights_t = None if weights_t is None else weights_t[counted]
        return hidden_tC, labels_t, weights_t

    def _cut(self, stretch: Stretch | None) -> SequenceCut | None:
        if stretch is None or stretch.world == 1:
            return None
        assert self._group is not None, "a cut batch needs the group of its processes"
        return SequenceCut(self._group, stretch.rank, stretch.world, stretch.bounds_B, stretch.tokens)


class HeadLoss(nn.Module):
    """The loss of hidden states, in chunks: a module of its own, so that ZeRO-3 gathers the head once for all chunks.

    Processes may have different numbers of chunks, and gathering takes all of them.
    """

    def __init__(self, head: OutputHead, chunk_tokens: int) -> None:
        super().__init__()
        # In a tuple, so that the head's parameters are not registered a second time.
        self._head, self._chunk_tokens = (head,), chunk_tokens

    @property
    def head(self) -> OutputHead:
        return self._head[0]

    def forward(
        self, hidden_tC: Tensor, labels_t: Tensor, weights_t: Tensor | None = None, *, apart: bool = False
    ) -> Tensor:
        """`chunked_loss`, or `token_losses` if `apart`."""
        if apart:
            return token_losses(hidden_tC, labels_t, self.head, self._chunk_tokens)
        return chunked_loss(hidden_tC, labels_t, self.head, self._chunk_tokens, weights_t)


def weight_of_batches(batches: list[dict[str, Tensor]]) -> Tensor:
    """Sum of the ``loss_weights`` of all micro batches of a step, or where they have none the number of labels.

    Both lie where a prediction is made, or are those of `collate`, where no label is lost by the shift.
    """
    return torch.stack([_sum_of(batch["labels"], batch.get("loss_weights")) for batch in batches]).sum()


def _sum_of(labels_t: Tensor, weights_t: Tensor | None) -> Tensor:
    return (labels_t != IGNORE_INDEX).sum() if weights_t is None else weights_t.sum()
