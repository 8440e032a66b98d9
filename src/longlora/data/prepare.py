"""Both token shards of a run: what is trained on, and what is held out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from longlora.artifacts import RunFolder
from longlora.config import Recipe
from longlora.data.documents import ReadReport, read_documents
from longlora.data.shards import write_shard
from longlora.errors import DataError, RunFolderError


def prepare_shards(recipe: Recipe, tokenizer: Any, tokenizer_hash: str, console: Console) -> None:
    """Write ``data/train`` and ``data/heldout`` of the run folder; prints what was read and what was left out.

    Raises:
        DataError: the recipe names no training texts, or a source cannot be used.
        RunFolderError: the run folder already holds an adapter or checkpoints that belong to other shards.
    """
    run = RunFolder(recipe.run_path)
    if not recipe.data.train:
        raise DataError("data.train is empty: name files, folders or a dataset to train on")
    run.require_unused()
    parts = [("train", recipe.data.train, run.train_shard), ("heldout", recipe.data.heldout, run.heldout_shard)]
    for _, sources, _ in parts:
        read_documents(sources, recipe.data.text_field, ReadReport())  # finds missing files before anything is written
    for name, sources, folder in parts:
        if sources:
            _write(recipe, sources, folder, name, tokenizer, tokenizer_hash, console)
        elif folder.exists():
            shutil.rmtree(folder)  # what an earlier prepare held out is not held out any more


def _write(
    recipe: Recipe,
    sources: list[str],
    folder: Path,
    name: str,
    tokenizer: Any,
    tokenizer_hash: str,
    console: Console,
) -> None:
    report = ReadReport()
    try:
        shard = write_shard(
            folder,
            read_documents(sources, recipe.data.text_field, report),
            tokenizer,
            tokenizer_hash=tokenizer_hash,
            add_special_tokens=recipe.data.add_special_tokens,
            min_document_tokens=recipe.data.min_document_tokens,
            report=report,
            replace=True,
        )
    except DataError as error:
        raise DataError(f"data.{name}: {error}") from None
    except RunFolderError as error:
        raise DataError(f"data.{name}: {error}") from None
    console.print(
        f"{name}: {len(shard):,} documents, {len(shard.tokens):,} tokens, longest {max(shard.lengths):,}; "
        f"{report.summary()}",
        highlight=False,
    )
