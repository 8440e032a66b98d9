"""One reading of a long text by a model: the loss of every token, and questions asked on the way.

Reading 16,384 tokens with full attention costs the same whether one question is asked at its end or ten at several
lengths: the KV cache of the text up to a position is the state in which the question would find the model. So a text is
read once, and each question is answered from a view of the cache that ends where the question begins. This is exact,
not an approximation, for full attention.

T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from longlora.attention.registry import is_sparse
from longlora.memory.chunked_loss import IGNORE_INDEX, token_losses
from longlora.model.head import OutputHead, mixed_precision


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
    score: bool = True,
) -> Reading:
    """Read `tokens` once with full attention, `chunk_tokens` at a time, and answer `questions`.

    Args:
        score: compute the losses; without, they are NaN and only questions are answered.

    Raises:
        AssertionError: the model is in training mode or would use the sparse pattern.
    """
    assert not is_sparse(model), "evaluation is always full attention"
    assert not model.training, "evaluation is always full attention, without dropout"
    ids_T = torch.as_tensor(tokens, dtype=torch.long, device=model.device)
    losses_T = torch.full((len(tokens),), torch.nan)
    cache = DynamicCache() if questions or len(tokens) > chunk_tokens else None
    answers: dict[int, Answer] = {}
    order = sorted(range(len(questions)), key=lambda index: questions[index].position)
    with mixed_precision(model):
        for start in range(0, len(tokens), chunk_tokens):
            stop = min(start + chunk_tokens, len(tokens))
            hidden_TC = _hidden(model, ids_T[start:stop], cache, start)
            if score:
                labels = ids_T[start + 1 : stop + 1]
                if len(labels) < stop - start:  # the last token predicts nothing
                    labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)
                losses = token_losses(hidden_TC, labels, head, loss_chunk_tokens).cpu()
                losses_T[start + 1 : stop + 1] = losses[: len(tokens) - start - 1]
            while order and questions[order[0]].position <= stop:
                index = order.pop(0)
                assert cache is not None
                answers[index] = _ask(model, head, questions[index], cache)
    return Reading(losses_T, [answers[index] for index in range(len(questions))])


def _hidden(model: PreTrainedModel, ids_T: Tensor, cache: DynamicCache | None, start: int) -> Tensor:
    position_ids = torch.arange(start, start + len(ids_T), device=ids_T.device)[None]
    output = model.base_model(
        input_ids=ids_T[None], position_ids=position_ids, past_key_values=cache, use_cache=cache is not None
    )
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


def _ask(model: PreTrainedModel, head: OutputHead, question: Question, cache: DynamicCache) -> Answer:
    asked = torch.tensor([*question.tokens, *question.answer], device=model.device)
    branch = _view(cache, question.position)
    hidden_TC = _hidden(model, asked, branch, question.position)[len(question.tokens) - 1 : -1]
    log_p_TV = head(hidden_TC).float().log_softmax(-1)
    right = log_p_TV.gather(1, asked[len(question.tokens) :, None])
    return Answer(tuple(log_p_TV.argmax(-1).tolist()), float(right.sum()))


def _view(cache: DynamicCache, length: int) -> DynamicCache:
    """A cache of the first `length` tokens; shares memory with `cache` until it is written to (which copies)."""
    return DynamicCache([(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in cache.layers])
