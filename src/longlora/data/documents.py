"""Read documents one after another from files, folders and Hugging Face datasets.

A source is tried in this order: a folder saved with ``datasets.save_to_disk``, any other folder, a file, a hub id.
Every reader yields pairs of a name and a raw text; what a raw text is and which are left out is decided in one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from longlora.data.formats import (
    SUFFIXES,
    Raw,
    Reader,
    any_of,
    decode,
    file_reader,
    hub_reader,
    local_path,
    printable,
    saved_dataset_reader,
    unreadable,
    visible_files,
)
from longlora.errors import DataError

_NAMES_SHOWN = 3


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

    other_files: list[str] = field(default_factory=list)
    """Files of folders that are of a type nothing here reads, such as PDFs."""

    def summary(self) -> str:
        """One line, for example ``read 12 documents; left out: 2 empty (a, b), 1 undecodable (c)``."""
        kinds = (
            ("empty", self.empty),
            ("undecodable", self.undecodable),
            ("too short", self.too_short),
            (f"not {any_of(SUFFIXES)}", self.other_files),
        )
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
            iterated, and at once what folders hold of other types. A byte order mark is dropped, and line ends of text
            files become ``\\n``.

    Raises:
        DataError: a source does not exist, cannot be read, is of an unknown type or lacks the text field.
    """
    readers = [reader for source in sources for reader in _readers(source, report)]
    return _decoded((raw for reader in readers for raw in reader(text_field)), report)


def _decoded(raws: Iterable[Raw], report: ReadReport) -> Iterator[Document]:
    for name, raw in raws:
        text = decode(raw)
        if text is None:
            report.undecodable.append(name)
        elif not text or text.isspace():
            report.empty.append(name)
        else:
            report.documents += 1
            yield Document(name, text)


def _readers(source: str, report: ReadReport) -> list[Reader]:
    """One reader for each file or dataset that `source` stands for; `report` names files that it passes over."""
    if not source.strip():
        raise DataError(f"source {source!r} is empty: give a file, a folder or a hub id")
    path = local_path(source)
    try:
        if path.is_dir():
            return [saved_dataset_reader(path)] if _is_saved_dataset(path) else _folder_readers(path, report)
        if path.is_file():
            return [file_reader(path, printable(path.name))]
        exists = path.exists()
    except OSError as error:
        raise unreadable(path, error) from error
    if exists:
        raise DataError(f"{path} is neither a file nor a folder: give one of these")
    return [hub_reader(source)]


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _folder_readers(folder: Path, report: ReadReport) -> list[Reader]:
    names = {path.relative_to(folder).as_posix(): path for path in visible_files(folder)}
    known = {name: path for name, path in sorted(names.items()) if path.suffix.lower() in SUFFIXES}
    if not known:
        raise DataError(f"folder {folder} holds no {any_of(SUFFIXES)} file: give a folder with at least one")
    report.other_files += map(printable, sorted(names.keys() - known.keys()))
    return [file_reader(path, printable(name)) for name, path in known.items()]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
