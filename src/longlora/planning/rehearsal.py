"""A training step with tensors that have no storage: what would be alive at its peak, exactly and in a second.

The real adapter, attention, checkpointing and loss run under torch's fake tensors, which know shapes, types and life
times but hold nothing; every storage that comes and goes is counted. So the plan follows the code: a lever that makes a
tensor smaller is seen without a formula for it. A few layers are rehearsed; layers are alike, so the rest is linear.

Not seen are scratch memory inside kernels and what an allocator keeps beside what is asked for (`memory.py` adds that).
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from longlora.attention.lazy_mask import whole_rows
from longlora.config import Recipe
from longlora.config.sections import even_above
from longlora.errors import ModelError
from longlora.memory.chunked_loss import chunked_loss
from longlora.model.adapters import cast_to_compute_dtype
from longlora.model.attention import apply_attention
from longlora.model.head import OutputHead, hidden_states
from longlora.model.levers import apply_memory_levers
from longlora.model.trainable import TrainedModel, base_of
from longlora.planning.ledger import Bytes, Kind, Ledger, Peaks, Phase
from longlora.planning.outline import meta_model

_SMALL = 4
"""Models with no more layers are rehearsed whole."""
_LONGEST_PERIOD = 8


@dataclass(frozen=True)
class Rehearsal:
    """Bytes alive at the peak of each phase at two contexts; between and beyond them they lie on a line."""

    contexts: tuple[int, int]
    peaks: tuple[Peaks, Peaks]

    def at(self, context_length: int) -> Peaks:
        """The same at any context of at least the shorter one."""
        (before, after), (shorter, longer) = self.contexts, self.peaks
        return _on_line(shorter, longer, (context_length - before) / (after - before) if after > before else 0.0)


def rehearse(config: PreTrainedConfig, recipe: Recipe) -> Rehearsal:
    """One micro batch with the levers of `recipe`, at its context or, where that is long, at two shorter ones.

    Raises:
        ModelError: transformers cannot build the model, or it decides by the values of its tensors.
    """
    context, anchor = recipe.context.context_length, _anchor(recipe)
    if context <= 2 * anchor:
        peaks = _rehearse_layers(config, recipe)
        return Rehearsal((context, context), (peaks, peaks))
    return rehearse_line(config, recipe, anchor)


def rehearse_line(config: PreTrainedConfig, recipe: Recipe, anchor: int | None = None) -> Rehearsal:
    """One micro batch at `anchor` tokens (by default such that groups and chunks are full) and at twice as many."""
    shorter = anchor or _anchor(recipe)
    contexts = (shorter, 2 * shorter)
    few, more = (_rehearse_layers(config, _shorter(recipe, context)) for context in contexts)
    return Rehearsal(contexts, (few, more))


def _shorter(recipe: Recipe, context_length: int) -> Recipe:
    """`recipe` at `context_length`; groups that are a small part of it still hold more than the sink tokens."""
    there = at_context(recipe, context_length)
    attention, least = there.attention, even_above(there.attention.sink_tokens)
    if attention.resolve_group_size(context_length) >= least:
        return there
    larger = attention.model_copy(update={"group_size": least, "group_size_ratio": None})
    return there.model_copy(update={"attention": larger})


def at_context(recipe: Recipe, context_length: int) -> Recipe:
    """`recipe` with another context, and nothing checked."""
    context = recipe.context.model_copy(update={"context_length": context_length, "rope_factor": None})
    return recipe.model_copy(update={"context": context})


def _anchor(recipe: Recipe) -> int:
    """Tokens from which on memory is a straight line: some whole groups, chunks and tiles."""
    train = recipe.train
    return 4 * max(recipe.attention.group_size or 0, train.loss_chunk_tokens, train.mlp_tile_tokens or 0, 512)


@dataclass(frozen=True)
class _Job:
    """A config and a recipe, equal to others by what a rehearsal reads of them."""

    text: str
    config: PreTrainedConfig = field(compare=False)
    recipe: Recipe = field(compare=False)


def _rehearse_layers(config: PreTrainedConfig, recipe: Recipe) -> Peaks:
    """The larger peaks of the sparse steps and of those with full attention, where there are both."""
    # Occurring rows are read from a file, which may change.
    read = {"context", "attention", "adapter", "train", "model"}
    text = recipe.model_dump_json(include=read) + config.to_json_string(use_diff=False)
    job = _Job(text, config, recipe)
    return _remembered(job) if recipe.adapter.embedding_rows == "all" else _both_patterns(config, recipe)


@lru_cache(maxsize=256)
def _remembered(job: _Job) -> Peaks:
    """Plans for several meshes ask for the same."""
    return _both_patterns(job.config, job.recipe)


def _both_patterns(config: PreTrainedConfig, recipe: Recipe) -> Peaks:
    peaks = _rehearse_pattern(config, recipe)
    if recipe.attention.pattern == "full" or not recipe.attention.full_attention_final_fraction:
        return peaks
    full = recipe.model_copy(update={"attention": recipe.attention.model_copy(update={"pattern": "full"})})
    other = _rehearse_pattern(config, full)
    return {phase: max(peaks[phase], other[phase], key=_total) for phase in get_args(Phase)}


def _total(held: Bytes) -> float:
    return sum(held.values())


def _rehearse_pattern(config: PreTrainedConfig, recipe: Recipe) -> Peaks:
    count = int(config.get_text_config(decoder=True).num_hidden_layers)
    period = layer_period(config, recipe)
    if count <= max(_SMALL, 2 * period):
        return _rehearse(config, recipe)
    few, more = (_rehearse(with_layers(config, period * times), recipe) for times in (1, 2))
    return _on_line(few, more, (count - period) / period)


def _on_line(few: Peaks, more: Peaks, times: float) -> Peaks:
    """`few`, and as many times the difference to `more` on top."""
    return {
        phase: {kind: few[phase][kind] + (more[phase][kind] - few[phase][kind]) * times for kind in get_args(Kind)}
        for phase in get_args(Phase)
    }


def with_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """A copy of `config` with its first `count` layers; beyond the last one it begins anew."""
    short = copy.deepcopy(config)
    text: Any = short.get_text_config(decoder=True)
    before = text.num_hidden_layers
    text.num_hidden_layers = count
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, (value * -(-count // before))[:count])
    return short


def layer_period(config: PreTrainedConfig, recipe: Recipe) -> int:
    """The smallest number of leading layers, at least 2, in which each kind of layer occurs."""
    text: Any = config.get_text_config(decoder=True)
    kinds = [getattr(text, name, None) for name in ("layer_types", "mlp_layer_types")]
    per_layer = list(zip(*(kind for kind in kinds if kind), strict=False)) or [()]
    first = max(per_layer.index(kind) for kind in set(per_layer)) + 1
    dense = int(getattr(text, "first_k_dense_replace", 0) or 0)
    period = min(_LONGEST_PERIOD, max(2, first, dense + 1))
    every = recipe.train.activation_checkpointing_every if recipe.train.activation_checkpointing else 1
    return -(-period // every) * every


def _rehearse(config: PreTrainedConfig, recipe: Recipe) -> Peaks:
    with _fake_model(config, recipe) as model, Ledger() as ledger:
        ledger.own(model, with_gradients=recipe.train.grad_accum_steps > 1)
        ids_BT = torch.zeros(recipe.train.micro_batch_size, recipe.context.context_length, dtype=torch.long)
        base = base_of(model)
        mixed = recipe.model.dtype == "bfloat16"
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                ledger.phase = "forward"
                hidden_BTC = hidden_states(base, ids_BT)
                ledger.keep()
                ledger.phase = "loss"
                loss = chunked_loss(
                    hidden_BTC.flatten(0, 1), ids_BT.flatten(), OutputHead(base), recipe.train.loss_chunk_tokens
                )
            del hidden_BTC
            ledger.phase = "backward"
            loss.backward()
        except (RuntimeError, NotImplementedError) as error:
            raise ModelError(
                f"model type {config.model_type!r} cannot be rehearsed without weights "
                f"({str(error).strip().splitlines()[0][:120]}): its memory is not planned"
            ) from error
    return ledger.peaks


@contextlib.contextmanager
def _fake_model(config: PreTrainedConfig, recipe: Recipe) -> Iterator[TrainedModel]:
    """The model of the recipe in training mode, with fake tensors on the CPU, inside the mode that makes them."""
    short = copy.deepcopy(config)
    with contextlib.suppress(ValueError):  # the default gathers each expert's tokens, whose number is not known
        short._experts_implementation = "grouped_mm"
    try:
        model = meta_model(short, recipe)
    except ModelError:
        model = meta_model(config, recipe)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        _materialise(model)
        cast_to_compute_dtype(model, getattr(torch, recipe.model.dtype))
        _use_levers(model, recipe)
        _use_attention(model, recipe)
        # Fake positions cannot be asked where a document ends.
        with whole_rows():
            yield model.train()


def _materialise(model: nn.Module) -> None:
    """Replace meta tensors by fake ones of the CPU; what is tied stays tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = (tensor, new)  # the old one too, so that its id is not given away
        return made[id(tensor)][1]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type == "meta":
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


def _use_levers(model: TrainedModel, recipe: Recipe) -> None:
    """The levers that change tensors of a step on any device, as `apply_memory_levers` pulls them.

    Offloading is left to `memory.py`, and MLPs are tiled without trying them out, which fake tensors cannot do.
    """
    changes: dict[str, Any] = {"liger_kernels": False, "activation_offload": False, "compile_norms": False}
    here = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
    apply_memory_levers(model, here, probe=False)


def _use_attention(model: TrainedModel, recipe: Recipe) -> None:
    """The recipe's attention, on any device."""
    settings = recipe.attention
    layers = int(base_of(model).config.get_text_config(decoder=True).num_hidden_layers)
    some = [layer for layer in settings.full_attention_layers if layer < layers]
    here = settings.model_copy(update={"full_attention_layers": some, "backend": "grouped"})
    apply_attention(model, here, recipe.context.context_length)
