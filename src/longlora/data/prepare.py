"""Both token shards of a run: what is trained on, and what is held out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from longlora.artifacts import RunFolder, write_atomic
from longlora.config import Recipe, dump_recipe
from longlora.data.documents import ReadReport, read_documents
from longlora.data.formats import local_path, text_files
from longlora.data.instruct import InstructReport, check_sources, write_instruct_shard
from longlora.data.shards import TokenShard, write_shard
from longlora.errors import DataError, RunFolderError
from longlora.storage import put_folder, require_free_space


def prepare_shards(recipe: Recipe, tokenizer: Any, tokenizer_hash: str, console: Console) -> None:
    """Write ``data/train``, ``data/heldout`` and, last, ``recipe.yaml``; prints what was read, shortened and left out.

    Earlier shards stay until both new ones are whole. Only a folder with a ``recipe.yaml`` is prepared: while shards
    change places there is none, so that a process that is killed never leaves those of two recipes side by side
    unnoticed.

    Raises:
        DataError: the recipe names no training texts, or a source cannot be used.
        RunFolderError: the run folder is in use, already holds an adapter or checkpoints that belong to other shards,
            or has no room.
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
    with run.lock("longlora prepare"):
        run.require_unused()  # once more: a run may have ended meanwhile
        require_free_space(run.root, _least_bytes(recipe), "tokens of data.train and data.heldout")
        shutil.rmtree(run.preparing, ignore_errors=True)  # of a prepare that was killed
        try:
            for name, sources, _ in parts:
                if sources:
                    _write(recipe, sources, run.preparing / name, name, tokenizer, tokenizer_hash, console)
            run.recipe.unlink(missing_ok=True)
            for name, _, folder in parts:
                _take_place(run.preparing / name, folder)
            write_atomic(run.recipe, dump_recipe(recipe))
        finally:
            shutil.rmtree(run.preparing, ignore_errors=True)


def _take_place(prepared: Path, folder: Path) -> None:
    """Put what was prepared where it belongs; what an earlier prepare held out may not be held out any more."""
    if prepared.exists():
        put_folder(prepared, folder)
    elif folder.exists():
        shutil.rmtree(folder)


def _least_bytes(recipe: Recipe) -> int:
    """Bytes of tokens that plain text files surely give: four a token, and no tokenizer makes less than one token of
    eight bytes of text, on the whole. Of other files nobody knows how much of them is text."""
    sources = [local_path(source) for source in (*recipe.data.train, *recipe.data.heldout)]
    return sum(file.stat().st_size for source in sources for file in text_files(source)) // 2


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
        place = str(RunFolder(recipe.run_path).preparing)
        raise DataError(f"data.{name}: {str(error).replace(place, str(Path(place).parent))}") from None
    learned = "" if shard.mask is None else f", {int(shard.mask.sum(dtype=np.int64)):,} of them to be learned"
    noun = "documents" if shard.mask is None else "examples"
    console.print(
        f"{name}: {len(shard):,} {noun}, {len(shard.tokens):,} tokens{learned}, longest {max(shard.lengths):,}; "
        f"{summary}",
        highlight=False,
        markup=False,
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
    )
    return shard, report.summary(context_length)
