"""What the trainer sees as the model: token ids in, the mean loss of a step out, without logits of whole sequences."""

from __future__ import annotations

from peft import PeftModel
from torch import Tensor, nn

from longlora.memory.chunked_loss import IGNORE_INDEX, chunked_loss
from longlora.model.head import hidden_states, output_head


class LossModel(nn.Module):
    """Token ids -> mean loss, through the decoder and the chunked loss: what Trainer (and DDP) sees as the model."""

    # Read by Trainer: give us the number of labels in the whole step, so that every token weighs the same however the
    # step is cut into micro batches.
    accepts_loss_kwargs = True

    def __init__(self, peft_model: PeftModel, chunk_tokens: int) -> None:
        super().__init__()
        self.peft_model = peft_model
        self._chunk_tokens = chunk_tokens
        # In a tuple, so that the head's parameters are not registered a second time.
        self._head = (output_head(peft_model.get_base_model()),)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        hidden_BTC = hidden_states(self.peft_model.get_base_model(), input_ids, position_ids)
        # The label of a position is the token after it; a document's first token has none (see data/packing.py).
        labels_BT = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        total = chunked_loss(hidden_BTC.flatten(0, 1), labels_BT.flatten(), self._head[0], self._chunk_tokens)
        count = num_items_in_batch if num_items_in_batch is not None else (labels_BT != IGNORE_INDEX).sum()
        return {"loss": total / count}
