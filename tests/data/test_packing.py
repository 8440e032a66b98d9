"""Every token lands in exactly one row, documents stay apart, and padding is seen by nobody."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from growth import LIMIT, growth
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import find_packed_sequence_indices

from longlora.data.packing import IGNORE_INDEX, PackedDataset, PackedSequence, Span, collate, pack
from longlora.data.shards import TokenShard
from longlora.errors import DataError
from longlora.memory import chunked_loss

ShardOf = Callable[[list[int]], TokenShard]
LENGTHS = st.lists(st.integers(0, 60), max_size=40)
CONTEXT = st.integers(1, 25)


def reference_row_count(lengths: list[int], context: int) -> int:
    """Best-fit decreasing the slow, obvious way."""
    rooms: list[int] = []
    for length in sorted((length % context for length in lengths if length % context), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(context - length)
    return len(rooms) + sum(length // context for length in lengths)


class TestPack:
    @given(LENGTHS, CONTEXT)
    def test_every_token_lands_exactly_once(self, lengths: list[int], context: int) -> None:
        counts = [np.zeros(length, int) for length in lengths]
        for row in pack(lengths, context):
            assert 0 < row.length <= context
            assert row.length == sum(span.length for span in row.spans)
            for span in row.spans:
                assert 0 <= span.start < span.stop <= lengths[span.document]
                counts[span.document][span.start : span.stop] += 1
        assert all((count == 1).all() for count in counts)

    @given(LENGTHS, CONTEXT)
    def test_only_documents_longer_than_the_context_are_cut(self, lengths: list[int], context: int) -> None:
        spans = sorted((s.document, s.start, s.stop) for row in pack(lengths, context) for s in row.spans)
        expected = [
            (document, start, min(start + context, length))
            for document, length in enumerate(lengths)
            for start in range(0, length, context)
        ]
        assert spans == expected

    @given(LENGTHS, CONTEXT)
    def test_order_and_determinism(self, lengths: list[int], context: int) -> None:
        rows = pack(lengths, context)
        firsts = [(row.spans[0].document, row.spans[0].start) for row in rows]
        assert firsts == sorted(firsts)
        for row in rows:
            documents = [span.document for span in row.spans]
            assert documents == sorted(set(documents)), "sorted, and each document at most once"
        assert rows == pack(tuple(lengths), context)

    @given(LENGTHS, CONTEXT)
    def test_as_few_rows_as_plain_best_fit_decreasing(self, lengths: list[int], context: int) -> None:
        assert len(pack(lengths, context)) == reference_row_count(lengths, context)

    def test_example(self) -> None:
        assert pack([4, 25, 3, 0, 6, 10], 10) == [
            PackedSequence((Span(0, 0, 4), Span(4, 0, 6))),
            PackedSequence((Span(1, 0, 10),)),
            PackedSequence((Span(1, 10, 20),)),
            PackedSequence((Span(1, 20, 25), Span(2, 0, 3))),
            PackedSequence((Span(5, 0, 10),)),
        ]

    def test_numpy_lengths_give_plain_integers(self) -> None:
        (row,) = pack(np.array([3, 2]), 8)  # type: ignore[arg-type]
        assert all(type(value) is int for span in row.spans for value in (span.document, span.start, span.stop))

    def test_nothing_to_pack(self) -> None:
        assert pack([], 4) == []
        assert pack([0, 0], 4) == []

    def test_context_length(self) -> None:
        with pytest.raises(DataError, match="context_length=0: must be at least 1"):
            pack([1], 0)

    def test_time_is_not_quadratic(self) -> None:
        def pack_some(documents: int) -> None:
            lengths = np.random.default_rng(0).integers(1, 65_536, documents).tolist()
            rows = pack(lengths, 131_072)
            assert sum(lengths) / (len(rows) * 131_072) > 0.97

        assert growth(pack_some, 3000) < LIMIT


class TestPackedDataset:
    def test_row_as_drawn_in_the_docstring(self, shard_of: ShardOf) -> None:
        (row,) = PackedDataset(shard_of([4, 3]), 8)
        assert row["input_ids"].tolist() == [0, 1, 2, 3, 4, 5, 6]
        assert row["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2]
        assert row["labels"].tolist() == [IGNORE_INDEX, 1, 2, 3, IGNORE_INDEX, 5, 6]
        assert {tensor.dtype for tensor in row.values()} == {torch.int64}

    def test_later_piece_of_a_cut_document_starts_anew(self, shard_of: ShardOf) -> None:
        rows = list(PackedDataset(shard_of([7, 2]), 5))
        assert [row["input_ids"].tolist() for row in rows] == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
        assert rows[1]["position_ids"].tolist() == [0, 1, 0, 1]
        assert rows[1]["labels"].tolist() == [IGNORE_INDEX, 6, IGNORE_INDEX, 8]

    @settings(deadline=None)
    @given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20), context=st.integers(2, 17))
    def test_no_token_is_lost(self, shard_of: ShardOf, lengths: list[int], context: int) -> None:
        shard = shard_of([*lengths, 2])
        dataset = PackedDataset(shard, context)
        seen = torch.cat([row["input_ids"] for row in dataset]).tolist()
        assert len(seen) == len(set(seen))
        targets = {label for row in dataset for label in row["labels"].tolist() if label != IGNORE_INDEX}
        firsts = {
            offset + start
            for offset, length in zip(shard.offsets.tolist(), shard.lengths.tolist(), strict=False)
            for start in range(0, length, context)
        }
        assert targets == set(range(len(shard.tokens))) - firsts
        assert set(seen) >= targets

    @given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20), context=st.integers(2, 17))
    def test_every_row_has_a_target(self, shard_of: ShardOf, lengths: list[int], context: int) -> None:
        for row in PackedDataset(shard_of([*lengths, 2]), context):
            assert (row["labels"] != IGNORE_INDEX).any(), "its mean loss would be 0/0"

    def test_row_of_single_tokens_is_left_out(self, shard_of: ShardOf) -> None:
        rows = list(PackedDataset(shard_of([5]), 4))
        assert [row["input_ids"].tolist() for row in rows] == [[0, 1, 2, 3]]

    def test_rows_from_disk_do_not_alias_the_shard(self, written: TokenShard) -> None:
        dataset = PackedDataset(written, 1000)
        before = dataset[0]["input_ids"].clone()
        dataset[0]["input_ids"].fill_(-1)
        assert torch.equal(dataset[0]["input_ids"], before)
        assert before.tolist() == written.tokens.tolist()

    def test_one_document_must_be_longer_than_min_length(self, shard_of: ShardOf) -> None:
        shard = shard_of([6, 6, 6])
        assert len(PackedDataset(shard, 24, min_length=5)) == 1
        with pytest.raises(DataError) as caught:  # the row has 18 tokens, but no position beyond 5
            PackedDataset(shard, 24, min_length=6)
        for part in ("longest document has 6 tokens", "context_length=24", "more than 6", "give longer documents"):
            assert part in str(caught.value)
        with pytest.raises(
            DataError, match=r"longest document has 6 tokens and the longest piece .*context_length=4 has 4"
        ):
            PackedDataset(shard, 4, min_length=4)

    @pytest.mark.parametrize("lengths", [[1, 1], []])
    def test_nothing_to_predict(self, shard_of: ShardOf, lengths: list[int]) -> None:
        with pytest.raises(DataError, match="at least one must have more than 1"):
            PackedDataset(shard_of(lengths), 8, min_length=0)


class TestCollate:
    def test_unequal_rows_as_drawn_in_the_docstring(self, shard_of: ShardOf) -> None:
        long, short = PackedDataset(shard_of([3, 3]), 6)[0], PackedDataset(shard_of([4]), 6)[0]
        batch = collate([long, short], pad_token_id=99)
        ignored = IGNORE_INDEX
        assert set(batch) == {"input_ids", "position_ids", "labels"}
        assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 99, 99]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]]
        assert batch["labels"].tolist() == [[ignored, 1, 2, ignored, 4, 5], [ignored, 1, 2, 3, ignored, ignored]]
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}

    def test_equal_rows_are_not_padded(self, shard_of: ShardOf) -> None:
        rows = list(PackedDataset(shard_of([4, 4]), 4))
        batch = collate(rows, pad_token_id=99)
        assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]

    @settings(deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
        context=st.integers(2, 17),
        batch_size=st.integers(1, 4),
    )
    def test_transformers_finds_the_same_documents(
        self, shard_of: ShardOf, lengths: list[int], context: int, batch_size: int
    ) -> None:
        dataset = PackedDataset(shard_of([*lengths, 2]), context)
        sequences = dataset.sequences[:batch_size]
        positions = collate([dataset[i] for i in range(len(sequences))], pad_token_id=0)["position_ids"]
        found = find_packed_sequence_indices(positions)
        if found is None:  # how transformers says that every row is one document
            found = torch.zeros_like(positions)
        for ids, sequence in zip(found, sequences, strict=True):
            lengths_with_padding = [span.length for span in sequence.spans]
            if sequence.length < positions.shape[1]:
                lengths_with_padding.append(positions.shape[1] - sequence.length)
            assert torch.bincount(ids).tolist() == lengths_with_padding

    def test_a_packed_and_padded_batch_trains_like_separate_documents(self, shard_of: ShardOf) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        config = LlamaConfig(vocab_size=64, num_attention_heads=2, num_key_value_heads=1, **sizes)
        model = LlamaForCausalLM(config).eval()
        shard = shard_of([9, 4, 5])
        dataset = PackedDataset(shard, 10)
        batch = collate([dataset[i] for i in range(len(dataset))], pad_token_id=63)
        with torch.no_grad():
            packed = model(**batch, use_cache=False, num_items_in_batch=1).loss
            alone = [torch.tensor(shard.document(i).astype(np.int64))[None] for i in range(3)]
            separate = sum(model(ids, labels=ids, use_cache=False, num_items_in_batch=1).loss for ids in alone)
        assert len(dataset) == 2
        assert batch["input_ids"].shape == (2, 9)
        assert packed.isfinite()
        torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-4)


def test_ignore_index_is_that_of_the_loss() -> None:
    assert chunked_loss.IGNORE_INDEX == IGNORE_INDEX


def test_rows_of_shorter_documents_are_kept(shard_of: Callable[[list[int]], TokenShard]) -> None:
    """`min_length` asks for one long document, and leaves none of the short ones out."""
    dataset = PackedDataset(shard_of([20, 9, 8, 7]), 20, min_length=10)
    assert [row.length for row in dataset.sequences] == [20, 17, 7]
