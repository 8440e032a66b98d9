"""One reading of a long text by a model: the loss of every token, and questions asked on the way.

Reading 16,384 tokens with full attention costs the same whether one question is asked at its end or ten at several
lengths: the KV cache of the text up to a position is the state in which the question would find the model. So a text is
read once, up to each question in turn; the question is asked, and the cache cut back to where the text goes on. This is
exact, not an approximation, for full attention.

T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longlora.attention.registry import is_sparse
from longlora.memory.chunked_loss import IGNORE_INDEX, token_losses
from longlora.model.head import OutputHead, mixed_precision
from longlora.model.kv_cache import GrowingCache, read_on


@dataclass(frozen=True)
class Question:
    """Asked after the first `position` tokens of the text; `answer` is what a model that found it would say."""

    position: int
    tokens: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """From one pass over question and right answer (teacher forcing): the most likely token at each place, and the
    log-probability (nats) of the right answer as a whole.

    `likeliest` equals the right answer exactly if greedy decoding would give it; after its first wrong token it is not
    what greedy decoding would go on with.
    """

    likeliest: tuple[int, ...]
    log_probability: float


@dataclass(frozen=True)
class Reading:
    """`losses_T[t]` is the loss of token t given those before it (nats, float32, CPU); NaN for the first token."""

    losses_T: Tensor
    answers: list[Answer]


@torch.inference_mode()
def read(
    model: PreTrainedModel,
    head: OutputHead,
    tokens: Sequence[int],
    questions: Sequence[Question] = (),
    *,
    chunk_tokens: int,
    loss_chunk_tokens: int = 1024,
) -> Reading:
    """Read `tokens` once with full attention, and answer `questions`.

    Args:
        chunk_tokens: tokens of a forward pass at most.
        loss_chunk_tokens: tokens whose logits exist at one time.

    Raises:
        AssertionError: the model is in training mode or would use the sparse pattern; a question comes after the end.
        ModelError: a KV cache is needed, and the model has layers that keep something else.
    """
    assert not is_sparse(model), "evaluation is always full attention"
    assert not model.training, "evaluation is always full attention, without dropout"
    ids_T = torch.as_tensor(tokens, dtype=torch.long, device=model.device)
    losses_T = torch.full((len(tokens),), torch.nan)
    cache = None
    if questions or len(tokens) > chunk_tokens:
        room = max((len(question.tokens) + len(question.answer) for question in questions), default=0)
        cache = GrowingCache(model.config, len(tokens) + room)
    answers: dict[int, Answer] = {}
    start = 0
    with mixed_precision(model):
        for stop in _stops(len(tokens), chunk_tokens, questions):
            if stop > start:
                hidden_TC = read_on(model, ids_T[None, start:stop], cache)[0]
                labels = ids_T[start + 1 : stop + 1]
                if len(labels) < stop - start:  # the last token predicts nothing
                    labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)
                losses = token_losses(hidden_TC, labels, head, loss_chunk_tokens).cpu()
                losses_T[start + 1 : stop + 1] = losses[: len(tokens) - start - 1]
            for index, question in enumerate(questions):
                if question.position == stop:
                    assert cache is not None
                    answers[index] = _ask(model, head, question, cache)
            start = stop
    return Reading(losses_T, [answers[index] for index in range(len(questions))])


def _stops(tokens: int, chunk_tokens: int, questions: Sequence[Question]) -> list[int]:
    """Where the pieces end in which a text is read: after `chunk_tokens` at most, and wherever a question is asked."""
    stops: list[int] = []
    start = 0
    for bound in sorted({*(question.position for question in questions), tokens}):
        assert bound <= tokens, f"a question at {bound} of {tokens} tokens"
        stops += [*range(start + chunk_tokens, bound, chunk_tokens), bound]
        start = bound
    return stops


def _ask(model: PreTrainedModel, head: OutputHead, question: Question, cache: GrowingCache) -> Answer:
    asked = torch.tensor([*question.tokens, *question.answer], device=model.device)
    hidden_TC = read_on(model, asked[None], cache)[0, len(question.tokens) - 1 : -1]
    cache.crop_to(question.position)
    log_p_TV = head(hidden_TC).float().log_softmax(-1)
    right = log_p_TV.gather(1, asked[len(question.tokens) :, None])
    return Answer(tuple(log_p_TV.argmax(-1).tolist()), float(right.sum()))
