"""Texts that an evaluation reads instead of the held-out shard: files in, tokens or plain text with a name each out.

Text, jsonl and parquet files, folders of them and datasets are read as `longlora.data.documents` reads them for
training. A ``.bin`` file holds token ids as the original LongLoRA code has them: one flat stream of uint16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from longlora.data.documents import Document, ReadReport, read_documents
from longlora.data.formats import unreadable
from longlora.data.shards import bound_tokens
from longlora.errors import DataError

STREAM_SUFFIX = ".bin"
_STREAM_TOKEN = np.dtype("<u2")
_STREAM_IDS = 1 << 16
_PART_TOKENS = 1 << 20
_PROBED_TOKENS = 4096


@dataclass(frozen=True)
class NamedTokens:
    """A document as token ids; names are different within one result."""

    name: str
    tokens: list[int]
    note: str = ""
    """How it was found, where that is not plain: how a stream of tokens was cut into documents."""


def read_texts(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_field: str = "text",
    add_special_tokens: bool = True,
    needed_tokens: int = 2,
    max_tokens: int | None = None,
    max_documents: int | None = None,
    whole_streams: bool = False,
    report: ReadReport | None = None,
    too_long: str = "eval.perplexity.context_lengths",
) -> list[NamedTokens]:
    """Documents of all `paths` that have at least `needed_tokens` tokens, in order; reads no more than it has to.

    A ``.bin`` stream is cut into documents in front of each BOS if the tokenizer's BOS occurs in it, else behind each
    EOS if that occurs, else it is one document; `NamedTokens.note` says which.

    Args:
        paths: files, folders and dataset ids as in `read_documents`, and ``.bin`` files.
        text_field: the column with the text in .jsonl, .parquet and datasets.
        add_special_tokens: put BOS in front of and EOS behind each text, each only if the tokenizer does so itself.
        max_tokens: documents are cut to as many.
        max_documents: stop after as many.
        whole_streams: do not cut ``.bin`` streams, for the protocol ``longlora``: the original code does not.
        report: names what was left out of what was read.
        too_long: the key of the recipe to lower where no document is long enough.

    Raises:
        DataError: a path is missing, empty or holds no text; a stream does not fit the tokenizer; no document is long
            enough.
    """
    if not paths:
        raise DataError("no file to read texts from: name some in eval.perplexity.texts")
    report = report or ReadReport()
    found: list[NamedTokens] = []
    names: set[str] = set()
    longest = ("", 0)
    for document in _read(paths, tokenizer, text_field, add_special_tokens, whole_streams, max_tokens, report):
        longest = max(longest, (document.name, len(document.tokens)), key=lambda pair: pair[1])
        if len(document.tokens) < needed_tokens:
            report.too_short.append(document.name)
            continue
        name = _new_name(document.name, names)
        found.append(NamedTokens(name, document.tokens[:max_tokens], document.note))
        if max_documents is not None and len(found) >= max_documents:
            return found
    if not found:
        raise DataError(
            f"no text has {needed_tokens} tokens, the longest ({longest[0]}) has {longest[1]}: "
            f"name longer ones in eval.perplexity.texts or lower {too_long}"
        )
    return found


def longest_text(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, enough: int, *, text_field: str, add_special_tokens: bool
) -> NamedTokens:
    """The first text of at least `enough` tokens (at most so many of them are given), else the longest.

    Raises:
        DataError: as `read_texts`.
    """
    longest = NamedTokens("", [])
    for document in _read(paths, tokenizer, text_field, add_special_tokens, False, enough, ReadReport()):
        if len(document.tokens) > len(longest.tokens):
            longest = NamedTokens(document.name, document.tokens[:enough])
        if len(longest.tokens) == enough:
            break
    return longest


def _read(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    text_field: str,
    add_special_tokens: bool,
    whole_streams: bool,
    max_tokens: int | None,
    report: ReadReport,
) -> Iterator[NamedTokens]:
    """Documents of all paths, which are checked before the first one is given; only those of streams are cut."""
    sources = [
        _stream_documents(Path(path).expanduser(), tokenizer, whole_streams, max_tokens)
        if _is_stream(path)
        else _tokenized(_documents(path, text_field, report), tokenizer, add_special_tokens)
        for path in paths
    ]
    for source in sources:
        yield from source


def read_haystack(
    paths: Sequence[str], *, text_field: str = "text", report: ReadReport | None = None
) -> dict[str, str]:
    """Texts by their names, in order, from the same kinds of files but ``.bin``, which holds no text.

    Args:
        text_field: the column with the text in .jsonl, .parquet and datasets.
        report: names what was left out of what was read.

    Raises:
        DataError: no path, or one is missing, empty or holds no text.
    """
    if not paths:
        raise DataError("no file to read a haystack from: name some in eval.haystack")
    for path in paths:
        if _is_stream(path):
            raise DataError(f"{path} holds token ids: a haystack needs text, name .txt, .md, .jsonl or .parquet files")
    report = report or ReadReport()
    sources = [_documents(path, text_field, report) for path in paths]
    texts: dict[str, str] = {}
    names: set[str] = set()
    for document in (document for source in sources for document in source):
        texts[_new_name(document.name, names)] = document.text
    return texts


def _is_stream(path: str) -> bool:
    return Path(path).suffix.lower() == STREAM_SUFFIX


def _new_name(name: str, names: set[str]) -> str:
    """`name`, with a number behind it if it was there before: rows are told apart by the names of their documents."""
    new, number = name, 1
    while new in names:
        number += 1
        new = f"{name} ({number})"
    names.add(new)
    return new


def _documents(path: str, text_field: str, report: ReadReport) -> Iterator[Document]:
    """Documents of one path; that it exists is checked now, that it holds text when it is read."""
    return _some(path, read_documents([path], text_field, report), report)


def _some(path: str, documents: Iterable[Document], report: ReadReport) -> Iterator[Document]:
    before, undecodable = report.documents, len(report.undecodable)
    for document in documents:
        # A file full of zeros can be decoded and is no text, and neither is UTF-16 without its mark.
        if "\0" in document.text:
            place = document.text.index("\0")
            raise DataError(f"{document.name} in {path} is binary, character {place} is zero: save it as UTF-8 text")
        yield document
    if report.documents == before:
        what = "is binary or not UTF-8" if len(report.undecodable) > undecodable else "is empty"
        raise DataError(f"{path} {what}: name files of UTF-8 text")


def _tokenized(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> Iterator[NamedTokens]:
    before, after = bound_tokens(tokenizer) if add_special_tokens else ([], [])
    for document in documents:
        # verbose=False: long documents are the purpose here, no reason for a warning.
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids
        yield NamedTokens(document.name, [*before, *ids, *after])


def _stream_documents(
    path: Path, tokenizer: PreTrainedTokenizerBase, whole: bool, max_tokens: int | None
) -> Iterator[NamedTokens]:
    """Documents of a checked stream, made one by one and cut at once: a stream may be far longer than what is read."""
    stream = _open_stream(path, tokenizer)
    bounds, note = ([0, len(stream)], "one document, not cut") if whole else _cut(stream, tokenizer)
    return (
        NamedTokens(
            f"{path.name}:{index}" if len(bounds) > 2 else path.name, stream[start:stop][:max_tokens].tolist(), note
        )
        for index, (start, stop) in enumerate(pairwise(bounds))
    )


def _open_stream(path: Path, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.uint16]:
    """[tokens], a memory map of a file whose every id the tokenizer has."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: give a file of uint16 token ids") from None
    except OSError as error:
        raise unreadable(path, error) from error
    if not path.is_file():
        raise DataError(f"{path} is not a file: give a file of uint16 token ids")
    if size == 0 or size % _STREAM_TOKEN.itemsize:
        raise DataError(f"{path} has {size} bytes: uint16 token ids take an even number above 0; write it again")
    ids = 1 + max(tokenizer.get_vocab().values())
    if ids > _STREAM_IDS:
        raise DataError(
            f"{path} holds uint16 token ids, the tokenizer has {ids:,} of which {_STREAM_IDS:,} fit: "
            "give the text itself in eval.perplexity.texts"
        )
    try:
        stream = np.memmap(path, dtype=_STREAM_TOKEN, mode="r")
    except OSError as error:
        raise unreadable(path, error) from error
    probe = stream[:_PROBED_TOKENS]
    if len(probe) > 2 and probe[::2].any() and not probe[1::2].any():
        raise DataError(
            f"{path} looks like 32-bit token ids (every second 16-bit number is 0): write them as uint16, or give the "
            "text itself"
        )
    for start in range(0, len(stream), _PART_TOKENS):
        bad = np.flatnonzero(stream[start : start + _PART_TOKENS] >= ids)
        if len(bad):
            place = start + int(bad[0])
            raise DataError(
                f"{path} has id {stream[place]} at position {place}, the tokenizer has ids 0 to {ids - 1}: "
                "take the tokenizer that the file was made with, or give the text itself"
            )
    return stream


def _cut(stream: NDArray[np.uint16], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """Where documents begin, with the end of the stream; and what they were cut at."""
    for what, token, behind in (("BOS", tokenizer.bos_token_id, 0), ("EOS", tokenizer.eos_token_id, 1)):
        if token is None:
            continue
        places = np.flatnonzero(stream == token) + behind
        if len(places):
            return np.unique([0, *places, len(stream)]).tolist(), f"cut at {what} (id {token})"
    return [0, len(stream)], "one document, neither BOS nor EOS occurs"
