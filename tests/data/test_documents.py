"""Every kind of source is read in order, and nothing is left out without being named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from longlora.data.documents import Document, ReadReport, read_documents
from longlora.errors import DataError


def read(*sources: object, text_field: str = "text") -> tuple[list[Document], ReadReport]:
    report = ReadReport()
    return list(read_documents([str(source) for source in sources], text_field, report)), report


def pairs(*sources: object, text_field: str = "text") -> list[tuple[str, str]]:
    return [(document.name, document.text) for document in read(*sources, text_field=text_field)[0]]


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def table(path: Path, **columns: object) -> Path:
    parquet.write_table(pa.table(columns), path, row_group_size=2)
    return path


class TestFiles:
    def test_text_file_is_one_document_named_by_its_stem(self, tmp_path: Path) -> None:
        (tmp_path / "book.one.txt").write_text("käse\n\nbrot\n", encoding="utf-8")
        assert pairs(tmp_path / "book.one.txt") == [("book.one", "käse\n\nbrot\n")]

    def test_byte_order_mark_is_dropped_and_line_ends_become_newlines(self, tmp_path: Path) -> None:
        (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
        assert pairs(tmp_path / "a.TXT") == [("a", "one\ntwo\nthree\n")]

    def test_jsonl_names_carry_the_line_and_blank_lines_are_no_records(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": "two\\r\\n"}')
        documents, report = read(tmp_path / "a.jsonl")
        assert [(d.name, d.text) for d in documents] == [("a.jsonl:1", "one"), ("a.jsonl:3", "two\r\n")]
        assert report == ReadReport(documents=2)

    def test_jsonl_is_not_split_at_unicode_line_separators(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
        assert pairs(tmp_path / "a.jsonl") == [("a.jsonl:1", "one\u2028two")]

    @pytest.mark.parametrize(
        "kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())], ids=str
    )
    def test_parquet_text_of_any_arrow_type(self, tmp_path: Path, kind: pa.DataType) -> None:
        texts = ["ä", "b", "c", "ä"]
        path = table(
            tmp_path / "a.parquet",
            n=[1, 2, 3, 4],
            text=pa.array([t.encode() for t in texts]).cast(pa.string()).cast(kind),
        )
        assert pairs(path) == [(f"a.parquet:{row}", text) for row, text in enumerate(texts)]

    def test_parquet_rows_count_on_across_batches(self, tmp_path: Path) -> None:
        texts = [f"text {row}" for row in range(150)]
        path = tmp_path / "a.parquet"
        parquet.write_table(pa.table({"text": texts}), path, row_group_size=100)
        assert pairs(path) == [(f"a.parquet:{row}", text) for row, text in enumerate(texts)]

    def test_another_text_field(self, tmp_path: Path) -> None:
        lines = jsonl(tmp_path / "a.jsonl", {"text": "no", "body": "yes"})
        rows = table(tmp_path / "a.parquet", text=["no"], body=["yes"])
        assert [text for _, text in pairs(lines, rows, text_field="body")] == ["yes", "yes"]

    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text.strip())))
    def test_jsonl_round_trip(self, tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
        path = jsonl(tmp_path_factory.mktemp("round") / "a.jsonl", *({"text": text} for text in texts))
        assert [text for _, text in pairs(path)] == texts


class TestFolders:
    def test_all_known_files_at_any_depth_sorted_by_path(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / ".hidden").mkdir()
        (tmp_path / "b" / "two.md").write_text("two")
        (tmp_path / "c.txt").write_text("three")
        jsonl(tmp_path / "a.jsonl", {"text": "zero"}, {"text": "one"})
        table(tmp_path / "b" / "a.parquet", text=["p"])
        for ignored in ("notes.csv", ".hidden/x.txt", "._c.txt"):
            (tmp_path / ignored).write_text("never")
        assert pairs(tmp_path) == [
            ("a.jsonl:1", "zero"),
            ("a.jsonl:2", "one"),
            ("b/a.parquet:0", "p"),
            ("b/two", "two"),
            ("c", "three"),
        ]

    def test_linked_folders_are_read_and_loops_end(self, tmp_path: Path) -> None:
        (tmp_path / "books").mkdir()
        (tmp_path / "far").mkdir()
        (tmp_path / "far" / "a.txt").write_text("far")
        (tmp_path / "books" / "link").symlink_to(tmp_path / "far")
        (tmp_path / "far" / "back").symlink_to(tmp_path / "books")
        assert pairs(tmp_path / "books") == [("link/a", "far")]

    def test_sources_keep_their_order(self, tmp_path: Path) -> None:
        for name in ("b", "a"):
            (tmp_path / f"{name}.txt").write_text(name)
        assert [name for name, _ in pairs(tmp_path / "b.txt", tmp_path / "a.txt")] == ["b", "a"]

    def test_files_of_other_types_are_named(self, tmp_path: Path) -> None:
        for name in ("b.pdf", "a.txt", "sub/c.HTML", "sub/.hidden.pdf", "noext"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("text")
        report = ReadReport()
        found = read_documents([str(tmp_path)], "text", report)
        assert report.other_files == ["b.pdf", "noext", "sub/c.HTML"]
        assert [document.name for document in found] == ["a"]
        left_out = "3 not .txt, .md, .jsonl or .parquet (b.pdf, noext, sub/c.HTML)"
        assert report.summary() == f"read 1 document; left out: {left_out}"

    def test_names_that_are_not_utf8_can_be_written_and_equal_ones_are_all_read(self, tmp_path: Path) -> None:
        for name in (b"caf\xe8.txt", b"caf\xe9.txt"):
            (tmp_path / os.fsdecode(name)).write_bytes(name)
        (tmp_path / os.fsdecode(b"\xe9.txt")).write_bytes(b"")
        jsonl(tmp_path / os.fsdecode(b"\xe9.jsonl"), {"text": "one"})
        (tmp_path / os.fsdecode(b"\xe9.pdf")).write_bytes(b"x")
        table(tmp_path / "a.parquet", text=["p"]).rename(tmp_path / os.fsdecode(b"\xe9.parquet"))
        for name in (b"caf\xe8.txt", b"caf\xe9.txt"):
            (tmp_path / os.fsdecode(name)).write_text(str(name))
        documents, report = read(tmp_path)
        cafes = [("caf\ufffd", str(name)) for name in (b"caf\xe8.txt", b"caf\xe9.txt")]
        assert [(d.name, d.text) for d in documents] == [*cafes, ("\ufffd.jsonl:1", "one"), ("\ufffd.parquet:0", "p")]
        assert report.empty == ["\ufffd"]
        assert report.other_files == ["\ufffd.pdf"]
        assert pairs(tmp_path / os.fsdecode(b"caf\xe9.txt")) == cafes[1:]

    def test_folder_without_known_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("x")
        with pytest.raises(DataError, match=r"holds no \.txt, \.md, \.jsonl or \.parquet file"):
            read(tmp_path)

    def test_unreadable_subfolder_is_not_passed_over(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "closed").mkdir()
        scandir = os.scandir

        def refuse(path: str) -> object:  # not chmod, because root may read everything
            if str(path).endswith("closed"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError, match=r"closed cannot be read \(Permission denied\): check its permissions"):
            read(tmp_path)


class TestSavedDatasets:
    def test_dataset(self, tmp_path: Path) -> None:
        datasets.Dataset.from_dict({"text": ["one", " ", None, "two"]}).save_to_disk(tmp_path / "saved")
        documents, report = read(tmp_path / "saved")
        assert [(d.name, d.text) for d in documents] == [("saved:0", "one"), ("saved:3", "two")]
        assert report.empty == ["saved:1", "saved:2"]

    def test_selected_rows_keep_their_order(self, tmp_path: Path) -> None:
        rows = datasets.Dataset.from_dict({"n": [1, 2, 3], "text": ["one", "two", "three"]})
        rows.select([2, 0]).save_to_disk(tmp_path / "saved")
        assert [text for _, text in pairs(tmp_path / "saved")] == ["three", "one"]

    def test_dictionary_of_splits(self, tmp_path: Path) -> None:
        splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
        datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
        assert pairs(tmp_path / "saved", tmp_path / "saved" / "test") == [("saved:0", "train"), ("test:0", "test")]

    def test_errors(self, tmp_path: Path) -> None:
        rows = datasets.Dataset.from_dict({"body": ["one"], "n": [1]})
        rows.save_to_disk(tmp_path / "saved")
        datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "splits")
        (tmp_path / "damaged").mkdir()
        (tmp_path / "damaged" / "state.json").write_text("{")
        with pytest.raises(DataError, match=r"no field 'text', its fields are 'body', 'n'.*data\.text_field"):
            read(tmp_path / "saved")
        with pytest.raises(DataError, match=r"field 'n' is int64, not text.*data\.text_field"):
            read(tmp_path / "saved", text_field="n")
        with pytest.raises(DataError, match="no split 'train', it has 'test': give FOLDER/SPLIT"):
            read(tmp_path / "splits")
        with pytest.raises(DataError, match=r"damaged cannot be loaded .*save it again"):
            read(tmp_path / "damaged")


class TestHub:
    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("books", ("books", "train")),
            ("some-one/long.books", ("some-one/long.books", "train")),
            ("some-one/books:test[:2]", ("some-one/books", "test[:2]")),
        ],
    )
    def test_id_and_split(self, monkeypatch: pytest.MonkeyPatch, source: str, expected: tuple[str, str]) -> None:
        calls: list[tuple[str, dict[str, object]]] = []

        def load(name: str, **arguments: object) -> datasets.Dataset:
            calls.append((name, arguments))
            return datasets.Dataset.from_dict({"text": ["one"]})

        monkeypatch.setattr(datasets, "load_dataset", load)
        name, split = expected
        assert pairs(source) == [(f"{name}:{split}:0", "one")]
        assert calls == [(name, {"split": split})], "no argument may switch remote code on"

    def test_failure_is_one_line_with_a_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(name: str, **arguments: object) -> datasets.Dataset:
            raise RuntimeError("Dataset scripts\nare no longer supported")

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(DataError) as caught:
            read("some/books")
        assert "\n" not in str(caught.value)
        for part in ("some/books", "'train'", "RuntimeError: Dataset scripts are", "ID:SPLIT"):
            assert part in str(caught.value)

    @pytest.mark.parametrize(
        "source",
        [
            "a/b/c",
            "./books",
            "/no/books",
            "~/no-such-books",
            "books.txt",
            "some/books.jsonl",
            "a.parquet:train",
            "a\\b",
        ],
    )
    def test_missing_path_is_never_looked_up(self, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("looked up"))
        with pytest.raises(DataError, match=r"does not exist: give a file, a folder or the id"):
            read(source)


class TestLeftOut:
    def test_empty_and_undecodable_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b" \n\t\xc2\xa0")
        (tmp_path / "b.txt").write_bytes(b"")
        (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf")
        (tmp_path / "c.txt").write_bytes("größe".encode("latin-1"))
        (tmp_path / "d.txt").write_bytes("text".encode("utf-16"))
        (tmp_path / "e.jsonl").write_bytes(
            b'{"text": ""}\n{"text": null}\n{"text": "\xff"}\n{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n'
        )
        documents, report = read(tmp_path)
        assert [(d.name, d.text) for d in documents] == [("e.jsonl:5", "\U0001f600")]
        assert report.documents == 1
        assert report.empty == ["a", "b", "bom", "e.jsonl:1", "e.jsonl:2"]
        assert report.undecodable == ["c", "d", "e.jsonl:3", "e.jsonl:4"]

    def test_invalid_bytes_in_a_parquet_string(self, tmp_path: Path) -> None:
        offsets = pa.py_buffer(np.array([0, 2, 4, 6], "<i4").tobytes())
        strings = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"ab\xff\xfecd")])
        documents, report = read(table(tmp_path / "a.parquet", text=strings))
        assert [d.text for d in documents] == ["ab", "cd"]
        assert report.undecodable == ["a.parquet:1"]

    def test_missing_parquet_values_are_empty(self, tmp_path: Path) -> None:
        _, report = read(table(tmp_path / "a.parquet", text=pa.array(["a", None, ""])))
        assert (report.documents, report.empty) == (1, ["a.parquet:1", "a.parquet:2"])

    def test_summary(self) -> None:
        assert ReadReport(documents=1).summary() == "read 1 document"
        report = ReadReport(documents=5, empty=["a", "b", "c", "d"], undecodable=["x"], too_short=["y"])
        expected = "read 5 documents; left out: 4 empty (a, b, c, ...), 1 undecodable (x), 1 too short (y)"
        assert report.summary() == expected


class TestErrors:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", r"a\.jsonl:2 is not valid JSON .*one JSON object on each line"),
            ("[" * 100_000, r"a\.jsonl:2 is not valid JSON"),
            ('["text"]', r"a\.jsonl:2 holds a JSON list"),
            ('{"body": "x", "n": 1}', r"a\.jsonl:2 has no field 'text', its fields are 'body', 'n'.*data\.text_field"),
            ("{}", r"a\.jsonl:2 has no field 'text', its fields are none"),
            ('{"text": 7}', r"a\.jsonl:2: field 'text' is int, not text.*data\.text_field"),
        ],
    )
    def test_jsonl_line(self, tmp_path: Path, line: str, message: str) -> None:
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
        with pytest.raises(DataError, match=message):
            read(tmp_path / "a.jsonl")

    def test_parquet(self, tmp_path: Path) -> None:
        path = table(tmp_path / "a.parquet", body=["x"], n=[1], codes=pa.array([1]).dictionary_encode())
        with pytest.raises(
            DataError, match=r"a\.parquet has no field 'text', its fields are 'body', 'n', 'codes'.*text_field"
        ):
            read(path)
        for field in ("n", "codes"):
            with pytest.raises(DataError, match=rf"field '{field}' is .*int64.*, not text"):
                read(path, text_field=field)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=r"a\.parquet is not a whole parquet file"):
            read(path)

    def test_unknown_type(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("x")
        with pytest.raises(
            DataError, match=r"a\.csv has an unknown type '\.csv': known are \.txt, \.md, \.jsonl, \.parquet"
        ):
            read(tmp_path / "a.csv")

    @pytest.mark.parametrize("source", ["", "  "])
    def test_empty_source_is_not_the_working_folder(self, source: str) -> None:
        with pytest.raises(DataError, match="is empty: give a file"):
            read(source)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_pipe(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.txt")
        with pytest.raises(DataError, match=r"pipe\.txt is neither a file nor a folder"):
            read(tmp_path / "pipe.txt")

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
    def test_unreadable_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", str(tmp_path / name))

        (tmp_path / name).write_text("x")
        monkeypatch.setattr(Path, "open", refuse)
        monkeypatch.setattr(parquet, "ParquetFile", refuse)
        with pytest.raises(DataError, match=rf"{name} cannot be read \(Permission denied\): check its permissions"):
            read(tmp_path / name)

    def test_a_wrong_source_is_reported_before_anything_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a")
        with pytest.raises(DataError, match=r"b\.txt does not exist"):
            read_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], "text", ReadReport())


def test_documents_are_streamed(tmp_path: Path) -> None:
    """A mistake in a later line is only met when that line is reached."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{')
    stream = read_documents([str(tmp_path / "a.jsonl")], "text", ReadReport())
    assert next(stream).text == "one"
    with pytest.raises(DataError):
        next(stream)


def test_reading_text_needs_no_heavy_library() -> None:
    heavy = {"torch", "datasets", "pyarrow", "transformers"}
    code = f"import sys, longlora.data.documents; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
