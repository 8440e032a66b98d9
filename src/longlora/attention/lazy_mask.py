"""The mask function registered with transformers: it builds no mask, but hands on what is known of one.

From a `LazyMask` sparse attention reads document bounds and the window of a layer, O(T), and full attention asks for
the ordinary mask.

B batch, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, packed_sequence_mask_function

from longlora.attention.backends import Plans
from longlora.attention.passes import AHEAD, current_pass
from longlora.attention.sequence import SequenceCut
from longlora.errors import ModelError

_OWN_ATTENTION = "train with the model's own attention, which longlora.use_full(model) brings back"
# Steps from a query to the keys that are asked about in `LazyMask._require_known`; odd numbers of no particular kind.
_PROBES = (-1, 2, 7, 61, 509, 4093, 32749)


class LazyMask:
    """One mask of a batch: what transformers passes to a mask function, and what can be derived from it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._full: dict[str, Any] = {}
        self.plans = Plans()
        # Kept, because a layer may be computed again in the backward pass, after another forward pass.
        self._pass = current_pass()

    @property
    def sparse(self) -> bool | None:
        """Whether the forward pass is sparse, as decided when it began; None if it went past the hooks."""
        return self._pass.sparse

    @property
    def cut(self) -> SequenceCut | None:
        """How the rows are cut across processes: then these are the bounds that count, and not those of this mask."""
        return self._pass.cut

    @property
    def window(self) -> int | None:
        """Tokens a query of this kind of layer sees at most, itself included; None in full-attention layers.

        Chunked layers say so as well: what ends at a chunk is in the bounds.
        """
        return self._arguments.get("local_size")  # type: ignore[no-any-return]

    def full_for(self, implementation: str) -> Any:
        """The mask that transformers makes for this implementation; None means plain causal. Kept for other layers."""
        if implementation not in self._full:
            arguments = self._arguments | self._documents_apart()
            self._full[implementation] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**arguments)
        return self._full[implementation]

    def _documents_apart(self) -> dict[str, Any]:
        """What keeps documents apart of which only the inputs of the model tell (`_told_BT`), for full attention.

        Beside a padding mask or a cache transformers takes no positions for document bounds, and neither does this.
        """
        arguments = self._arguments
        B, T = arguments["batch_size"], arguments["q_length"]
        if arguments["kv_length"] != T or arguments.get("attention_mask") is not None or arguments.get("use_vmap"):
            return {}
        told_BT = self._told_BT(torch.zeros(B, T, dtype=torch.bool, device=arguments["device"]))
        if not told_BT.any():
            return {}
        same_document = packed_sequence_mask_function(told_BT.cumsum(-1))
        return {
            "mask_function": and_masks(arguments["mask_function"], same_document),
            "allow_is_causal_skip": False,
        }

    @property
    def contiguous(self) -> NoReturn:
        """What `generate` with a static cache asks of a mask; only a model without `use_s2` gets here."""
        raise ModelError(
            "a static KV cache with s2_attn in the model's config alone: call longlora.use_s2(model), or "
            "model.set_attn_implementation('sdpa') to generate"
        )

    ndim = contiguous  # an older transformers asks for this first

    @cached_property
    def bounds_B(self) -> list[list[int]]:
        """Document bounds of each row, from 0 to the end of its last document; what follows is padding.

        transformers says which tokens belong together only through a function of (batch, head, query, key). Asking it
        about neighbours gives the bounds of packed documents, and of chunks, in O(T), for every architecture.

        Raises:
            ModelError: there is a KV cache, padding that is not on the right, or a mask that is more than causal
                attention inside documents.
        """
        arguments = self._arguments
        B, T, device = arguments["batch_size"], arguments["q_length"], arguments["device"]
        if arguments["kv_length"] != T:
            raise ModelError(
                f"{arguments['kv_length']} keys for {T} queries: S2-Attn in training takes no KV cache; "
                "pass no past_key_values, or call model.eval()"
            )
        if arguments.get("use_vmap"):
            raise ModelError(
                "the model adds a mask function of its own to the causal one (for images or a prefix), which S2-Attn "
                f"does not know; {_OWN_ATTENTION}"
            )
        positions = torch.arange(T, device=device)[None]
        cut_BT = torch.zeros(B, T, dtype=torch.bool, device=device)
        cut_BT[:, 1:] = ~self._sees(positions[:, 1:], positions[:, :-1])
        self._require_known(cut_BT.cumsum(-1), positions)
        cut_BT |= self._told_BT(cut_BT)
        lengths = _lengths(arguments.get("attention_mask"), B, T)
        cuts_B: list[list[int]] = [[] for _ in range(B)]
        for row, position in cut_BT.nonzero().tolist():
            cuts_B[row].append(position)
        return [
            [0, *(cut for cut in cuts if cut < length), length] if length else [0]
            for cuts, length in zip(cuts_B, lengths, strict=True)
        ]

    def _told_BT(self, cut_BT: Tensor) -> Tensor:
        """Where the inputs of the model say that a document begins; of its mask function they need not be known.

        Some models (gpt-oss, OPT, AFMoE) do not give positions to their mask, and none does beside a padding mask.
        Positions that jump ahead are no new document here, though transformers takes them for one in the mask.
        """
        told_BT = torch.zeros_like(cut_BT)
        known, T = self._pass, cut_BT.shape[1]
        positions, numbers = known.position_ids, known.seq_idx
        if positions is not None and positions.ndim == 2 and positions.shape[1] == T:
            told_BT[:, 1:] |= positions.diff(dim=1) < 1
        if numbers is not None and numbers.ndim == 2 and numbers.shape[1] == T:
            told_BT[:, 1:] |= numbers.diff(dim=1) != 0
        if known.cu_seq_lens is not None:
            told_BT[:, _inner_bounds(known.cu_seq_lens.tolist(), *cut_BT.shape)] = True
        return told_BT

    def _sees(self, query: Tensor, key: Tensor) -> Tensor:
        """What the mask function says of pairs of positions [1, n] -> [B, n]."""
        rows = torch.arange(self._arguments["batch_size"], device=query.device)[:, None]
        seen = self._arguments["mask_function"](rows, torch.zeros_like(rows), query, key)
        return seen.expand(len(rows), query.shape[1])

    def _require_known(self, document_BT: Tensor, positions: Tensor) -> None:
        """Compare a sample of about T pairs for each probe with causal attention inside documents and window."""
        T = positions.shape[1]
        wrong = []
        for step in _PROBES:
            key = (positions - step) % T
            near = (positions - key < self.window) if self.window is not None else True
            expected = (key <= positions) & near & (document_BT == document_BT[:, key[0]])
            wrong.append((self._sees(positions, key) != expected).any())
        if torch.stack(wrong).any():
            raise ModelError(
                "the model's mask is more than causal attention inside documents (for example a prefix that sees all "
                f"of itself), which S2-Attn does not know; {_OWN_ATTENTION}"
            )


class WholeRows(LazyMask):
    """A mask that takes each row for one document, and looks at no tensor to know."""

    bounds_B = property(  # type: ignore[assignment]
        lambda self: [[0, self._arguments["q_length"]]] * self._arguments["batch_size"]
    )


_KIND: ContextVar[type[LazyMask]] = ContextVar("longlora_mask", default=LazyMask)


@contextlib.contextmanager
def whole_rows() -> Iterator[None]:
    """Inside it each row is one document: for tensors that hold no values (`planning/rehearsal.py`)."""
    token = _KIND.set(WholeRows)
    try:
        yield
    finally:
        _KIND.reset(token)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def lazy_mask(**arguments: Any) -> Any:
    """The mask function registered with transformers."""
    if (implementation := AHEAD.get()) is not None:
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](**arguments)
    return _KIND.get()(arguments)


def _inner_bounds(bounds: Sequence[int], batch: int, tokens: int) -> list[int]:
    """Of document bounds as FlashAttention takes them, those between two tokens."""
    if batch != 1:
        raise ModelError(f"cu_seq_lens_q with {batch} rows: give one row of packed documents, or no cu_seq_lens_q")
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
        raise ModelError(
            f"cu_seq_lens_q={str(bounds[:8])[:-1]}, ...]: must rise from 0 to the number of tokens, {tokens}; "
            "give the bounds of all documents, padding among them"
        )
    return [bound for bound in bounds if 0 < bound < tokens]


def _lengths(padding_mask: Tensor | None, batch: int, tokens: int) -> list[int]:
    """Tokens before the right padding of each row."""
    if padding_mask is None:
        return [tokens] * batch
    lengths = padding_mask.sum(-1)
    expected = torch.arange(tokens, device=padding_mask.device)[None] < lengths[:, None]
    if not torch.equal(expected, padding_mask.bool()):
        raise ModelError(
            "attention_mask has padding before or between tokens: S2-Attn in training pads on the right; "
            "set tokenizer.padding_side='right'"
        )
    return [int(length) for length in lengths.tolist()]
