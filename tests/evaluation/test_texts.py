"""Texts and token streams for evaluation: what is read, what is refused and what the message says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tiny import VOCABULARY, word_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from longlora.data.documents import ReadReport
from longlora.errors import DataError
from longlora.evaluation.loss.texts import read_haystack, read_texts

BOS, EOS = 1, 2


def ids(text: str) -> list[int]:
    return list(word_tokenizer()(text, add_special_tokens=False).input_ids)


def with_bos() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


def write_stream(path: Path, tokens: list[int], dtype: str = "<u2") -> str:
    path.write_bytes(np.asarray(tokens, dtype=dtype).tobytes())
    return str(path)


def refused(*arguments: object, **options: object) -> str:
    with pytest.raises(DataError) as raised:
        read_texts(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_text_jsonl_and_parquet_become_tokens_in_order(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("thebook", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}) + "\n")
    parquet.write_table(pyarrow.table({"text": ["three"]}), tmp_path / "table.parquet")
    paths = [str(tmp_path / name) for name in ("rows.jsonl", "book.txt", "table.parquet")]
    found = read_texts(paths, word_tokenizer())
    assert [(text.name, text.tokens) for text in found] == [
        ("rows.jsonl:1", ids("one")),
        ("rows.jsonl:2", ids("two")),
        ("book", ids("thebook")),
        ("table.parquet:0", ids("three")),
    ]
    assert all(isinstance(text.tokens, list) for text in found)


def test_special_tokens_stand_around_a_text_only_if_the_tokenizer_puts_them_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    path = str(tmp_path / "a.txt")
    assert read_texts([path], with_bos())[0].tokens == [BOS, *ids("abc"), EOS]
    assert read_texts([path], with_bos(), add_special_tokens=False)[0].tokens == ids("abc")
    assert read_texts([path], word_tokenizer())[0].tokens == ids("abc")


def test_reading_stops_when_it_has_enough_and_cuts_documents(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("ab", "abcdef", "abcd")]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "this line is never read"]))
    report = ReadReport()
    found = read_texts(
        [str(tmp_path / "a.jsonl")],
        word_tokenizer(),
        needed_tokens=4,
        max_tokens=5,
        max_documents=2,
        report=report,
    )
    assert [text.tokens for text in found] == [ids("abcde"), ids("abcd")]
    assert report.too_short == ["a.jsonl:1"]


def test_names_are_different_within_one_result(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "book.txt").write_text("text" + folder)
    paths = [str(tmp_path / folder / "book.txt") for folder in ("a", "b", "c")]
    assert [text.name for text in read_texts(paths, word_tokenizer())] == ["book", "book (2)", "book (3)"]
    assert read_haystack(paths) == {"book": "texta", "book (2)": "textb", "book (3)": "textc"}


def test_a_stream_is_cut_in_front_of_bos(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "pg19.bin", [BOS, 5, 6, EOS, BOS, 7, BOS, 8, 9])
    found = read_texts([path], word_tokenizer())
    assert [text.tokens for text in found] == [[BOS, 5, 6, EOS], [BOS, 7], [BOS, 8, 9]]
    assert [text.name for text in found] == ["pg19.bin:0", "pg19.bin:1", "pg19.bin:2"]
    assert {text.note for text in found} == {"cut at BOS (id 1)"}


def test_a_stream_without_bos_is_cut_behind_eos(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "a.bin", [5, 6, EOS, 7, 8, EOS, 9, 9])
    found = read_texts([path], word_tokenizer())
    assert [text.tokens for text in found] == [[5, 6, EOS], [7, 8, EOS], [9, 9]]
    assert found[0].note == "cut at EOS (id 2)"


def test_a_stream_with_neither_is_one_document(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "a.bin", [5, 6, 7])
    (found,) = read_texts([path], word_tokenizer())
    assert (found.name, found.tokens) == ("a.bin", [5, 6, 7])
    assert found.note == "one document, neither BOS nor EOS occurs"


def test_a_stream_is_read_whole_as_the_original_does_and_cut_to_what_is_needed(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "a.bin", [BOS, 5, 6, BOS, 7, 8])
    (found,) = read_texts([path], word_tokenizer(), whole_streams=True, max_tokens=5, needed_tokens=5)
    assert found.tokens == [BOS, 5, 6, BOS, 7]
    assert found.note == "one document, not cut"


def test_a_stream_with_an_id_outside_the_vocabulary_is_refused_with_its_position(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "a.bin", [5] * 70 + [VOCABULARY - 1, VOCABULARY, 6, 30000])
    message = refused([path], word_tokenizer())
    assert f"id {VOCABULARY} at position 71, the tokenizer has ids 0 to {VOCABULARY - 1}" in message


def test_a_bad_id_behind_the_first_part_of_a_long_stream_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longlora.evaluation.loss.texts._PART_TOKENS", 10)
    path = write_stream(tmp_path / "a.bin", [5] * 33 + [500, 600])
    assert "id 500 at position 33" in refused([path], word_tokenizer())


def test_a_tokenizer_with_more_ids_than_16_bits_hold_is_refused(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "a.bin", [5, 6])

    class Large(PreTrainedTokenizerFast):
        highest = 1 << 16

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "last": self.highest}

    tokenizer = Large(tokenizer_object=word_tokenizer().backend_tokenizer)
    assert "the tokenizer has 65,537 of which 65,536 fit" in refused([path], tokenizer)
    tokenizer.highest -= 1
    assert read_texts([path], tokenizer)[0].tokens == [5, 6]


def test_a_stream_of_odd_size_or_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"\5\0\6")
    assert "has 3 bytes" in refused([str(tmp_path / "odd.bin")], word_tokenizer())
    (tmp_path / "none.bin").write_bytes(b"")
    assert "has 0 bytes" in refused([str(tmp_path / "none.bin")], word_tokenizer())


def test_a_stream_of_32_bit_ids_such_as_our_shards_is_refused(tmp_path: Path) -> None:
    path = write_stream(tmp_path / "tokens.bin", [5, 6, 7, 8], "<i4")
    assert "looks like 32-bit token ids" in refused([path], word_tokenizer())


def test_a_missing_file_is_found_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for name in ("missing.txt", "missing.bin"):
        paths = [str(tmp_path / "empty.txt"), str(tmp_path / name)]
        assert f"{name} does not exist" in refused(paths, word_tokenizer())
    (tmp_path / "folder.bin").mkdir()
    assert "is not a file" in refused([str(tmp_path / "folder.bin")], word_tokenizer())
    assert "no file to read texts from" in refused([], word_tokenizer())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: name files"),
        (b" \n ", "is empty: name files"),
        (b"\x89PNG\xff\xfe\x00", "is binary or not UTF-8"),
        (b"ELF\0\0\0", "is binary, character 3 is zero"),
    ],
)
def test_an_empty_or_binary_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(content)
    paths = [str(tmp_path / "good.txt"), str(tmp_path / "bad.txt")]
    assert message in refused(paths, word_tokenizer())
    assert "bad" in refused(paths, word_tokenizer())
    with pytest.raises(DataError, match=message):
        read_haystack(paths)


def test_texts_shorter_than_the_context_are_refused_with_the_longest(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("abcde")
    message = refused([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], word_tokenizer(), needed_tokens=6)
    assert message == (
        "no text has 6 tokens, the longest (b) has 5: name longer ones in eval.perplexity.texts or lower "
        "eval.perplexity.context_lengths"
    )


def test_a_haystack_names_what_was_left_out_and_takes_no_token_ids(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.md").write_text("α and 🐋", encoding="utf-8")
    (tmp_path / "folder" / "b.txt").write_bytes(b"\xff\xff")
    report = ReadReport()
    assert read_haystack([str(tmp_path / "folder")], report=report) == {"a": "α and 🐋"}
    assert report.undecodable == ["b"]
    with pytest.raises(DataError, match="holds token ids: a haystack needs text"):
        read_haystack([str(tmp_path / "x.bin")])
    with pytest.raises(DataError, match="no file to read a haystack from"):
        read_haystack([])
