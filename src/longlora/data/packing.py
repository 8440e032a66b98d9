"""Pack documents into rows of one context length, without losing a token and without mixing documents.

B rows, T tokens. A row holds spans of documents one behind the other; attention and positions restart at each span.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from longlora.data.shards import TokenShard
from longlora.errors import DataError

IGNORE_INDEX = -100
"""Label of a position whose token is not to be predicted."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `stop` (exclusive) of one document of a shard."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One row: spans one behind the other, sorted by document."""

    spans: tuple[Span, ...]

    @property
    def length(self) -> int:
        return sum(span.length for span in self.spans)


def pack(lengths: Sequence[int], context_length: int) -> list[PackedSequence]:
    """Put every token of every document into exactly one row of at most `context_length` tokens.

    A longer document is cut into rows of `context_length` from its beginning. What remains of it is packed with other
    documents: longest first, each into the fullest row that still has room (best-fit decreasing).

    Args:
        lengths: tokens in each document; 0 is allowed and lands nowhere.
        context_length: tokens in a full row.

    Returns:
        Rows in the order of their first document; the same for the same arguments.

    Raises:
        DataError: `context_length` is less than 1.
    """
    if context_length < 1:
        raise DataError(f"context_length={context_length}: must be at least 1")
    rows: list[list[Span]] = []
    remains: list[Span] = []
    for document, length in enumerate(map(int, lengths)):
        whole = length // context_length * context_length
        rows += [[Span(document, start, start + context_length)] for start in range(0, whole, context_length)]
        if whole < length:
            remains.append(Span(document, whole, length))
    rows += _best_fit_decreasing(remains, context_length)
    for row in rows:
        row.sort(key=_document)
    rows.sort(key=lambda row: (row[0].document, row[0].start))
    return [PackedSequence(tuple(row)) for row in rows]


def _document(span: Span) -> int:
    return span.document


def _best_fit_decreasing(spans: list[Span], capacity: int) -> list[list[Span]]:
    rows: list[list[Span]] = []
    rooms: list[int] = []  # the different amounts of room there are, sorted
    with_room: defaultdict[int, list[list[Span]]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: (-span.length, span.document)):
        index = bisect_left(rooms, span.length)
        if index == len(rooms):
            room = capacity
            row: list[Span] = []
            rows.append(row)
        else:
            room = rooms[index]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[index]
        row.append(span)
        room -= span.length
        if not room:
            continue
        if not with_room[room]:
            insort(rooms, room)
        with_room[room].append(row)
    return rows


class PackedDataset(Dataset[dict[str, Tensor]]):
    """The packed rows of a shard, one row an item.

    An item has three int64 tensors [T], where T is at most `context_length` and differs between items. Documents a of
    4 tokens and b of 3 in one row::

        input_ids      a0    a1  a2  a3  b0    b1  b2
        position_ids   0     1   2   3   0     1   2     restart at each span
        labels         -100  a1  a2  a3  -100  b1  b2    unshifted: the loss shifts, so a0 is to predict a1

    and ``row``, int64 [1], its number, for messages.

    ``-100`` is `IGNORE_INDEX`: b0 must not be predicted from a3. A span that continues a document which was cut starts
    anew as well, because its beginning is in another row.

    A row in which every span has one token predicts nothing, and its mean loss would be 0/0: such rows are left out.

    Of instructions only the tokens that the shard's mask names are predicted, and an example is never cut.

    Args:
        shard: the tokens.
        context_length: tokens in a full row.
        min_length: at least one span has to be longer, in tokens. Give the length the model already handles: rows that
            are merely full of shorter documents teach it no new position.
        weigh_documents: add ``loss_weights``, float32 [T]: one over the number of predicted tokens of the document, so
            that each document weighs 1.

    Raises:
        DataError: no span is longer than `min_length`, or than 1 token, or an example is longer than `context_length`.
    """

    def __init__(
        self, shard: TokenShard, context_length: int, min_length: int = 1, *, weigh_documents: bool = False
    ) -> None:
        _require_whole_examples(shard, context_length)
        packed = pack(shard.lengths.tolist(), context_length)
        longest = max((span.length for row in packed for span in row.spans), default=0)
        limit = max(min_length, 1)
        if longest <= limit:
            raise DataError(
                f"{shard.folder}: the longest document has {int(shard.lengths.max(initial=0))} tokens and the longest "
                f"piece in a row of context_length={context_length} has {longest}, at least one must have more than "
                f"{limit}: give longer documents or a larger context.context_length"
            )
        self.shard = shard
        self.context_length = context_length
        self._weigh_documents = weigh_documents
        self.sequences = [row for row in packed if any(span.length > 1 for span in row.spans)]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        spans = self.sequences[index].spans
        pieces = [self.shard.document(span.document)[span.start : span.stop] for span in spans]
        input_ids = torch.from_numpy(np.concatenate(pieces).astype(np.int64))
        position_ids = torch.cat([torch.arange(span.length) for span in spans])
        labels = input_ids.masked_fill(position_ids == 0, IGNORE_INDEX)
        if self.shard.mask is not None:
            assert all(span.start == 0 for span in spans), "examples are never cut"
            mask = np.concatenate([self.shard.loss_mask(span.document) for span in spans])
            labels = labels.masked_fill(torch.from_numpy(mask) == 0, IGNORE_INDEX)
        item = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "row": torch.tensor([index])}
        if self._weigh_documents:
            item["loss_weights"] = _weights(labels, [span.length for span in spans])
        return item

    def documents(self, row: int) -> list[str]:
        """What a row holds, for a person: ``a.txt (document 3)``, of a piece ``a.txt (document 3, tokens 0-127)``."""
        return [self._in_words(span) for span in self.sequences[row].spans]

    def _in_words(self, span: Span) -> str:
        whole = span.length == len(self.shard.document(span.document))
        piece = "" if whole else f", tokens {span.start}-{span.stop - 1}"
        return f"{self.shard.names[span.document]} (document {span.document}{piece})"


def _weights(labels_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """One over the number of labels of each document, [T]; 0 where there is no label."""
    counted = (labels_T != IGNORE_INDEX).float()
    parts = [part / part.sum().clamp(min=1) for part in counted.split(list(lengths))]
    return torch.cat(parts)


def _require_whole_examples(shard: TokenShard, context_length: int) -> None:
    if shard.mask is None or (longest := int(shard.lengths.max(initial=0))) <= context_length:
        return
    raise DataError(
        f"{shard.folder} holds an example of {longest} tokens, context.context_length is {context_length}: examples "
        "are shortened when they are prepared, run `longlora prepare` again"
    )


def collate(rows: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Stack rows of `PackedDataset` into int64 tensors [B, T], padded on the right to the longest row.

    Padding is a document of its own: its positions restart at 0 and nothing is predicted in it. The rows
    ``a0 a1 a2 b0 b1 b2`` and ``c0 c1 c2 c3`` become::

        input_ids      a0    a1  a2  b0    b1   b2      c0    c1  c2  c3  pad   pad
        position_ids   0     1   2   0     1    2       0     1   2   3   0     1
        labels         -100  a1  a2  -100  b1   b2      -100  c1  c2  c3  -100  -100

    There is no attention_mask on purpose: transformers takes restarting positions for document bounds only without
    one, and attention inside the bounds is causal, so no token of a document ever sees padding.

    Args:
        rows: at least one; each with input_ids, position_ids and labels, int64 [T of the row], and all or none with
            loss_weights, float32, which are 0 in padding. What else they have is left out.
        pad_token_id: any id of the vocabulary.
    """
    longest = max(row["input_ids"].shape[0] for row in rows)
    padded = [_pad(row, longest - row["input_ids"].shape[0], pad_token_id) for row in rows]
    return {key: torch.stack([row[key] for row in padded]) for key in padded[0]}


def _pad(row: Mapping[str, Tensor], count: int, pad_token_id: int) -> dict[str, Tensor]:
    padding = {
        "input_ids": torch.full((count,), pad_token_id),
        "position_ids": torch.arange(count),
        "labels": torch.full((count,), IGNORE_INDEX),
        "loss_weights": torch.zeros(count),
    }
    return {key: torch.cat([row[key], filling]) for key, filling in padding.items() if key in row}
