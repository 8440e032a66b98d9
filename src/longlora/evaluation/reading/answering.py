"""Answers of a model to many prompts, at the price of what the prompts do not have in common.

Two savings, both exact. Sharing: prompts are answered in the order of their tokens, and each keeps of the KV cache what
it begins with, so that every node of the tree of their prefixes is computed once. Batching: short prompts of similar
length are read side by side and decoded together, which takes as many passes as one of them.

N rows (prompts side by side), T tokens, A tokens of the longest answer, C hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longlora.attention.registry import is_sparse
from longlora.evaluation.reading.order import Order, Step
from longlora.evaluation.retrieval.prompt import Prompt, is_right, is_settled, score
from longlora.model.head import OutputHead, mixed_precision
from longlora.model.kv_cache import GrowingCache, common, read_on


@dataclass(frozen=True)
class Answered:
    """What a model said to a prompt."""

    text: str
    """Greedy, up to what ended or settled it; without generation the most likely token at each place of the answer."""
    score: float
    """From 0 to 1."""
    correct: bool
    log_probability: float | None
    """Of the whole right answer, in nats, by teacher forcing; None for a prompt without one."""


@dataclass
class Work:
    """What a reader has done so far. Of prompts, without padding and without the tokens of right answers."""

    tokens_read: int = 0
    """That went through the model."""
    tokens_reused: int = 0
    """That were in the KV cache already."""
    tokens_generated: int = 0
    """Said by the model, with those that ended an answer."""


class PromptReader:
    """Answers prompts with full attention; `work` counts what that took.

    Args:
        decode: token ids to text.
        stop_ids: tokens that end an answer.
        chunk_tokens: tokens of a forward pass at most, over all rows.
        batch_tokens: tokens of prompts that are read side by side at most, padding included; 1: each by itself.

    Raises:
        AssertionError: the model is in training mode or would use the sparse pattern.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: OutputHead,
        decode: Callable[[Sequence[int]], str],
        stop_ids: Collection[int],
        *,
        chunk_tokens: int,
        batch_tokens: int = 1,
    ) -> None:
        assert not is_sparse(model), "evaluation is always full attention"
        assert not model.training, "evaluation is always full attention, without dropout"
        self.work = Work()
        self._model, self._head, self._decode = model, head, decode
        self._stop_ids = frozenset(stop_ids)
        self._order = Order(chunk_tokens, batch_tokens, _even_tokens(model))

    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Answered]]:
        """(index into `prompts`, answer), in the order of `order(prompts)`, each as soon as it is known.

        Raises:
            AssertionError: a prompt has no tokens, or neither an answer nor tokens to generate.
            ModelError: the model has layers that keep something else than keys and values.
        """
        steps = self.order(prompts)
        alone = [prompts[step.indices[0]] for step in steps if len(step.indices) == 1]
        shared = _Rows(self._model, [0], max(map(_room, alone), default=0))
        for step in steps:
            asked = [prompts[index] for index in step.indices]
            rows = shared
            if len(asked) > 1:
                width = max(len(prompt.tokens) for prompt in asked)
                padding = [width - len(prompt.tokens) for prompt in asked]
                rows = _Rows(self._model, padding, width + max(_room(prompt) - len(prompt.tokens) for prompt in asked))
            yield from zip(step.indices, self._answer(asked, rows, step.shared), strict=True)

    def order(self, prompts: Sequence[Prompt]) -> list[Step]:
        """What `answers(prompts)` will do, in its order: for an estimate of the time left."""
        for prompt in prompts:
            assert prompt.tokens, "a prompt has at least one token"
            assert prompt.answer or prompt.max_new_tokens, "a prompt has an answer, or tokens to generate"
        return self._order.steps(prompts)

    @torch.inference_mode()
    def _answer(self, asked: Sequence[Prompt], rows: _Rows, shared: int) -> list[Answered]:
        """Answers to prompts that are the rows of `rows`, of which the first `shared` tokens are read already."""
        for prompt in asked:
            self.work.tokens_read += len(prompt.tokens) - shared
            self.work.tokens_reused += shared
        with mixed_precision(self._model):
            last_NV = self._logits(rows.read([prompt.tokens for prompt in asked], shared, self._order.chunk_tokens))
            likeliest, log_probabilities = self._force(asked, rows, last_NV)
            said = self._generate(asked, rows, likeliest)
        answered = []
        for prompt, guess, log_probability, answer in zip(asked, likeliest, log_probabilities, said, strict=True):
            if prompt.max_new_tokens:
                value = score(prompt.metric, answer.text, prompt.references)
                right = is_right(prompt.metric, answer.text, prompt.references)
                answered.append(Answered(answer.text, value, right, log_probability))
            else:
                right = tuple(guess) == prompt.answer
                answered.append(Answered(self._decode(guess), float(right), right, log_probability))
        return answered

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden).float()

    def _force(
        self, asked: Sequence[Prompt], rows: _Rows, last_NV: Tensor
    ) -> tuple[list[list[int]], list[float | None]]:
        """The most likely token at each place of the right answer (one at least), and its log-probability."""
        longest = max(len(prompt.answer) for prompt in asked)
        right_NA = torch.tensor([[*p.answer, *[0] * (longest - len(p.answer))] for p in asked], device=last_NV.device)
        logits_NAV = last_NV[:, None]
        if longest > 1:
            hidden_NAC = rows.add(right_NA[:, :-1])
            following = self._logits(hidden_NAC.flatten(0, 1)).unflatten(0, hidden_NAC.shape[:2])
            logits_NAV = torch.cat([logits_NAV, following], 1)
        lengths = [len(prompt.answer) for prompt in asked]
        guesses = [row[: max(1, length)] for row, length in zip(logits_NAV.argmax(-1).tolist(), lengths, strict=True)]
        if not longest:
            return guesses, [None] * len(asked)
        log_p_NA = logits_NAV.log_softmax(-1).gather(2, right_NA[:, :, None])[:, :, 0].tolist()
        return guesses, [sum(row[:length]) if length else None for row, length in zip(log_p_NA, lengths, strict=True)]

    def _generate(self, asked: Sequence[Prompt], rows: _Rows, likeliest: Sequence[Sequence[int]]) -> list[_Said]:
        """Greedy answers. As far as the right answer is what the model says, teacher forcing has read it already."""
        said = [_Said(prompt, self._decode, self._stop_ids) for prompt in asked]
        speaking = [answer for answer in said if answer.is_open]
        forced = [min(common(guess, p.answer), len(guess) - 1) for guess, p in zip(likeliest, asked, strict=True)]
        kept = min((count for count, answer in zip(forced, said, strict=True) if answer.is_open), default=0)
        rows.forget_after(kept)
        for answer, guess in zip(said, likeliest, strict=True):
            for token in guess[: kept + 1]:
                answer.say(token)
        while any(answer.is_open for answer in speaking):
            # Rows that are done go on with any token: what they read is seen by none.
            last_N1 = torch.tensor([[answer.last] for answer in said], device=self._model.device)
            tokens = self._logits(rows.add(last_N1)[:, 0]).argmax(-1).tolist()
            for answer, token in zip(said, tokens, strict=True):
                answer.say(token)
        self.work.tokens_generated += sum(answer.count for answer in said)
        return said


class _Rows:
    """Prompts side by side in one KV cache, padded on the left to the same width."""

    def __init__(self, model: PreTrainedModel, padding: Sequence[int], capacity: int) -> None:
        self._model = model
        self._cache = GrowingCache(model.config, capacity)
        self._padding_N = torch.tensor(padding, device=model.device) if any(padding) else None
        self._width = 0
        self._last_NC: Tensor | None = None

    def read(self, prompts: Sequence[Sequence[int]], shared: int, chunk_tokens: int) -> Tensor:
        """Hidden states [N, C] of the last token of each; the first `shared` tokens are those of the call before."""
        self._width = max(map(len, prompts))
        padded = [[*[0] * (self._width - len(tokens)), *tokens[shared:]] for tokens in prompts]
        ids_NT = torch.tensor(padded, dtype=torch.long, device=self._model.device)
        self.forget_after(shared - self._width)
        if shared < self._width:  # else it is the same prompt again
            for part_NT in ids_NT.split(max(1, chunk_tokens // len(prompts)), dim=1):
                self._last_NC = self.add(part_NT)[:, -1]
        assert self._last_NC is not None
        return self._last_NC

    def add(self, ids_NT: Tensor) -> Tensor:
        """Read one more piece of each row -> hidden states [N, T, C]."""
        return read_on(self._model, ids_NT, self._cache, self._padding_N)

    def forget_after(self, count: int) -> None:
        """Cut the cache back to `count` tokens after the prompts."""
        self._cache.crop_to(self._width + count)


@dataclass
class _Said:
    """An answer as it is generated: nothing is added once it is stopped, settled or long enough."""

    prompt: Prompt
    decode: Callable[[Sequence[int]], str]
    stop_ids: Collection[int]
    text: str = ""
    count: int = 0
    tokens: list[int] = field(default_factory=list)
    is_open: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_open = self.prompt.max_new_tokens > 0

    @property
    def last(self) -> int:
        return self.tokens[-1] if self.tokens else 0

    def say(self, token: int) -> None:
        if not self.is_open:
            return
        self.count += 1
        if token in self.stop_ids:
            self.is_open = False
            return
        self.tokens.append(token)
        self.text = self.decode(self.tokens)
        settled = is_settled(self.prompt.metric, self.text, self.prompt.references)
        self.is_open = not settled and len(self.tokens) < self.prompt.max_new_tokens


def _room(prompt: Prompt) -> int:
    """Tokens that the cache holds at most while a prompt is answered."""
    return len(prompt.tokens) + max(len(prompt.answer), prompt.max_new_tokens)


def _even_tokens(model: PreTrainedModel) -> float:
    """Tokens at which attending to them costs what the rest of the layers costs: 4 FLOPs a channel, 2 a weight."""
    config = model.config.get_text_config(decoder=True)
    embeddings = model.get_input_embeddings().weight.numel()
    weights = sum(parameter.numel() for parameter in model.base_model.parameters()) - embeddings
    return max(1.0, weights / (2 * config.num_hidden_layers * config.hidden_size))
