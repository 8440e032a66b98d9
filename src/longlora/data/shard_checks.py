"""Whether the files of a token shard agree with each other and with the model, before anything is trained on them.

In: a shard's folder and its manifest, whose sizes and sha256 were compared already. Out: the mapped files, or one line
with the file that is wrong. A manifest can be rewritten with its files, so that whole files may still be wrong ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlora.artifacts import LOSS_MASK, OFFSETS, TOKENS
from longlora.errors import DataError

TOKEN = np.dtype("<i4")
OFFSET = np.dtype("<i8")
FLAG = np.dtype("u1")
PREPARE_AGAIN = "run `longlora prepare` again"
_CHUNK = 2**20


def check_facts(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise `DataError` unless the manifest's own facts are of the right kind and agree."""
    names = manifest.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise damaged(folder, "its manifest has no list of document names")
    if manifest.get("documents", len(names)) != len(names):
        raise damaged(folder, f"its manifest counts {manifest['documents']!r:.40} documents and names {len(names)}")
    for key in ("tokenizer_hash", "chat_template"):
        if not isinstance(manifest.get(key), str | None):
            raise damaged(folder, f"{key} in its manifest is {type(manifest[key]).__name__}, not text")
    if type(context := manifest.get("context_length")) not in (int, type(None)):
        raise damaged(folder, f"context_length in its manifest is {type(context).__name__}, not a whole number")
    if manifest.get("kind") == "instruct" and LOSS_MASK not in manifest["files"]:
        raise damaged(folder, f"it holds instructions, and its manifest names no {LOSS_MASK}")


def map_files(folder: Path, manifest: dict[str, Any]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Tokens and offsets, checked against each other and the manifest's counts.

    Raises:
        DataError: a file is missing, of another data type, or does not fit the other one.
    """
    files = manifest["files"]
    for name, dtype in ((TOKENS, TOKEN), (OFFSETS, OFFSET)):
        size = files.get(name, {"bytes": 0})["bytes"]
        if size == 0 or size % dtype.itemsize:
            raise damaged(folder, f"{name} has {size} bytes, not a multiple of {dtype.itemsize} above 0")
    tokens = np.memmap(folder / TOKENS, dtype=TOKEN, mode="r")
    offsets = np.fromfile(folder / OFFSETS, dtype=OFFSET)
    _check_offsets(folder, offsets, len(manifest["names"]), len(tokens))
    counted = manifest.get("tokens", len(tokens))
    if counted != len(tokens):
        raise damaged(folder, f"its manifest counts {counted!r:.40} tokens, {TOKENS} has {len(tokens)}")
    return tokens, offsets


def map_mask(folder: Path, files: dict[str, Any], tokens: int) -> NDArray[np.uint8] | None:
    """The flags of instructions, or None of texts.

    Raises:
        DataError: their number is not that of the tokens, or they are not 0 and 1.
    """
    if LOSS_MASK not in files:
        return None
    size = files[LOSS_MASK]["bytes"]
    if size != tokens:
        raise damaged(folder, f"{LOSS_MASK} has {size} bytes for {tokens} tokens")
    mask = np.memmap(folder / LOSS_MASK, dtype=FLAG, mode="r")
    if any(mask[start : start + _CHUNK].max() > 1 for start in range(0, tokens, _CHUNK)):
        raise damaged(folder, f"{LOSS_MASK} holds other values than 0 and 1")
    return mask


def check_tokens(folder: Path, tokens: NDArray[np.int32], vocabulary: int | None) -> None:
    """Raise `DataError` for a token that is negative or not below `vocabulary` (None: no limit)."""
    for start in range(0, len(tokens), _CHUNK):
        part = tokens[start : start + _CHUNK]
        outside = part < 0 if vocabulary is None else (part < 0) | (part >= vocabulary)
        if outside.any():
            place = int(outside.argmax())
            limit = "ids begin at 0" if vocabulary is None else f"the model has ids from 0 to {vocabulary - 1}"
            raise DataError(
                f"{folder / TOKENS} holds token {part[place]} at position {start + place}, and {limit}: prepare with "
                "the model's own tokenizer (`longlora prepare`)"
            )


def damaged(folder: Path, what: str) -> DataError:
    """The error for a shard that is no usable one."""
    return DataError(f"{folder} is no usable token shard, {what}: {PREPARE_AGAIN}")


def _check_offsets(folder: Path, offsets: NDArray[np.int64], documents: int, tokens: int) -> None:
    if len(offsets) != documents + 1:
        raise damaged(folder, f"{documents} documents need {documents + 1} offsets, there are {len(offsets)}")
    if documents == 0:
        raise damaged(folder, "it holds no document")
    if offsets[0] != 0 or np.any(offsets[1:] <= offsets[:-1]):
        raise damaged(folder, "its offsets do not increase from 0")
    last = int(offsets[-1])
    if last != tokens:
        width = TOKEN.itemsize * tokens / last
        other = f"; {width:g} bytes a token are not int32" if width in (1, 2, 8) else ""
        raise damaged(folder, f"its last offset is {last}, there are {tokens} tokens in {TOKENS}{other}")
