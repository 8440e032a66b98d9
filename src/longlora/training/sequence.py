"""Sequence parallelism in a run: which processes share rows, and what has to be true of model and recipe for it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from longlora.attention.pattern import FULL
from longlora.attention.probing import as_it_was
from longlora.attention.sequence_support import least_stretch, require_cuttable
from longlora.attention.ulysses import require_ulysses
from longlora.config import Recipe
from longlora.errors import UnsupportedModelError
from longlora.model.attention import apply_attention, full_attention_steps
from longlora.training.distributed import Ranks


def sequence_group(ranks: Ranks) -> dist.ProcessGroup | None:
    """The processes that share rows with this one, in the order of their stretches; None if it has whole rows.

    All processes of the run call it, once they have joined. UNVERIFIED ON HARDWARE for NCCL.
    """
    if ranks.sequence_world == 1:
        return None
    group, _ = dist.new_subgroups(ranks.sequence_world)
    # NCCL wants something of the whole group before messages between some of it.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    return group


def check_sequence(base: PreTrainedModel, recipe: Recipe, ranks: Ranks) -> int:
    """Refuse, on every process alike, what cannot be trained with cut rows; else the shortest stretch in tokens.

    Leaves the model as it was, but with full attention.

    Args:
        base: the whole model, as it was read.

    Raises:
        ModelError: a stretch of `context.context_length` is shorter than a group or a window, or attention is full in
            a layer, a phase or a validation and there is no DeepSpeed, or are too few heads; or the architecture
            can't be cut.
    """
    world, tokens = ranks.sequence_world, recipe.context.context_length
    if world == 1:
        return 1
    with as_it_was(base):
        base.train()
        if not apply_attention(base, recipe.attention, tokens):
            raise UnsupportedModelError(
                f"model type {base.config.model_type!r} keeps its own attention, which sees one process's tokens "
                f"only: set parallel.sequence=1 (now {world})"
            )
        layers = require_cuttable(base)
    full = full_attention_steps(recipe) > 0 or recipe.train.validation_steps is not None
    for heads in sorted({layer.heads for layer in layers if full or layer.pattern == FULL}):
        require_ulysses(*heads, world)
    return least_stretch(layers, tokens, world)
