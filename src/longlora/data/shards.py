"""Token shards: documents as one flat array of token ids on disk, with offsets and a verified manifest.

A shard is a folder with ``tokens.bin`` (int32), ``offsets.bin`` (int64) and ``manifest.json``. Document i is
``tokens[offsets[i]:offsets[i + 1]]``; both files are little-endian on every machine, and nothing is pickled. A shard of
instructions has ``mask.bin`` as well, one byte a token: 1 where the token is to be predicted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longlora.artifacts import LOSS_MASK, OFFSETS, TOKENS, new_folder, verify_manifest, write_manifest
from longlora.data.documents import Document, ReadReport
from longlora.data.shard_checks import (
    FLAG,
    OFFSET,
    PREPARE_AGAIN,
    TOKEN,
    check_facts,
    check_tokens,
    damaged,
    map_files,
    map_mask,
)
from longlora.errors import DataError, RunFolderError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = 1

_BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True, eq=False)
class TokenShard:
    """Tokenized documents; the tokens stay on disk and are mapped into memory."""

    folder: Path
    tokens: NDArray[np.int32]
    """[total tokens], read-only memory map."""
    offsets: NDArray[np.int64]
    """[documents + 1], strictly increasing from 0 to the number of tokens."""
    names: tuple[str, ...]
    tokenizer_hash: str
    mask: NDArray[np.uint8] | None = None
    """[total tokens], read-only memory map, 1 where a token is to be predicted; None means all of them."""
    chat_template: str | None = None
    """The template that instructions were written with; None for texts."""
    context_length: int | None = None
    """Tokens that instructions were shortened to where they were longer; None for texts."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[documents], tokens in each."""
        return np.diff(self.offsets)

    def document(self, index: int) -> NDArray[np.int32]:
        """[tokens] of document `index`, a view of the memory map; `IndexError` outside 0 .. len - 1."""
        return self.tokens[self._span(index)]

    def loss_mask(self, index: int) -> NDArray[np.uint8] | None:
        """[tokens] of document `index`, 1 where a token is to be predicted, or None where all are; as `document`."""
        span = self._span(index)
        return None if self.mask is None else self.mask[span]

    def _span(self, index: int) -> slice:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of a shard with {len(self)} documents")
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def occurring_tokens(self) -> NDArray[np.int64]:
        """Each token id that occurs, once, in ascending order."""
        parts = range(0, len(self.tokens), _BATCH_CHARACTERS)
        found = [np.unique(self.tokens[start : start + _BATCH_CHARACTERS]) for start in parts]
        return np.unique(np.concatenate(found)).astype(np.int64)


def write_shard(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokenizer_hash: str,
    add_special_tokens: bool,
    min_document_tokens: int = 0,
    report: ReadReport,
) -> TokenShard:
    """Tokenize `documents` into a new shard at `folder`; nothing is left there unless all of it was written.

    Args:
        tokenizer_hash: what identifies the tokenizer; `open_shard` compares it.
        add_special_tokens: put BOS in front of and EOS behind each document, each only if the tokenizer does so itself.
        min_document_tokens: documents with fewer tokens, special ones included, are left out.
        report: names of documents without tokens and of too short ones are added to it; all it names is written to
            the manifest.

    Raises:
        DataError: no document was left, or `folder` cannot be written.
        RunFolderError: `folder` exists, or the disk is full.
    """
    rows = _long_enough(_token_rows(documents, tokenizer, add_special_tokens, report), min_document_tokens, report)
    return write_rows(
        folder,
        (TokenRow(name, row) for name, row in rows),
        tokenizer_hash=tokenizer_hash,
        nothing_left=lambda: _nothing_left(folder, min_document_tokens, report),
        facts=lambda: {
            "too_short": named(report.too_short),
            "empty": named(report.empty),
            "undecodable": named(report.undecodable),
        },
    )


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One document: its name, its tokens, and for instructions a flag a token, 1 where it is to be predicted."""

    name: str
    tokens: Sequence[int]
    mask: Sequence[int] | None = None


def write_rows(
    folder: Path,
    rows: Iterable[TokenRow],
    *,
    tokenizer_hash: str,
    nothing_left: Callable[[], str],
    facts: Callable[[], dict[str, Any]],
) -> TokenShard:
    """Write `rows`, all of them with a mask or none, as a new shard; nothing is left unless all of it was written.

    Args:
        nothing_left: what to say if there is no row; asked after `rows` was read, like `facts`.
        facts: for the manifest, for example what was left out.

    Raises:
        DataError: there is no row, or `folder` cannot be written.
        RunFolderError: `folder` exists, or the disk is full.
    """
    try:
        with new_folder(folder) as temporary:
            names, offsets = _write_tokens(temporary, rows)
            if not names:
                raise DataError(nothing_left())
            (temporary / OFFSETS).write_bytes(offsets.tobytes())
            write_manifest(
                temporary,
                schema=SCHEMA,
                tokenizer_hash=tokenizer_hash,
                documents=len(names),
                tokens=int(offsets[-1]),
                longest_document=int(np.diff(offsets).max()),
                names=names,
                **facts(),
            )
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error}): free the disk or choose another run_dir") from error
    return open_shard(folder, tokenizer_hash)


def open_shard(folder: Path, tokenizer_hash: str | None, vocabulary: int | None = None) -> TokenShard:
    """The shard at `folder`, after checking its sizes, checksums, offsets, tokens and tokenizer.

    Args:
        tokenizer_hash: of the model's tokenizer; None accepts any.
        vocabulary: rows of the model's embedding, which no token may lie beyond; None: no limit.

    Raises:
        DataError: the shard is missing, damaged, or was prepared with another tokenizer.
    """
    try:
        manifest = verify_manifest(folder, PREPARE_AGAIN)
    except RunFolderError as error:
        raise DataError(str(error)) from error
    schema = manifest.get("schema")
    if schema != SCHEMA:
        raise damaged(folder, f"its manifest has schema {schema!r:.40}, this version reads {SCHEMA}")
    check_facts(folder, manifest)
    prepared_with = manifest.get("tokenizer_hash")
    if tokenizer_hash is not None and prepared_with != tokenizer_hash:
        raise DataError(
            f"{folder} was prepared with tokenizer {prepared_with}, the model has {tokenizer_hash}: {PREPARE_AGAIN}"
        )
    tokens, offsets = map_files(folder, manifest)
    check_tokens(folder, tokens, vocabulary)
    mask = map_mask(folder, manifest["files"], len(tokens))
    names = tuple(manifest["names"])
    facts = (manifest.get("chat_template"), manifest.get("context_length"))
    return TokenShard(folder, tokens, offsets, names, str(prepared_with), mask, *facts)


def _write_tokens(folder: Path, rows: Iterable[TokenRow]) -> tuple[list[str], NDArray[np.int64]]:
    """Write the tokens of all rows one behind the other, and their masks; their names and offsets."""
    names: list[str] = []
    offsets = [0]
    with contextlib.ExitStack() as opened:
        tokens = opened.enter_context((folder / TOKENS).open("wb"))
        masks = None
        for row in rows:
            # Not numpy's tofile: on a full disk it leaves a shorter file and says nothing.
            tokens.write(np.asarray(row.tokens, dtype=TOKEN).tobytes())
            if row.mask is not None:
                masks = masks or opened.enter_context((folder / LOSS_MASK).open("wb"))
                masks.write(np.asarray(row.mask, dtype=FLAG).tobytes())
            names.append(row.name)
            offsets.append(offsets[-1] + len(row.tokens))
    return names, np.asarray(offsets, dtype=OFFSET)


def _long_enough(
    rows: Iterable[tuple[str, list[int]]], min_document_tokens: int, report: ReadReport
) -> Iterator[tuple[str, list[int]]]:
    for name, row in rows:
        if len(row) < min_document_tokens:
            report.too_short.append(name)
        else:
            yield name, row


def _token_rows(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool, report: ReadReport
) -> Iterator[tuple[str, list[int]]]:
    """Name and token ids of each document that has tokens."""
    before, after = bound_tokens(tokenizer) if add_special_tokens else ([], [])
    for batch in _batches(documents):
        texts = [document.text for document in batch]
        # verbose=False: long documents are the purpose here, no reason for a warning.
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        for document, row in zip(batch, encoded["input_ids"], strict=True):
            if row:
                yield document.name, before + row + after
            else:
                report.empty.append(document.name)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group neighbours up to about a million characters; a longer document is alone or ends its group."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def bound_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What goes in front of and behind a document: BOS and EOS, where the tokenizer puts them there itself.

    The presence of `bos_token_id` alone says nothing: many models name one that they never saw in front of a text.
    """
    ids = list(tokenizer("a").input_ids)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before = [int(bos)] if bos is not None and ids[:1] == [bos] else []
    after = [int(eos)] if eos is not None and ids[-1:] == [eos] else []
    return before, after


def named(names: list[str]) -> dict[str, Any]:
    """Names for a manifest, with their number."""
    return {"count": len(names), "names": names}


def _nothing_left(folder: Path, min_document_tokens: int, report: ReadReport) -> str:
    return (
        f"no document is left for {folder}: {len(report.empty)} empty, {len(report.undecodable)} not UTF-8, "
        f"{len(report.too_short)} shorter than min_document_tokens={min_document_tokens}: "
        "give other texts in data.train or data.heldout, or lower data.min_document_tokens"
    )
