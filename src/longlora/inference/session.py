"""`LongSession`: questions about long documents, answered token by token with full attention.

The prompt is read in chunks into a KV cache with room to grow, so that neither its logits nor a square of its length
is ever in memory. What a prompt has in common with the one before (the document, the earlier turns) is in the cache and
is not read again.

T tokens, C hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from longlora.attention.cached import cached_attention
from longlora.attention.registry import is_sparse
from longlora.errors import DataError, ModelError
from longlora.inference.lengths import Lengths, Numbers
from longlora.inference.prompt import Message, chat_tokens
from longlora.inference.text_stream import TextStream
from longlora.model.end_tokens import end_tokens
from longlora.model.head import mixed_precision, output_head
from longlora.model.kv_cache import GrowingCache, common, read_on


@dataclass(frozen=True)
class Sampling:
    """How each token is chosen: the most likely one at temperature 0, else drawn.

    Raises:
        DataError: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    """Draw from the most likely tokens that have this probability together."""
    seed: int = 0
    """The same seed, prompt and machine give the same answer."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise DataError(f"temperature {self.temperature:g} is below 0 or no number: 0 takes the most likely token")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p {self.top_p:g} is not above 0 and at most 1: 1 leaves out no token")
        if not 0 <= self.seed < 2**63:
            raise DataError(f"seed {self.seed} is not from 0 to 2**63 - 1: 0 is usual")

    def warpers(self) -> LogitsProcessorList | None:
        """transformers' own, in the order of `generate`; None for the most likely token."""
        if self.temperature == 0:
            return None
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers


class LongSession:
    """A model, its tokenizer and the KV cache of what it read last. One answer at a time.

    Args:
        chunk_tokens: tokens of a forward pass at most while a prompt is read.

    Raises:
        ModelError: the model cannot be read step by step, or its config names no window.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, chunk_tokens: int = 2048) -> None:
        if chunk_tokens < 1:
            raise DataError(f"chunk_tokens {chunk_tokens} is below 1: 2048 is usual")
        if is_sparse(model) or model.training:
            raise AssertionError("answers are always given with full attention, without dropout")
        self.window = _window(model)
        self._model, self._tokenizer, self._chunk_tokens = model, tokenizer, chunk_tokens
        self._head = output_head(model)
        self._ends = end_tokens(model, tokenizer)
        self._cache = _new_cache(model, 0)
        self._kept: list[int] = []
        """Tokens that the cache holds."""

    def count(self, text: str) -> int:
        """Tokens of `text` by itself."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def ask(
        self,
        conversation: Sequence[Message],
        *,
        max_new_tokens: int = 512,
        sampling: Sampling = Sampling(),
    ) -> Answer:
        """The answer to the last message, which comes while it is iterated.

        Raises:
            DataError: prompt and answer together are longer than the window; the message says the numbers.
            ModelError: the chat template does not take the conversation.
        """
        if max_new_tokens < 1:
            raise DataError(f"max_new_tokens {max_new_tokens} is below 1: keep room for an answer")
        tokens = chat_tokens(self._tokenizer, conversation)
        lengths = self._lengths(conversation, len(tokens), max_new_tokens)
        if lengths.missing > 0:
            raise DataError(lengths.refusal())
        return Answer(self, tokens, lengths, sampling)

    def _lengths(self, conversation: Sequence[Message], prompt: int, answer: int) -> Lengths:
        documents = sum(self.count(text) for message in conversation for text in message.documents)
        history = sum(self.count(message.text) for message in conversation[:-1])
        question = self.count(conversation[-1].text)
        # Tokens across the seams of the parts may be one, so that the template's part is what is left of the whole.
        template = max(0, prompt - documents - history - question)
        return Lengths(prompt - history - question - template, history, question, template, answer, self.window)

    def _start(self, tokens: Sequence[int], room: int) -> int:
        """Make ready for a prompt -> how many of its tokens are in the cache; at least one is left to read."""
        shared = min(common(self._kept, tokens), len(tokens) - 1)
        if shared == 0:
            self._cache = _new_cache(self._model, len(tokens) + room)
        # Also after an interrupt in the middle of a pass, when some layers hold more than others.
        self._cache.crop_to(shared)
        self._cache.reserve(len(tokens) + room)
        self._kept = list(tokens[:shared])
        return shared

    @torch.inference_mode()
    def _read(self, tokens: Sequence[int]) -> Tensor:
        """Read a chunk of a prompt -> hidden state [C] of its last token."""
        with cached_attention(self._model), mixed_precision(self._model):
            return self._add(tokens)

    @torch.inference_mode()
    def _next_logits(self, token: int) -> Tensor:
        with mixed_precision(self._model):
            return self._logits(self._add([token]))

    @torch.inference_mode()
    def _logits(self, hidden_C: Tensor) -> Tensor:
        """Logits [V] in float32."""
        with mixed_precision(self._model):
            return self._head(hidden_C[None])[0].float()

    def _add(self, tokens: Sequence[int]) -> Tensor:
        ids_1T = torch.tensor([tokens], dtype=torch.long, device=self._model.device)
        try:
            hidden_C = read_on(self._model, ids_1T, self._cache)[0, -1]
        except torch.OutOfMemoryError:
            raise ModelError(
                f"out of memory after {len(self._kept):,} tokens of the prompt: give a shorter document, or smaller "
                f"chunks than {self._chunk_tokens} tokens"
            ) from None
        self._kept += tokens
        return hidden_C


class Answer:
    """An answer as it comes: iterate it once; `text` and `numbers` say how far it is.

    An empty piece comes after each chunk of the prompt that was read, so that progress can be shown; then pieces of
    text with at least one whole character. An answer that is not iterated to its end is left as it is.
    """

    def __init__(self, session: LongSession, tokens: Sequence[int], lengths: Lengths, sampling: Sampling) -> None:
        self._session, self._tokens, self._sampling = session, tokens, sampling
        self.numbers = Numbers(lengths, reused=0)
        self.text = ""

    def __iter__(self) -> Iterator[str]:
        try:
            for piece in self._pieces():
                self.text += piece
                yield piece
        finally:
            self.numbers.ended = self.numbers.ended or "stopped"

    def _pieces(self) -> Iterator[str]:
        session, numbers = self._session, self.numbers
        began = time.perf_counter()
        budget = numbers.lengths.answer
        numbers.reused = numbers.read = session._start(self._tokens, budget)
        while numbers.read < len(self._tokens):
            chunk = self._tokens[numbers.read : numbers.read + session._chunk_tokens]
            hidden_C = session._read(chunk)
            numbers.read += len(chunk)
            yield ""
        logits_V = session._logits(hidden_C)
        chooser = _Chooser(self._sampling, logits_V.device)
        said = TextStream(session._tokenizer)
        while True:
            token = chooser.choose(logits_V)
            now = time.perf_counter()
            if numbers.to_first_token is None:
                numbers.to_first_token, first = now - began, now
            if token in session._ends:
                numbers.ended = "end"
                break
            numbers.tokens, numbers.generating = numbers.tokens + 1, now - first
            if piece := said.add(token):
                yield piece
            if numbers.tokens == budget:
                numbers.ended = "length"
                break
            logits_V = session._next_logits(token)
        if rest := said.rest():
            yield rest


class _Chooser:
    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self._warpers = sampling.warpers()
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._none = torch.empty((1, 0), dtype=torch.long, device=device)  # these warpers look at no earlier token

    def choose(self, logits_V: Tensor) -> int:
        if self._warpers is None:
            return int(logits_V.argmax())
        p_V = self._warpers(self._none, logits_V[None])[0].softmax(-1)
        return int(torch.multinomial(p_V, 1, generator=self._generator))


def _new_cache(model: PreTrainedModel, capacity: int) -> GrowingCache:
    try:
        return GrowingCache(model.config, capacity)
    except ModelError as error:
        raise ModelError(
            f"{model.config.model_type} keeps a state that cannot be cut back to ask a second question: use "
            "`longlora serve`"
        ) from error


def _window(model: PreTrainedModel) -> int:
    window = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not window:
        raise ModelError(
            f"the config of {model.config.model_type} names no max_position_embeddings, so it is not known how long a "
            "document may be: add it to config.json"
        )
    return int(window)
