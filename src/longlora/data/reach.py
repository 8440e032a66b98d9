"""How many documents of a recipe are as long as its context: what a plan can say of the data without training."""

from __future__ import annotations

from dataclasses import dataclass

from longlora.artifacts import MANIFEST, RunFolder
from longlora.config import Recipe
from longlora.data.formats import local_path, text_files
from longlora.data.shards import open_shard

_BYTES_PER_TOKEN = 4


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
    sizes = [path.stat().st_size for source in recipe.data.train for path in text_files(local_path(source))]
    if not sizes:
        return None
    least = context * _BYTES_PER_TOKEN
    return DocumentReach(len(sizes), sum(size >= least for size in sizes), counted=False)
