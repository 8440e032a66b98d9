"""One reader for each kind of file and for datasets: names and raw texts out, streamed.

Nothing is left out here; `documents.py` decides what is empty or undecodable.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlora.errors import DataError, one_line

if TYPE_CHECKING:
    import datasets
    import pyarrow

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")

BATCH_ROWS = 64  # a row may be a whole book
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SURROGATE = re.compile("[\ud800-\udfff]")

Raw = tuple[str, str | bytes | None]
"""A name and its text; bytes are not decoded yet, None is a missing value."""
Reader = Callable[[str], Iterator[Raw]]
"""Text field -> names and texts of one file or dataset."""


def local_path(source: str) -> Path:
    """`source` as a path, ``~`` unfolded; `DataError` for the home of a user that there is not."""
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise DataError(f"{source} cannot be found ({one_line(error)}): give the whole path") from None


def printable(name: str) -> str:
    """A file's name as valid Unicode: what is not UTF-8 in it, half surrogate pairs to Python, cannot be written."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", name)


def decode(raw: str | bytes | None) -> str | None:
    """The text, empty for a missing value; None if it is not UTF-8 or holds half a surrogate pair, as JSON may."""
    if raw is None:
        return ""
    if isinstance(raw, str):
        return None if _SURROGATE.search(raw) else raw
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def file_reader(path: Path, name: str) -> Reader:
    """The reader of one file by its suffix, which `name` ends in too; `DataError` for an unknown one."""
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return lambda text_field: _read_text(path, name[: -len(suffix)])
    if suffix == ".jsonl":
        return lambda text_field: _read_jsonl(path, name, text_field)
    if suffix == ".parquet":
        return lambda text_field: _read_parquet(path, name, text_field)
    raise DataError(f"{path} has an unknown type {path.suffix!r}: known are {', '.join(SUFFIXES)}")


def _read_text(path: Path, name: str) -> Iterator[Raw]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    yield name, content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _read_jsonl(path: Path, name: str, text_field: str) -> Iterator[Raw]:
    for number, line in _lines(path):
        text = decode(line)
        if text is None:
            yield f"{name}:{number}", line  # undecodable: left out and named like everything else
        elif not text.isspace():
            yield f"{name}:{number}", _json_field(text, text_field, f"{path}:{number}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as handle:
            yield from enumerate(handle, start=1)
    except OSError as error:
        raise unreadable(path, error) from error


def json_value(line: str, place: str) -> Any:
    """The value of a line of JSON; `DataError` if it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON ({error}): write one JSON object on each line") from None


def _json_field(line: str, text_field: str, place: str) -> str | None:
    record = json_value(line, place)
    if not isinstance(record, dict):
        raise DataError(f"{place} holds a JSON {type(record).__name__}: write one JSON object on each line")
    if text_field not in record:
        raise _missing_field(place, text_field, record)
    value = record[text_field]
    if value is not None and not isinstance(value, str):
        raise _not_text(place, text_field, type(value).__name__)
    return value


def _read_parquet(path: Path, name: str, text_field: str) -> Iterator[Raw]:
    import pyarrow
    from pyarrow import parquet

    try:
        # Not by its path, which Arrow takes for UTF-8.
        with path.open("rb") as handle, parquet.ParquetFile(handle) as file:
            if text_field not in file.schema_arrow.names:
                raise _missing_field(str(path), text_field, file.schema_arrow.names)
            columns = (batch.column(0) for batch in file.iter_batches(BATCH_ROWS, columns=[text_field]))
            yield from _rows(columns, name, text_field, str(path))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a whole parquet file ({_named(error)}): write or download it again") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _rows(
    columns: Iterable[pyarrow.Array | pyarrow.ChunkedArray], name: str, text_field: str, place: str
) -> Iterator[Raw]:
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


def saved_dataset_reader(folder: Path) -> Reader:
    """The reader of a folder saved with ``datasets.save_to_disk``."""
    name = printable(folder.resolve().name)
    return lambda text_field: _dataset_rows(saved_dataset(folder), name, text_field, f"{folder}")


def saved_dataset(folder: Path) -> datasets.Dataset:
    """The dataset, or its split ``train``; `DataError` if it is damaged or has no such split."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets raises many kinds for a damaged folder
        raise DataError(f"saved dataset {folder} cannot be loaded ({_named(error)}): save it again") from error
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if "train" not in dataset:
        raise DataError(f"saved dataset {folder} has no split 'train', it has {_quoted(dataset)}: give FOLDER/SPLIT")
    return dataset["train"]


def hub_reader(source: str) -> Reader:
    """The reader of a hub dataset ``id`` or ``id:split``; `DataError` if `source` cannot be an id."""
    name, split = _id_and_split(source)
    if not _HUB_ID.fullmatch(name) or Path(name).suffix.lower() in SUFFIXES:
        raise DataError(
            f"{source} does not exist: give a file, a folder or the id of a dataset on the Hugging Face hub"
        )
    return lambda text_field: _dataset_rows(hub_dataset(source), f"{name}:{split}", text_field, f"dataset {name}")


def hub_dataset(source: str) -> datasets.Dataset:
    """A dataset of the hub, ``id`` or ``id:split``, without running its code; `DataError` if it cannot be had."""
    import datasets

    name, split = _id_and_split(source)
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets raises many kinds: no such id or split, no network, needs remote code
        raise DataError(
            f"{source} does not exist here and cannot be loaded from the Hugging Face hub with split {split!r} "
            f"({_named(error)}): give an existing path, an id with its split as ID:SPLIT, or local files"
        ) from error


def _id_and_split(source: str) -> tuple[str, str]:
    name, _, split = source.partition(":")
    return name, split or "train"


def _dataset_rows(dataset: datasets.Dataset, name: str, text_field: str, place: str) -> Iterator[Raw]:
    if text_field not in dataset.column_names:
        raise _missing_field(place, text_field, dataset.column_names)
    tables = dataset.select_columns([text_field]).with_format("arrow").iter(batch_size=BATCH_ROWS)
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


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a path that the operating system does not let us read."""
    reason = error.strerror or _named(error)
    return DataError(f"{error.filename or path} cannot be read ({reason}): check its permissions and the disk")


def _named(error: Exception) -> str:
    """Kind and message of an error, without line breaks."""
    return f"{type(error).__name__}: {one_line(error)}"


def visible_files(folder: Path) -> Iterator[Path]:
    """All files of `folder` at any depth, also behind links, but for what begins with a dot.

    Raises:
        OSError: a folder cannot be read.
    """
    visited: set[str] = set()
    # Not Path.rglob, which silently passes over unreadable folders and links to folders.
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        resolved = os.path.realpath(parent)
        if resolved in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(resolved)
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def text_files(source: Path) -> list[Path]:
    """The plain text files that a local source stands for, as far as they are there; sorted."""
    files = visible_files(source) if source.is_dir() else [source]
    return sorted(file for file in files if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())


def any_of(suffixes: Sequence[str]) -> str:
    """``.a, .b or .c``."""
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
