"""Next-token loss without logits for the whole sequence.

T tokens, C hidden size, V vocabulary. Logits of T = 65,536 tokens and V = 128,256 in float32 are 34 GB; here only
`chunk_tokens` of them exist at one time. The gradient of each chunk is computed right after its loss, while its logits
are there, so that backward multiplies by one number and recomputes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100

Head = Callable[[Tensor], Tensor]
# Logits in float32 that a CPU's cache holds while they become probabilities and gradients.
_CACHED = 2**20


def chunked_loss(
    hidden_TC: Tensor,
    labels_T: Tensor,
    head: nn.Module | Head,
    chunk_tokens: int,
    weights_T: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropies of `labels_T`, float32, differentiable in the hidden states and the head.

    Args:
        hidden_TC: last hidden states, any float dtype.
        labels_T: the token each position shall predict (already shifted), or `IGNORE_INDEX`.
        head: hidden [t, C] -> logits [t, V].
        chunk_tokens: how many tokens get logits at one time.
        weights_T: what each cross-entropy is multiplied with, float32; None means 1.
    """
    parameters = [p for p in head.parameters() if p.requires_grad] if isinstance(head, nn.Module) else []
    return _ChunkedLoss.apply(hidden_TC, labels_T, head, chunk_tokens, weights_T, *parameters)  # type: ignore[no-untyped-call]


@torch.no_grad()
def token_losses(hidden_TC: Tensor, labels_T: Tensor, head: nn.Module | Head, chunk_tokens: int) -> Tensor:
    """Cross-entropy of each label, [T] in float32, for evaluation; 0 where the label is `IGNORE_INDEX`."""
    losses = []
    for hidden, labels in zip(hidden_TC.split(chunk_tokens), labels_T.split(chunk_tokens), strict=True):
        log_p_tV = head(hidden).log_softmax(-1, dtype=torch.float32)
        losses.append(F.nll_loss(log_p_tV, labels, ignore_index=IGNORE_INDEX, reduction="none"))
    return torch.cat(losses)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TC: Tensor,
        labels_T: Tensor,
        head: Head,
        chunk_tokens: int,
        weights_T: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        total = hidden_TC.new_zeros((), dtype=torch.float32)
        hidden_grad_TC = torch.empty_like(hidden_TC) if ctx.needs_input_grad[0] else None
        parameter_grads = [torch.zeros_like(parameter) for parameter in parameters]
        for start in range(0, hidden_TC.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            with torch.enable_grad():
                hidden = hidden_TC[part].detach().requires_grad_(hidden_grad_TC is not None)
                logits = head(hidden)
            logits_grad = logits.detach()
            total += _cross_entropy_(logits_grad, labels_T[part], None if weights_T is None else weights_T[part])
            wanted = ([hidden] if hidden_grad_TC is not None else []) + list(parameters)
            if not wanted:
                continue
            grads = list(torch.autograd.grad(logits, wanted, logits_grad))
            if hidden_grad_TC is not None:
                hidden_grad_TC[part] = grads.pop(0)
            for accumulated, grad in zip(parameter_grads, grads, strict=True):
                accumulated += grad
        ctx.save_for_backward(hidden_grad_TC, *parameter_grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        hidden_grad_TC, *parameter_grads = ctx.saved_tensors
        hidden = hidden_grad_TC * upstream if hidden_grad_TC is not None else None
        return hidden, None, None, None, None, *(grad * upstream for grad in parameter_grads)


def _cross_entropy_(logits_tV: Tensor, labels_t: Tensor, weights_t: Tensor | None) -> Tensor:
    """Sum of the losses; `logits_tV` becomes its gradient with respect to the logits, softmax - one-hot.

    By hand because autograd's own chain (log-softmax, gather, scatter) reads and writes [t, V] floats twice as often.
    In place because a head's last operation does not need its result again; if one did, autograd would raise.
    """
    total = logits_tV.new_zeros((), dtype=torch.float32)
    t, V = logits_tV.shape
    rows = t if logits_tV.is_cuda else max(1, _CACHED // V)
    for start in range(0, t, rows):
        block_tV, labels = logits_tV[start : start + rows], labels_t[start : start + rows]
        counted = (labels != IGNORE_INDEX)[:, None]
        index = labels[:, None].where(counted, 0)
        log_p_tV = block_tV.log_softmax(-1, dtype=torch.float32)
        losses = log_p_tV.gather(1, index).where(counted, 0.0)
        gradient_tV = log_p_tV.exp_()
        gradient_tV.scatter_add_(1, index, torch.full_like(index, -1, dtype=torch.float32))
        if weights_t is not None:
            weights = weights_t[start : start + rows, None]
            losses = losses * weights
            gradient_tV *= weights
        total -= losses.sum()
        block_tV.copy_(gradient_tV.masked_fill_(~counted, 0.0))
    return total
