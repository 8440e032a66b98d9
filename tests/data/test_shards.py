"""What is written is what is read back; a damaged or foreign shard is refused; a failure leaves nothing behind."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from longlora.artifacts import LOSS_MASK, MANIFEST, OFFSETS, TOKENS, write_manifest
from longlora.data.documents import Document, ReadReport, read_documents
from longlora.data.shards import TokenRow, TokenShard, open_shard, write_rows, write_shard
from longlora.errors import DataError, RunFolderError

BOS_ID, EOS_ID = 0, 1


def write(
    folder: Path,
    texts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    add_special_tokens: bool = True,
    min_document_tokens: int = 0,
    report: ReadReport | None = None,
) -> TokenShard:
    return write_shard(
        folder,
        [Document(str(number), text) for number, text in enumerate(texts)],
        tokenizer,
        tokenizer_hash="abc",
        add_special_tokens=add_special_tokens,
        min_document_tokens=min_document_tokens,
        report=report or ReadReport(),
    )


def manifest_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / MANIFEST).read_text())


def rewrite(folder: Path, name: str, content: bytes, **facts: object) -> None:
    """Replace a file and make the manifest again, so that sizes and sha256 are right."""
    (folder / name).write_bytes(content)
    before = manifest_of(folder)
    write_manifest(folder, **{key: value for key, value in (before | facts).items() if key != "files"})


class TestRoundTrip:
    @pytest.mark.parametrize("batch", [1, 7, 1_000_000])
    def test_occurring_tokens_are_those_of_all_documents_once(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, batch: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shard = write(tmp_path / "shard", ["abba cab", "zz", "abba"], tokenizer)
        monkeypatch.setattr("longlora.data.shards._BATCH_CHARACTERS", batch)
        wanted = sorted({int(token) for i in range(len(shard)) for token in shard.document(i)})
        assert shard.occurring_tokens().tolist() == wanted

    @settings(max_examples=25, deadline=None)
    @given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=8))
    def test_documents_come_back(
        self, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, texts: list[str]
    ) -> None:
        texts = [text.replace("<s>", "").replace("</s>", "") or "x" for text in texts]
        folder = tmp_path_factory.mktemp("round") / "shard"
        shard = write(folder, texts, tokenizer)
        assert [tokenizer.decode(shard.document(i)[1:]) for i in range(len(shard))] == texts
        assert [list(shard.document(i)) for i in range(len(shard))] == [tokenizer(text).input_ids for text in texts]
        assert shard.lengths.sum() == len(shard.tokens)

    def test_what_is_on_disk(self, written: TokenShard) -> None:
        folder = written.folder
        assert sorted(path.name for path in folder.iterdir()) == sorted([TOKENS, OFFSETS, MANIFEST])
        assert (written.tokens.dtype, written.offsets.dtype) == (np.dtype("<i4"), np.dtype("<i8"))
        assert (folder / TOKENS).stat().st_size == 4 * len(written.tokens)
        manifest = manifest_of(folder)
        nothing = {"count": 0, "names": []}
        assert {key: value for key, value in manifest.items() if key != "files"} == {
            "schema": 1,
            "tokenizer_hash": "abc",
            "documents": 3,
            "tokens": len(written.tokens),
            "longest_document": int(written.lengths.max()),
            "names": ["line0", "line1", "line2"],
            "too_short": nothing,
            "empty": nothing,
            "undecodable": nothing,
        }

    def test_shard(self, written: TokenShard) -> None:
        assert (len(written), written.names, written.tokenizer_hash) == (3, ("line0", "line1", "line2"), "abc")
        assert np.shares_memory(written.document(1), written.tokens)
        assert not written.document(1).flags.writeable
        assert [len(written.document(i)) for i in range(3)] == written.lengths.tolist()
        for outside in (3, -1):
            with pytest.raises(IndexError):
                written.document(outside)

    def test_any_tokenizer_is_accepted_on_request(self, written: TokenShard) -> None:
        assert np.array_equal(open_shard(written.folder, None).tokens, written.tokens)

    def test_batches_of_documents_do_not_change_tokens(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        texts = ["the sea " * count for count in (1, 30, 2, 50, 3)]
        one = write(tmp_path / "one", texts, tokenizer)
        monkeypatch.setattr("longlora.data.shards._BATCH_CHARACTERS", 100)
        several = write(tmp_path / "several", texts, tokenizer)
        assert np.array_equal(one.tokens, several.tokens)
        assert np.array_equal(one.offsets, several.offsets)

    def test_long_documents_give_no_warning(
        self, tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast], caplog: pytest.LogCaptureFixture
    ) -> None:
        fresh = make_tokenizer()  # the library warns once for each tokenizer
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            shard = write(tmp_path / "shard", ["the sea was calm " * 100], fresh)
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
        assert shard.lengths[0] > fresh.model_max_length
        assert not caplog.records

    def test_truncation_and_padding_of_the_tokenizer_are_not_used(
        self, tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
    ) -> None:
        careless = make_tokenizer()
        careless.backend_tokenizer.enable_truncation(4)
        careless.backend_tokenizer.enable_padding(length=64)
        texts = ["the sea was calm and slow", "brot"]
        shard = write(tmp_path / "shard", texts, careless)
        assert [careless.decode(shard.document(i)[1:]) for i in range(2)] == texts


class TestSpecialTokens:
    @pytest.mark.parametrize(
        ("template", "before", "after"),
        [
            ("$A", [], []),
            ("<s> $A", [BOS_ID], []),
            ("$A </s>", [], [EOS_ID]),
            ("<s> $A </s>", [BOS_ID], [EOS_ID]),
        ],
    )
    def test_only_what_the_tokenizer_adds_itself(
        self,
        tmp_path: Path,
        make_tokenizer: Callable[..., PreTrainedTokenizerFast],
        template: str,
        before: list[int],
        after: list[int],
    ) -> None:
        tokenizer = make_tokenizer(template)
        text = tokenizer("the sea", add_special_tokens=False).input_ids
        assert write(tmp_path / "with", ["the sea"], tokenizer).document(0).tolist() == before + text + after
        without = write(tmp_path / "without", ["the sea"], tokenizer, add_special_tokens=False)
        assert without.document(0).tolist() == text

    def test_tokenizer_without_special_tokens(
        self, tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
    ) -> None:
        bare = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer("$A").backend_tokenizer)
        assert bare.bos_token_id is None
        assert write(tmp_path / "shard", ["sea"], bare).document(0).tolist() == bare("sea").input_ids


class TestLeftOut:
    def test_too_short_documents_are_named(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        texts = ["sea", "the sea was calm and the ship was slow", "x"]
        limit = len(tokenizer(texts[1]).input_ids)
        report = ReadReport()
        shard = write(tmp_path / "shard", texts, tokenizer, min_document_tokens=limit, report=report)
        assert shard.names == ("1",)
        assert report.too_short == ["0", "2"]
        assert manifest_of(shard.folder)["too_short"] == {"count": 2, "names": ["0", "2"]}

    def test_documents_without_tokens_are_empty(
        self, tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
    ) -> None:
        report = ReadReport()
        shard = write(tmp_path / "shard", ["###", "sea", "#"], make_tokenizer(strip=True), report=report)
        assert (shard.names, report.empty) == (("1",), ["0", "2"])

    def test_what_reading_left_out_is_in_the_manifest(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        (tmp_path / "a.txt").write_text("the sea")
        (tmp_path / "b.txt").write_text(" ")
        (tmp_path / "c.txt").write_bytes(b"\xff")
        report = ReadReport()
        documents = read_documents([str(tmp_path)], "text", report)
        shard = write_shard(
            tmp_path / "shard", documents, tokenizer, tokenizer_hash="abc", add_special_tokens=True, report=report
        )
        manifest = manifest_of(shard.folder)
        assert shard.names == ("a",)
        assert manifest["empty"] == {"count": 1, "names": ["b"]}
        assert manifest["undecodable"] == {"count": 1, "names": ["c"]}

    def test_nothing_left(self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        report = ReadReport(empty=["a", "b"], undecodable=["c"])
        with pytest.raises(DataError) as caught:
            write(tmp_path / "shard", ["sea"], tokenizer, min_document_tokens=50, report=report)
        for part in (
            "2 empty",
            "1 not UTF-8",
            "1 shorter than min_document_tokens=50",
            "lower data.min_document_tokens",
        ):
            assert part in str(caught.value)
        assert not list(tmp_path.iterdir())


class TestNothingHalfWritten:
    def test_a_disk_that_fills_up_is_noticed_while_writing(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """/dev/full refuses every write; numpy's tofile says nothing of it."""
        folder = tmp_path / "shard"

        def documents() -> Iterator[Document]:
            yield Document("one", "the sea")
            temporary = next(path for path in tmp_path.iterdir() if path.name.startswith(".shard."))
            (temporary / OFFSETS).symlink_to("/dev/full")

        with pytest.raises(RunFolderError, match=r"shard cannot be written \(.*No space left on device"):
            write_shard(
                folder, documents(), tokenizer, tokenizer_hash="abc", add_special_tokens=True, report=ReadReport()
            )
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt(), DataError("bad line")], ids=repr)
    def test_failure_in_the_middle(
        self,
        tmp_path: Path,
        tokenizer: PreTrainedTokenizerFast,
        monkeypatch: pytest.MonkeyPatch,
        failure: BaseException,
    ) -> None:
        def documents() -> Iterator[Document]:
            yield Document("one", "the sea")
            assert any(tmp_path.iterdir()), "writing has begun"
            raise failure

        monkeypatch.setattr("longlora.data.shards._BATCH_CHARACTERS", 1)
        with pytest.raises(type(failure)):
            write_shard(
                tmp_path / "shard",
                documents(),
                tokenizer,
                tokenizer_hash="abc",
                add_special_tokens=True,
                report=ReadReport(),
            )
        assert not list(tmp_path.iterdir())

    def test_full_disk_names_the_remedy(
        self, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("longlora.data.shards.write_manifest", refuse)
        with pytest.raises(RunFolderError, match=r"shard cannot be written .*No space left.*free the disk"):
            write(tmp_path / "shard", ["sea"], tokenizer)
        assert not list(tmp_path.iterdir())

    def test_existing_shard_is_kept(self, written: TokenShard, tokenizer: PreTrainedTokenizerFast) -> None:
        before = written.tokens.tolist()
        with pytest.raises(RunFolderError, match="already exists"):
            write(written.folder, ["sea"], tokenizer)
        assert open_shard(written.folder, "abc").tokens.tolist() == before


class TestDamage:
    @pytest.mark.parametrize("name", [TOKENS, OFFSETS])
    def test_flipped_bit(self, written: TokenShard, name: str) -> None:
        path = written.folder / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} does not match its sha256: run `longlora prepare` again"):
            open_shard(written.folder, "abc")

    @pytest.mark.parametrize("name", [TOKENS, OFFSETS])
    def test_truncated_file(self, written: TokenShard, name: str) -> None:
        path = written.folder / name
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(
            DataError, match=rf"{name} has \d+ bytes, its manifest says \d+: run `longlora prepare` again"
        ):
            open_shard(written.folder, "abc")

    @pytest.mark.parametrize("name", [TOKENS, OFFSETS, MANIFEST])
    def test_missing_file(self, written: TokenShard, name: str) -> None:
        (written.folder / name).unlink()
        with pytest.raises(DataError, match=rf"{name} (is missing|does not exist): run `longlora prepare` again"):
            open_shard(written.folder, "abc")

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="does not exist: run `longlora prepare` again"):
            open_shard(tmp_path / "nothing", "abc")

    @pytest.mark.parametrize("content", ["{", "[]", "{}", "7", '{"files": 3}', '{"files": {"tokens.bin": {}}}'])
    def test_foreign_manifest(self, written: TokenShard, content: str) -> None:
        (written.folder / MANIFEST).write_text(content)
        with pytest.raises(DataError, match="run `longlora prepare` again"):
            open_shard(written.folder, "abc")

    def test_manifest_that_names_no_files(self, written: TokenShard) -> None:
        manifest = manifest_of(written.folder) | {"files": {}}
        (written.folder / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=r"names no files.*run `longlora prepare` again"):
            open_shard(written.folder, "abc")

    @pytest.mark.parametrize(
        ("offsets", "names", "message"),
        [
            ([0, 2, 4], ["a"], "1 documents need 2 offsets, there are 3"),
            ([1, 2, 4], ["a", "b"], "do not increase from 0"),
            ([0, 3, 2], ["a", "b"], "do not increase from 0"),
            ([0, 2, 2, 4], ["a", "b", "c"], "do not increase from 0"),
            ([0, 2, 3], ["a", "b"], "last offset is 3, there are 4 tokens"),
            ([0, 2, 5], ["a", "b"], "last offset is 5, there are 4 tokens"),
            (
                [0, 1, 2],
                ["a", "b"],
                "last offset is 2, there are 4 tokens in tokens.bin; 8 bytes a token are not int32",
            ),
            (
                [0, 4, 8],
                ["a", "b"],
                "last offset is 8, there are 4 tokens in tokens.bin; 2 bytes a token are not int32",
            ),
            ([0, 2, 4], ["a", 7], "no list of document names"),
            ([0, 2, 4], None, "no list of document names"),
        ],
    )
    def test_files_that_disagree(self, tmp_path: Path, offsets: list[int], names: object, message: str) -> None:
        np.arange(4, dtype="<i4").tofile(tmp_path / TOKENS)
        np.array(offsets, dtype="<i8").tofile(tmp_path / OFFSETS)
        write_manifest(tmp_path, schema=1, tokenizer_hash="abc", names=names)
        with pytest.raises(DataError, match=rf"{message}.*: run `longlora prepare` again"):
            open_shard(tmp_path, "abc")

    @pytest.mark.parametrize(("token", "place"), [(-1, 0), (-1, 7), (320, 3), (2**31 - 1, 9)])
    def test_tokens_that_the_model_does_not_have(self, written: TokenShard, token: int, place: int) -> None:
        open_shard(written.folder, "abc", vocabulary=320)
        tokens = np.fromfile(written.folder / TOKENS, dtype="<i4")
        tokens[place] = token
        rewrite(written.folder, TOKENS, tokens.tobytes())
        with pytest.raises(DataError, match=rf"{TOKENS} holds token {token} at position {place}, and the model"):
            open_shard(written.folder, "abc", vocabulary=320)
        if token >= 0:
            open_shard(written.folder, "abc")

    def test_the_last_token_of_the_vocabulary_is_in_it(self, written: TokenShard) -> None:
        largest = int(written.tokens.max())
        open_shard(written.folder, "abc", vocabulary=largest + 1)
        with pytest.raises(DataError, match=rf"holds token {largest} at .* ids from 0 to {largest - 1}: prepare"):
            open_shard(written.folder, "abc", vocabulary=largest)

    @pytest.mark.parametrize(("dtype", "width"), [("<u2", 2), ("<i8", 8)])
    def test_tokens_of_another_type(self, written: TokenShard, dtype: str, width: int) -> None:
        tokens = np.fromfile(written.folder / TOKENS, dtype="<i4")[: len(written.tokens) // 2 * 2]
        offsets = np.array([0, 1, 2, len(tokens)], dtype="<i8")
        (written.folder / OFFSETS).write_bytes(offsets.tobytes())
        rewrite(written.folder, TOKENS, tokens.astype(dtype).tobytes(), tokens=len(tokens))
        with pytest.raises(DataError, match=rf"{TOKENS}; {width} bytes a token are not int32: run `longlora prepare`"):
            open_shard(written.folder, "abc")

    @pytest.mark.parametrize(
        ("facts", "message"),
        [
            ({"documents": 4}, "counts 4 documents and names 3"),
            ({"names": ["line0"], "documents": 3}, "counts 3 documents and names 1"),
            ({"tokens": 5}, "counts 5 tokens, tokens.bin has"),
            ({"tokenizer_hash": 7}, "tokenizer_hash in its manifest is int, not text"),
            ({"chat_template": ["x"]}, "chat_template in its manifest is list, not text"),
            ({"kind": "instruct"}, "it holds instructions, and its manifest names no mask.bin"),
        ],
    )
    def test_facts_that_do_not_agree(self, written: TokenShard, facts: dict[str, object], message: str) -> None:
        rewrite(written.folder, TOKENS, (written.folder / TOKENS).read_bytes(), **facts)
        with pytest.raises(DataError, match=message):
            open_shard(written.folder, None)

    def test_a_mask_of_other_values(self, tmp_path: Path) -> None:
        rows = [TokenRow("a", [1, 2, 3], [0, 1, 1])]
        write_rows(tmp_path / "shard", rows, tokenizer_hash="abc", nothing_left=str, facts=dict)
        rewrite(tmp_path / "shard", LOSS_MASK, b"\x00\x01\x02")
        with pytest.raises(DataError, match="mask.bin holds other values than 0 and 1"):
            open_shard(tmp_path / "shard", "abc")

    def test_unknown_schema(self, tmp_path: Path) -> None:
        (tmp_path / TOKENS).write_bytes(b"")
        write_manifest(tmp_path, schema=2, tokenizer_hash="abc")
        with pytest.raises(DataError, match="schema 2, this version reads 1"):
            open_shard(tmp_path, "abc")

    def test_another_tokenizer(self, written: TokenShard) -> None:
        with pytest.raises(
            DataError, match="prepared with tokenizer abc, the model has xyz: run `longlora prepare` again"
        ):
            open_shard(written.folder, "xyz")
