"""Key tokens by hand, against a direct loop and by a toy model; character ranges between tokenizers."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_python import PreTrainedTokenizer

from longlora.config.evaluation import LongPPLConfig
from longlora.errors import DataError
from longlora.evaluation.loss.longppl import (
    KeyDocument,
    encode_with_spans,
    key_document,
    key_loss,
    key_spans,
    key_tokens,
    long_enough,
    longppl_row,
    short_losses,
    tokens_in_spans,
)

NAN = math.nan
SMALL = LongPPLConfig(short_context=16, block_tokens=4)


def test_key_tokens_gain_more_than_alpha_and_end_below_beta() -> None:
    long = torch.tensor([NAN, 1.0, 1.0, 1.0, 1.9, 2.0, 0.1, 0.1])
    short = torch.tensor([NAN, 3.1, 3.0, 1.0, 9.0, 9.0, NAN, 2.2])
    # 3.1 gains 2.1; 3.0 gains no more than 2; a loss of 2.0 is not below 2; unknown losses are no key.
    assert key_tokens(long, short, 2.0, 2.0).tolist() == [False, True, False, False, True, False, False, True]
    assert key_tokens(long, short, 1.9, 2.1).tolist() == [False, True, True, False, True, True, False, True]


def test_the_published_thresholds_are_the_defaults() -> None:
    settings = LongPPLConfig()
    assert (settings.gain, settings.ceiling, settings.short_context, settings.block_tokens) == (2.0, 2.0, 4096, 1024)


def test_blocks_share_a_short_context_and_the_first_is_not_read_again() -> None:
    calls = []

    def losses_of(start: int, stop: int) -> torch.Tensor:
        calls.append((start, stop))
        return torch.arange(stop - start).float()

    losses = short_losses(losses_of, 11, short_context=4, block_tokens=2)
    assert calls == [(2, 8), (4, 10), (6, 11)]
    assert losses[:6].isnan().all()
    assert losses[6:].tolist() == [4, 5, 4, 5, 4]
    assert short_losses(losses_of, 6, 4, 2).isnan().all()


def pseudo_loss(start: int, position: int) -> float:
    """The loss of a token given all from `start` on: any number, but always the same."""
    return random.Random(f"{start}-{position}").uniform(0, 6)


@given(st.integers(1, 90), st.integers(2, 20), st.integers(1, 9))
def test_masks_equal_a_loop_over_tokens(tokens: int, short: int, block: int) -> None:
    def losses_of(start: int, stop: int) -> torch.Tensor:
        return torch.tensor([pseudo_loss(start, position) for position in range(start, stop)], dtype=torch.float64)

    long_T = losses_of(0, tokens)
    mask = key_tokens(long_T, short_losses(losses_of, tokens, short, block), 2.0, 2.0).tolist()
    expected = [False] * tokens
    for position in range(short, tokens):  # as published: each token behind the first short context has a block
        start = (position - short) // block * block
        long, gain = pseudo_loss(0, position), pseudo_loss(start, position) - pseudo_loss(0, position)
        expected[position] = gain > 2.0 and long < 2.0
    assert mask == expected


def repeat_losses(tokens: Sequence[int]) -> torch.Tensor:
    """A toy model: sure of a token that followed the one before it earlier in what it reads, clueless otherwise."""
    seen: set[tuple[int, int]] = set()
    losses = [NAN]
    for pair in pairwise(tokens):
        losses.append(0.1 if pair in seen else 6.0)
        seen.add(pair)
    return torch.tensor(losses)


def test_a_repeat_from_far_is_key_and_one_from_near_is_not() -> None:
    far, near = [901, 902, 903], [911, 912, 913]
    tokens = [*far, *range(40), *near, *range(100, 105), *near, *range(200, 203), *far, 300, 301]
    document = key_document("d", tokens, repeat_losses, SMALL)
    assert document.tokens == tokens
    again = len(tokens) - 5
    assert tokens[again : again + 3] == far
    # The first token of a repeat follows another one than before.
    assert [place for place, is_key in enumerate(document.key) if is_key] == [again + 1, again + 2]


def bytes_tokenizer(joined: Sequence[tuple[str, str]] = (), bos: bool = False) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", *letters, *("".join(pair) for pair in joined)]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=list(joined)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_byte_tokens_of_one_character_all_cover_it() -> None:
    encoded = encode_with_spans(bytes_tokenizer(), "a🐋é")
    assert encoded.spans == [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3), (2, 3)]


def test_a_bos_covers_nothing_and_is_never_key() -> None:
    encoded = encode_with_spans(bytes_tokenizer(bos=True), "ab")
    assert encoded.tokens[0] == 0
    assert encoded.spans == [(0, 0), (0, 1), (1, 2)]
    assert tokens_in_spans(encoded.spans, [(0, 2)]) == [False, True, True]
    assert key_spans([True, False, True], encoded.spans) == [(1, 2)]


def test_spans_merge_where_they_touch_or_overlap() -> None:
    assert key_spans([], []) == []
    assert key_spans([False] * 2, [(0, 1), (1, 2)]) == []
    spans = [(0, 1), (1, 2), (1, 2), (2, 3), (4, 6), (6, 6), (7, 9)]
    assert key_spans([True] * 7, spans) == [(0, 3), (4, 6), (7, 9)]


@given(st.data())
def test_tokens_in_spans_equals_a_search_of_all_ranges(data: st.DataObject) -> None:
    bounds = sorted(data.draw(st.sets(st.integers(0, 60), min_size=2)))
    spans = list(pairwise(bounds))
    spans = [span for span in spans for _ in range(data.draw(st.integers(0, 2)))]
    edges = sorted(data.draw(st.sets(st.integers(0, 60))))
    keys = list(zip(edges[::2], edges[1::2], strict=False))
    expected = [any(low <= start and stop <= high for low, high in keys) for start, stop in spans]
    assert tokens_in_spans(spans, keys) == expected


def test_key_tokens_carry_over_to_another_tokenizer_over_split_characters() -> None:
    phrase = "鯨🐋 naïve whale"
    # No pair of neighbouring bytes of the phrase is anywhere else.
    filler = "".join(chr(0x4E00 + index) for index in range(30))
    text = f"{phrase}{filler}§{phrase}xend"
    other = bytes_tokenizer(bos=True)
    own = bytes_tokenizer([("Ġ", "w"), ("h", "a"), ("Ġw", "ha"), ("e", "x"), ("l", "e"), ("Ġwha", "le")])
    tokens = own(text, add_special_tokens=False).input_ids
    document = key_document("d", tokens, repeat_losses, SMALL, tokenizers=(own, other))
    assert document.tokens == tokens
    spans = encode_with_spans(own, text).spans
    begin = text.index("§") + 1
    end = begin + len(phrase)
    # The first byte of the phrase is a surprise again, but the others make its character a key one.
    assert document.key == [begin <= start and stop <= end for start, stop in spans]
    key = [text[start:stop] for (start, stop), is_key in zip(spans, document.key, strict=True) if is_key]
    assert key == ["鯨"] * 3 + ["🐋"] * 4 + [" ", "n", "a", "ï", "ï", "v", "e", " wha", "l"]  # but not "ex"


def test_one_tokenizer_twice_gives_the_mask_of_the_short_way() -> None:
    text = "whale ho" + "".join(chr(code) for code in range(160, 200)) + "whale ho."
    tokenizer = bytes_tokenizer([("w", "h"), ("h", "o")])
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    short = key_document("d", tokens, repeat_losses, SMALL)
    assert any(short.key)
    assert key_document("d", tokens, repeat_losses, SMALL, tokenizers=(tokenizer, tokenizer)) == short


def test_what_the_evaluators_context_cuts_off_is_not_read() -> None:
    text = "abcdefgh" * 10
    own, other = bytes_tokenizer([("a", "b"), ("c", "d"), ("ab", "cd")]), bytes_tokenizer()
    tokens = own(text, add_special_tokens=False).input_ids
    document = key_document("d", tokens, repeat_losses, SMALL, tokenizers=(own, other), context_length=26)
    assert own.decode(document.tokens) == text[:24]  # "abcd" would end at 28
    assert len(document.key) == len(document.tokens)


def test_a_tokenizer_without_offsets_is_refused_in_one_line() -> None:
    class Slow(PreTrainedTokenizer):
        vocab_size = 3

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1, "c": 2}

        def _tokenize(self, text: str, **kwargs: object) -> list[str]:
            return list(text)

        def _convert_token_to_id(self, token: str) -> int:
            return self.get_vocab().get(token, 0)

    with pytest.raises(DataError, match="gives no character offsets") as raised:
        encode_with_spans(Slow(), "abc")
    assert "\n" not in str(raised.value)


def test_loss_over_key_tokens() -> None:
    losses = torch.tensor([NAN, 1.0, 2.0, 4.0])
    assert key_loss(losses, torch.tensor([False, True, False, True])) == pytest.approx(2.5)
    assert key_loss(losses, torch.zeros(4, dtype=torch.bool)) is None


def test_a_row_has_the_loss_of_key_tokens_and_of_all() -> None:
    document = KeyDocument("d", [5, 6, 7, 8], [True, True, False, True])
    row = longppl_row(document, torch.tensor([NAN, 1.0, 3.0, 2.0]), SMALL, context_length=64, evaluator="e")
    assert row == {
        "document": "d",
        "context_length": 64,
        "short_context": 16,
        "tokens": 3,
        "key_tokens": 2,
        "loss": 1.5,
        "all_loss": 2.0,
        "evaluator": "e",
        "alpha": 2.0,
        "beta": 2.0,
    }
    none = longppl_row(KeyDocument("d", [5], [False]), torch.tensor([NAN]), SMALL, context_length=64, evaluator="e")
    assert (none["tokens"], none["key_tokens"], none["loss"], none["all_loss"]) == (0, 0, None, None)


def test_a_key_document_is_plain_json() -> None:
    document = key_document("d", list(range(30)), repeat_losses, SMALL)
    assert KeyDocument(**json.loads(json.dumps(asdict(document)))) == document


def test_documents_too_short_for_a_key_token_are_left_out_and_counted() -> None:
    documents = [("short", list(range(20))), ("enough", list(range(21))), ("long", list(range(90)))]
    kept, left_out = long_enough(documents, 50, SMALL)
    assert left_out == 1
    assert [(name, len(tokens)) for name, tokens in kept] == [("enough", 21), ("long", 50)]
    # The limit is exact: one token more than this many can be a key token.
    assert not short_losses(lambda start, stop: torch.zeros(stop - start), 21, 16, 4).isnan().all()
    with pytest.raises(DataError, match=r"no document has the 21 tokens .* the longest has 20"):
        long_enough(documents[:1], 50, SMALL)
    with pytest.raises(DataError, match=r"eval.longppl.context_length 20 .* raise it to 21 or more"):
        long_enough(documents, 20, SMALL)
