"""How many documents of a recipe are as long as its context: what a plan can say of the data without training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from longlora.artifacts import MANIFEST, RunFolder
from longlora.config import Recipe
from longlora.data.shards import open_shard

_CHARACTERS_PER_TOKEN = 4
_TEXTS = (".txt", ".md")


@dataclass(frozen=True)
class DocumentReach:
    """Documents to train on, and how many of them have at least `context_length` tokens."""

    documents: int
    reaching: int
    counted: bool
    """From token shards; otherwise estimated from the sizes of text files at four bytes a token."""


def documents_reaching(recipe: Recipe) -> DocumentReach | None:
    """From the shard of the run folder if it is prepared, else from local text files; None if there are neither.

    Raises:
        DataError: there is a shard, and it is damaged.
    """
    context, shard = recipe.context.context_length, RunFolder(recipe.run_path).train_shard
    if (shard / MANIFEST).exists():
        lengths = open_shard(shard, None).lengths
        return DocumentReach(len(lengths), int((lengths >= context).sum()), counted=True)
    sizes = [path.stat().st_size for source in recipe.data.train for path in _text_files(Path(source))]
    if not sizes:
        return None
    least = context * _CHARACTERS_PER_TOKEN
    return DocumentReach(len(sizes), sum(size >= least for size in sizes), counted=False)


def _text_files(source: Path) -> list[Path]:
    if source.is_dir():
        return [path for path in sorted(source.rglob("*")) if path.suffix in _TEXTS and path.is_file()]
    return [source] if source.suffix in _TEXTS and source.is_file() else []
