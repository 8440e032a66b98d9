"""Both token shards of a run: what is trained on, and what is held out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from longlora.artifacts import RunFolder
from longlora.config import Recipe
from longlora.data.documents import ReadReport, read_documents
from longlora.data.instruct import InstructReport, check_sources, write_instruct_shard
from longlora.data.shards import TokenShard, write_shard
from longlora.errors import DataError, RunFolderError


def prepare_shards(recipe: Recipe, tokenizer: Any, tokenizer_hash: str, console: Console) -> None:
    """Write ``data/train`` and ``data/heldout`` of the run folder; prints what was read, shortened and left out.

    Raises:
        DataError: the recipe names no training texts, or a source cannot be used.
        RunFolderError: the run folder already holds an adapter or checkpoints that belong to other shards.
    """
    run = RunFolder(recipe.run_path)
    if not recipe.data.train:
        raise DataError("data.train is empty: name files, folders or a dataset to train on")
    run.require_unused()
    parts = [("train", recipe.data.train, run.train_shard), ("heldout", recipe.data.heldout, run.heldout_shard)]
    for _, sources, _ in parts:  # finds missing files before anything is written
        if recipe.data.kind == "instruct":
            check_sources(sources, recipe.data.instruct)
        else:
            read_documents(sources, recipe.data.text_field, ReadReport())
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
    write = _write_examples if recipe.data.kind == "instruct" else _write_documents
    try:
        shard, summary = write(recipe, sources, folder, name, tokenizer, tokenizer_hash)
    except (DataError, RunFolderError) as error:
        raise DataError(f"data.{name}: {error}") from None
    learned = "" if shard.mask is None else f", {int(shard.mask.sum(dtype=np.int64)):,} of them to be learned"
    noun = "documents" if shard.mask is None else "examples"
    console.print(
        f"{name}: {len(shard):,} {noun}, {len(shard.tokens):,} tokens{learned}, longest {max(shard.lengths):,}; "
        f"{summary}",
        highlight=False,
    )


def _write_documents(
    recipe: Recipe, sources: list[str], folder: Path, name: str, tokenizer: Any, tokenizer_hash: str
) -> tuple[TokenShard, str]:
    report = ReadReport()
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
    return shard, report.summary()


def _write_examples(
    recipe: Recipe, sources: list[str], folder: Path, name: str, tokenizer: Any, tokenizer_hash: str
) -> tuple[TokenShard, str]:
    report, context_length = InstructReport(), recipe.context.context_length
    shard = write_instruct_shard(
        folder,
        sources,
        tokenizer,
        settings=recipe.data.instruct,
        context_length=context_length,
        tokenizer_hash=tokenizer_hash,
        weights=recipe.data.instruct.weights if name == "train" else (),
        seed=recipe.train.seed,
        report=report,
        replace=True,
    )
    return shard, report.summary(context_length)
