"""Read documents one after another from files, folders and Hugging Face datasets.

A source is tried in this order: a folder saved with ``datasets.save_to_disk``, any other folder, a file, a hub id.
Every reader yields pairs of a name and a raw text; what a raw text is and which are left out is decided in one place.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlora.errors import DataError

if TYPE_CHECKING:
    import pyarrow

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")

_BATCH_ROWS = 64  # a row may be a whole book
_NAMES_SHOWN = 3
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SURROGATE = re.compile("[\ud800-\udfff]")

_Raw = tuple[str, str | bytes | None]
"""A name and its text; bytes are not decoded yet, None is a missing value."""
_Reader = Callable[[str], Iterator[_Raw]]
"""Text field -> names and texts of one file or dataset."""


@dataclass(frozen=True)
class Document:
    """One text to train on or to measure on."""

    name: str
    """Where it came from, for messages and reports: ``folder/book``, ``file.jsonl:12`` or ``file.parquet:0``."""
    text: str
    """Not empty, and valid Unicode."""


@dataclass
class ReadReport:
    """Counts what was read and names what was left out. Use a new one for each shard."""

    documents: int = 0
    """Documents with text that were read, also those that later turn out to have no or too few tokens."""
    empty: list[str] = field(default_factory=list)
    """Names of documents without text or without tokens."""
    undecodable: list[str] = field(default_factory=list)
    """Names of documents that are not UTF-8."""
    too_short: list[str] = field(default_factory=list)
    """Names of documents with fewer tokens than asked for; `write_shard` fills it."""

    def summary(self) -> str:
        """One line, for example ``read 12 documents; left out: 2 empty (a, b), 1 undecodable (c)``."""
        kinds = (("empty", self.empty), ("undecodable", self.undecodable), ("too short", self.too_short))
        left_out = [f"{len(names)} {kind} ({_first(names)})" for kind, names in kinds if names]
        read = f"read {self.documents} document{'' if self.documents == 1 else 's'}"
        return f"{read}; left out: {', '.join(left_out)}" if left_out else read


def read_documents(sources: Sequence[str], text_field: str, report: ReadReport) -> Iterator[Document]:
    """The documents of all `sources`, in order; files are streamed, a whole text file is one document.

    Local paths are checked before this function returns, so a mistyped one is reported before anything is read.

    Args:
        sources: text files (.txt, .md), .jsonl and .parquet files, folders with such files at any depth (sorted by
            path; names that begin with a dot are passed over), folders saved with ``datasets.save_to_disk``, and hub
            ids ``id`` or ``id:split`` (split ``train`` unless given). Remote code is never run.
        text_field: the column with the text in .jsonl, .parquet and datasets.
        report: counts documents and names those left out because they are empty or not UTF-8, while the result is
            iterated. A byte order mark is dropped, and line ends of text files become ``\\n``.

    Raises:
        DataError: a source does not exist, cannot be read, is of an unknown type or lacks the text field.
    """
    readers = [reader for source in sources for reader in _readers(source)]
    return _decoded((raw for reader in readers for raw in reader(text_field)), report)


def _decoded(raws: Iterable[_Raw], report: ReadReport) -> Iterator[Document]:
    for name, raw in raws:
        text = _decode(raw)
        if text is None:
            report.undecodable.append(name)
        elif not text or text.isspace():
            report.empty.append(name)
        else:
            report.documents += 1
            yield Document(name, text)


def _decode(raw: str | bytes | None) -> str | None:
    """The text, empty for a missing value; None if it is not UTF-8 or holds half a surrogate pair, as JSON may."""
    if raw is None:
        return ""
    if isinstance(raw, str):
        return None if _SURROGATE.search(raw) else raw
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _readers(source: str) -> list[_Reader]:
    """One reader for each file or dataset that `source` stands for."""
    if not source.strip():
        raise DataError(f"source {source!r} is empty: give a file, a folder or a hub id")
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return [_saved_dataset_reader(path)] if _is_saved_dataset(path) else _folder_readers(path)
        if path.is_file():
            return [_file_reader(path, path.name)]
        exists = path.exists()
    except OSError as error:
        raise _unreadable(path, error) from error
    if exists:
        raise DataError(f"{path} is neither a file nor a folder: give one of these")
    return [_hub_reader(source)]


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _folder_readers(folder: Path) -> list[_Reader]:
    paths = sorted(_known_files(folder), key=lambda path: path.relative_to(folder).as_posix())
    if not paths:
        raise DataError(f"folder {folder} holds no {_any_of(SUFFIXES)} file: give a folder with at least one")
    return [_file_reader(path, path.relative_to(folder).as_posix()) for path in paths]


def _known_files(folder: Path) -> Iterator[Path]:
    visited: set[str] = set()
    # Not Path.rglob, which silently passes over unreadable folders and links to folders.
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        resolved = os.path.realpath(parent)
        if resolved in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(resolved)
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(parent, name)


def _raise(error: OSError) -> None:
    raise error


def _file_reader(path: Path, name: str) -> _Reader:
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return lambda text_field: _read_text(path, name[: -len(suffix)])
    if suffix == ".jsonl":
        return lambda text_field: _read_jsonl(path, name, text_field)
    if suffix == ".parquet":
        return lambda text_field: _read_parquet(path, name, text_field)
    raise DataError(f"{path} has an unknown type {path.suffix!r}: known are {', '.join(SUFFIXES)}")


def _read_text(path: Path, name: str) -> Iterator[_Raw]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    yield name, content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _read_jsonl(path: Path, name: str, text_field: str) -> Iterator[_Raw]:
    for number, line in _lines(path):
        text = _decode(line)
        if text is None:
            yield f"{name}:{number}", line  # undecodable: left out and named like everything else
        elif not text.isspace():
            yield f"{name}:{number}", _json_field(text, text_field, f"{path}:{number}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as handle:
            yield from enumerate(handle, start=1)
    except OSError as error:
        raise _unreadable(path, error) from error


def _json_field(line: str, text_field: str, place: str) -> str | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON ({error}): write one JSON object on each line") from None
    if not isinstance(record, dict):
        raise DataError(f"{place} holds a JSON {type(record).__name__}: write one JSON object on each line")
    if text_field not in record:
        raise _missing_field(place, text_field, record)
    value = record[text_field]
    if value is not None and not isinstance(value, str):
        raise _not_text(place, text_field, type(value).__name__)
    return value


def _read_parquet(path: Path, name: str, text_field: str) -> Iterator[_Raw]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise _missing_field(str(path), text_field, file.schema_arrow.names)
            columns = (batch.column(0) for batch in file.iter_batches(_BATCH_ROWS, columns=[text_field]))
            yield from _rows(columns, name, text_field, str(path))
    except pyarrow.ArrowInvalid as error:
        raise DataError(
            f"{path} is not a whole parquet file ({_one_line(error)}): write or download it again"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _rows(
    columns: Iterable[pyarrow.Array | pyarrow.ChunkedArray], name: str, text_field: str, place: str
) -> Iterator[_Raw]:
    """Rows of a text column that comes in batches, as bytes: Arrow does not promise that its strings are UTF-8."""
    import pyarrow

    row = 0
    for column in columns:
        try:
            values = column.cast(pyarrow.large_binary())
        except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowInvalid):
            raise _not_text(place, text_field, str(column.type)) from None
        for value in values:
            yield f"{name}:{row}", value.as_py()
            row += 1


def _saved_dataset_reader(folder: Path) -> _Reader:
    def read(text_field: str) -> Iterator[_Raw]:
        import datasets

        try:
            dataset = datasets.load_from_disk(str(folder))
        except Exception as error:  # datasets raises many kinds for a damaged folder
            raise DataError(f"saved dataset {folder} cannot be loaded ({_one_line(error)}): save it again") from error
        if isinstance(dataset, datasets.DatasetDict):
            splits = list(dataset)
            if "train" not in splits:
                raise DataError(
                    f"saved dataset {folder} has no split 'train', it has {_quoted(splits)}: give FOLDER/SPLIT"
                )
            dataset = dataset["train"]
        yield from _dataset_rows(dataset, folder.resolve().name, text_field, str(folder))

    return read


def _hub_reader(source: str) -> _Reader:
    name, _, split = source.partition(":")
    split = split or "train"
    if not _HUB_ID.fullmatch(name) or Path(name).suffix.lower() in SUFFIXES:
        raise DataError(
            f"{source} does not exist: give a file, a folder or the id of a dataset on the Hugging Face hub"
        )

    def read(text_field: str) -> Iterator[_Raw]:
        import datasets

        try:
            dataset = datasets.load_dataset(name, split=split)
        except Exception as error:  # datasets raises many kinds: no such id or split, no network, needs remote code
            raise DataError(
                f"{source} does not exist here and cannot be loaded from the Hugging Face hub with split {split!r} "
                f"({_one_line(error)}): give an existing path, an id with its split as ID:SPLIT, or local files"
            ) from error
        yield from _dataset_rows(dataset, f"{name}:{split}", text_field, f"dataset {name}")

    return read


def _dataset_rows(dataset: Any, name: str, text_field: str, place: str) -> Iterator[_Raw]:
    if text_field not in dataset.column_names:
        raise _missing_field(place, text_field, dataset.column_names)
    tables = dataset.select_columns([text_field]).with_format("arrow").iter(batch_size=_BATCH_ROWS)
    yield from _rows((table.column(0) for table in tables), name, text_field, place)


def _missing_field(place: str, text_field: str, fields: Iterable[str]) -> DataError:
    has = _quoted(fields) or "none"
    return DataError(
        f"{place} has no field {text_field!r}, its fields are {has}: set data.text_field=NAME to one of its fields"
    )


def _not_text(place: str, text_field: str, kind: str) -> DataError:
    return DataError(
        f"{place}: field {text_field!r} is {kind}, not text: set data.text_field=NAME to a field with text"
    )


def _unreadable(path: Path, error: OSError) -> DataError:
    reason = error.strerror or _one_line(error)
    return DataError(f"{error.filename or path} cannot be read ({reason}): check its permissions and the disk")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _any_of(suffixes: Sequence[str]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
