"""Records of instruction files and datasets, one after another: names, places and raw values out.

What a record means is `instruct_examples.py`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlora.data.formats import (
    BATCH_ROWS,
    any_of,
    decode,
    hub_dataset,
    json_value,
    local_path,
    printable,
    saved_dataset,
    unreadable,
    visible_files,
)
from longlora.errors import DataError

SUFFIXES = (".json", ".jsonl", ".parquet")
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Record:
    """One example as it stands in its file."""

    name: str
    """For reports: ``file.json:12``, the line on which it begins, or ``file.parquet:0``, the row."""
    place: str
    """For errors: the same with the whole path."""
    values: dict[str, Any]


def record_readers(source: str) -> list[Callable[[], Iterator[Record]]]:
    """A reader for each file or dataset that `source` stands for, each of one format.

    A source is tried in this order: a folder saved with ``datasets.save_to_disk``, any other folder (all files in it,
    at any depth, sorted), a file, a hub id ``id`` or ``id:split``. Remote code is never run.

    Raises:
        DataError: the source does not exist or is of an unknown kind. The readers raise it for a damaged file.
    """
    path = local_path(source)
    try:
        if path.is_dir():
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                return [lambda: _rows(saved_dataset(path), printable(path.resolve().name), str(path))]
            return [_file_reader(file) for file in _files(path)]
        if path.is_file():
            return [_file_reader(path)]
    except OSError as error:
        raise unreadable(path, error) from error
    if not source.strip() or path.suffix.lower() in (*SUFFIXES, ".txt", ".md") or source.count("/") > 1:
        raise DataError(f"{source!r} does not exist: give a file, a folder or the id of a dataset on the hub")
    return [lambda: _rows(hub_dataset(source), source, f"dataset {source}")]


def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in visible_files(folder) if path.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(f"folder {folder} holds no {any_of(SUFFIXES)} file: give a folder with at least one")
    return found


def _file_reader(path: Path) -> Callable[[], Iterator[Record]]:
    suffix = path.suffix.lower()
    if suffix == ".json":
        return lambda: _json(path)
    if suffix == ".jsonl":
        return lambda: _jsonl(path)
    if suffix == ".parquet":
        return lambda: _parquet(path)
    raise DataError(
        f"{path} has an unknown type {path.suffix!r} for instructions: known are {', '.join(SUFFIXES)}; texts need "
        "data.kind=text"
    )


def _jsonl(path: Path) -> Iterator[Record]:
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                text = decode(line)
                if text is None:
                    raise DataError(f"{path}:{number} is not UTF-8: convert the file")
                if text.strip():
                    yield _record(path, number, json_value(text, f"{path}:{number}"))
    except OSError as error:
        raise unreadable(path, error) from error


def _json(path: Path) -> Iterator[Record]:
    """The items of one JSON list, or JSON lines in a file with the wrong suffix."""
    try:
        text = decode(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    if text is None:
        raise DataError(f"{path} is not UTF-8: convert the file")
    start = _after_space(text, 0)
    if text[start : start + 1] != "[":
        yield from _jsonl(path)
        return
    # Item by item, to know the line of each: the library's parser keeps no places.
    decoder = json.JSONDecoder()
    position, line, counted = _after_space(text, start + 1), 1, 0
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line} is not valid JSON ({error}): repair the file") from None
        yield _record(path, line, value)
        position = _after_space(text, position)
        if text[position : position + 1] == ",":
            position = _after_space(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise DataError(f"{path}:{line}: an item of the list is not followed by a comma or ]: repair the file")


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _record(path: Path, number: int, value: Any) -> Record:
    place = f"{path}:{number}"
    if not isinstance(value, dict):
        raise DataError(f"{place} holds a JSON {type(value).__name__}: each example must be an object")
    return Record(f"{printable(path.name)}:{number}", place, value)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        # Not by its path, which Arrow takes for UTF-8.
        with path.open("rb") as handle, parquet.ParquetFile(handle) as file:
            rows = (row for batch in file.iter_batches(BATCH_ROWS) for row in batch.to_pylist())
            yield from _rows(rows, printable(path.name), str(path))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a whole parquet file with UTF-8 ({error}): write it again") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _rows(rows: Iterable[dict[str, Any]], name: str, place: str) -> Iterator[Record]:
    for number, row in enumerate(rows):
        # Columns that a row does not have are empty in these formats; in JSON they are missing.
        present = {key: value for key, value in row.items() if value is not None}
        yield Record(f"{name}:{number}", f"{place}:{number}", present)
