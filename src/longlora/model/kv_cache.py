"""A KV cache that grows without copying and can be cut back to any length: what prompts that begin alike are read with.

transformers' DynamicCache concatenates, so that every token that is added copies all of the keys and values before it,
and what comes after a branch of the text has to be copied away. Here each layer writes into a buffer with room to spare
and remembers how much of it counts.

B rows, K key/value heads, T tokens, D head dim, C hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from longlora.errors import ModelError


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, K, T, D] of one layer, as views of buffers with room for more tokens; for inference only.

    Layers with a window keep all tokens as well: the mask hides what is too far, and a cut-back layer needs it again.
    """

    def __init__(self, capacity: int = 0) -> None:
        self._capacity = capacity
        self._length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        """Those of the tokens that count. What is set in their place (other rows, say) becomes the buffer."""
        return None if self._keys is None else self._keys[:, :, : self._length]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._keys, self._length = keys, 0 if keys is None else keys.shape[-2]

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return None if self._values is None else self._values[:, :, : self._length]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._values, self._length = values, 0 if values is None else values.shape[-2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make buffers of the shape, dtype and device of what is to be kept, of which nothing counts yet."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._keys, self._values = (_room_like(states, self._capacity) for states in (key_states, value_states))
        self._length = 0
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add [B, K, new, D] behind the tokens that count; returns views of all [B, K, T + new, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self._length, self._length + key_states.shape[-2]
        buffers = []
        for buffer, states in ((self._keys, key_states), (self._values, value_states)):
            assert buffer is not None
            if stop > buffer.shape[-2]:
                buffer = _grown(buffer, start, max(stop, 2 * buffer.shape[-2]))
            buffer[:, :, start:stop] = states
            buffers.append(buffer)
        (self._keys, self._values), self._length = buffers, stop
        return self._keys[:, :, :stop], self._values[:, :, :stop]

    def get_seq_length(self) -> int:
        """Tokens that count."""
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """transformers' way to cut back: minus the number of tokens to forget."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to remove")
        self.crop_to(max(0, self._length + tokens_to_remove))

    def crop_to(self, length: int) -> None:
        """Forget what comes after `length` tokens. Costs nothing; what is added next is written over it."""
        assert 0 <= length <= self._length, f"{length} of {self._length} tokens"
        self._length = length

    def reserve(self, capacity: int) -> None:
        """Have room for `capacity` tokens in all, no more: what is not there is copied once."""
        if self._keys is not None and self._values is not None and self._keys.shape[-2] < capacity:
            self._keys = _grown(self._keys, self._length, capacity)
            self._values = _grown(self._values, self._length, capacity)


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """The cache of a model of `config`, with room for `capacity` tokens from the start; room is doubled when it ends.

    Raises:
        ModelError: a layer keeps something that cannot be cut back, such as the state of linear attention.
    """

    def __init__(self, config: PreTrainedConfig, capacity: int = 0) -> None:
        super().__init__(config=config)
        new_layer = partial(GrowingLayer, capacity)
        for index, layer in enumerate(self.layers):
            kind = type(layer)
            if kind in (DynamicLayer, DynamicSlidingWindowLayer):
                self.layers[index] = new_layer()
            elif kind is not DummyLayer:
                raise ModelError(
                    f"layer {index} of {config.model_type} keeps a state ({kind.__name__}) that cannot be cut back to "
                    "ask a question: use `longlora serve` for answers, and measure perplexity alone, with "
                    "eval.prefill_chunk_tokens as large as the context"
                )
        # For models that use a layer several times, under numbers that their config does not count.
        self.layer_class_to_replicate = new_layer

    def crop_to(self, length: int) -> None:
        """Forget what comes after the first `length` tokens, in all layers, at no cost.

        Raises:
            AssertionError: there are fewer.
        """
        for layer in self.layers:
            if isinstance(layer, GrowingLayer) and layer.is_initialized:
                layer.crop_to(length)

    def reserve(self, capacity: int) -> None:
        """Have room for `capacity` tokens in all layers, so that none is doubled on the way there."""
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.reserve(capacity)


def read_on(
    model: PreTrainedModel, ids_BT: Tensor, cache: GrowingCache | None = None, padding_B: Tensor | None = None
) -> Tensor:
    """Last hidden states [B, T, C] of tokens that follow those in `cache`, which holds them afterwards.

    Args:
        padding_B: how many tokens at the beginning of each row are padding; None if there is none.

    Raises:
        ModelError: the model has a memory of its own instead of the cache.
    """
    seen = cache.get_seq_length() if cache is not None else 0
    places_T = torch.arange(seen, seen + ids_BT.shape[1], device=ids_BT.device)
    positions_BT, mask_BT = places_T.expand(ids_BT.shape), None
    if padding_B is not None:
        positions_BT = (positions_BT - padding_B[:, None]).clamp(min=0)
        mask_BT = (torch.arange(seen + ids_BT.shape[1], device=ids_BT.device) >= padding_B[:, None]).long()
    output = model.base_model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    if cache is not None and cache.get_seq_length() != seen + ids_BT.shape[1]:
        raise ModelError(
            f"{type(model).__name__} does not write to a KV cache that it is given: use `longlora serve` for answers, "
            "and measure perplexity alone, with eval.prefill_chunk_tokens as large as the context"
        )
    return output.last_hidden_state


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with: what a cache of one holds of the other."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def _grown(buffer: Tensor, length: int, capacity: int) -> Tensor:
    """The first `length` tokens of `buffer` in a new one of `capacity`."""
    grown = _room_like(buffer, capacity)
    grown[:, :, :length] = buffer[:, :, :length]
    return grown


def _room_like(states: Tensor, capacity: int) -> Tensor:
    rows, heads, _, size = states.shape
    return torch.empty((rows, heads, capacity, size), dtype=states.dtype, device=states.device)
