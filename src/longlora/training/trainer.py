"""The training run: a recipe and prepared shards in, an adapter or, after full fine-tuning, a whole model out.

Read `start.py` for what comes before any weights, `loop.py` for the steps and their checkpoints, `loss_model.py` for
the loss in chunks. Several processes run this file together; `collectives.py` has what they say to one another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from longlora.artifacts import MANIFEST, RunFolder, sha256_file, write_atomic
from longlora.attention.check import keeps_documents_apart
from longlora.attention.registry import use_full
from longlora.config import Recipe, dump_recipe
from longlora.data.packing import PackedDataset
from longlora.data.shards import TokenShard, open_shard
from longlora.data.stretches import StretchCollator
from longlora.errors import DataError
from longlora.model.adapters import cast_to_compute_dtype, trainable_names
from longlora.model.build import load_for_training, load_tokenizer, tokenizer_hash, weights_fingerprint
from longlora.model.levers import apply_memory_levers
from longlora.model.sidecar import Sidecar
from longlora.model.trainable import (
    TrainedModel,
    load_trained,
    make_trainable,
    parameter_counts,
    source_of_training,
    weights_file,
)
from longlora.planning.out_of_memory import explained_out_of_memory
from longlora.training.attention_schedule import AttentionSchedule
from longlora.training.checkpoint import checkpoint_step, discard_older, has_checkpoint
from longlora.training.collectives import leave, require_same
from longlora.training.guard import StepGuard
from longlora.training.interrupt import StopOnSignal
from longlora.training.loop import LongContextTrainer, training_arguments
from longlora.training.loss_model import LossModel
from longlora.training.metrics import MetricsCallback
from longlora.training.result import write_result
from longlora.training.saved import explained_states, require_source
from longlora.training.sequence import check_sequence, sequence_group
from longlora.training.sharding import is_sharded, shard_model, whole_weights
from longlora.training.start import Start, start
from longlora.training.validation import RowBatches, validation
from longlora.training.zero import STAGES, join_zero, shard_zero, zero_config
from longlora.training.zero_trainer import ZeroTrainer


def train(recipe: Recipe, console: Console, *, resume: bool = False, prepared: bool = False) -> Path:
    """Train what `recipe` says and return the folder of the result: adapter/, or merged/ after full fine-tuning.

    Args:
        recipe: needs token shards in its run folder.
        console: for a person.
        resume: go on from the newest whole checkpoint.
        prepared: the shards must be those that `longlora prepare` made with this recipe's data section.

    Raises:
        LongLoraError: the run folder is in use, or something that the run needs is missing or does not fit.
    """
    with contextlib.ExitStack() as held:
        begun = start(recipe, console, held, resume=resume, prepared=prepared)
        return _trained(begun)


def _trained(begun: Start) -> Path:
    """Train, and write what came of it."""
    run = RunFolder(begun.recipe.run_path)
    metrics = MetricsCallback(run.metrics, begun.console)
    with explained_out_of_memory(
        begun.recipe,
        begun.memory,
        begun.device,
        step=lambda: metrics.step,
        resumable=lambda: has_checkpoint(run.checkpoints),
        processes=begun.ranks.local_world,
    ):
        model, sidecar = _train(begun, metrics)
    weights = whole_weights(model, keep=begun.ranks.is_main) if is_sharded(model) else None
    leave()
    use_full(model)
    if not begun.ranks.is_main:
        return run.adapter if isinstance(model, PeftModel) else run.merged
    return write_result(model, sidecar, run, begun.recipe.train.steps, begun.console, weights)


@dataclass(frozen=True)
class _Loaded:
    """What is trained, and on what."""

    model: TrainedModel
    loss_model: LossModel
    dataset: PackedDataset
    collator: StretchCollator
    weigh: bool
    """Whether all examples weigh the same, however long they are."""
    sidecar: Sidecar
    source: Mapping[str, str]


def _train(begun: Start, metrics: MetricsCallback) -> tuple[TrainedModel, Sidecar]:
    """Load the model, train it, from the checkpoint on if there is one, and return it with what goes beside it."""
    recipe, ranks, checkpoint = begun.recipe, begun.ranks, begun.checkpoint
    set_seed(recipe.train.seed)  # here, because planning draws random numbers too
    loaded = _load(begun)
    if checkpoint is not None and _takes_up(checkpoint, loaded.source, loaded.model, begun):
        return loaded.model, loaded.sidecar
    stop = StopOnSignal(begun.console, ranks)
    trainer = _trainer(loaded, begun, metrics, stop)
    if ranks.is_main:
        write_atomic(RunFolder(recipe.run_path).recipe, dump_recipe(recipe))
    if ranks.world > 1:
        torch.manual_seed(recipe.train.seed + ranks.rank)  # or all would drop the same places of their tokens
    try:
        with stop:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        metrics.close()
    return loaded.model, loaded.sidecar


def _load(begun: Start) -> _Loaded:
    """Open the shards, load the model and make it trainable; all processes have the same of each."""
    recipe, ranks = begun.recipe, begun.ranks
    run = RunFolder(recipe.run_path)
    tokenizer = load_tokenizer(recipe.model)
    tokenizer_sha256 = tokenizer_hash(tokenizer)
    shard = open_shard(run.train_shard, tokenizer_sha256, vocabulary=begun.config.get_text_config().vocab_size)
    _require_kind(shard, recipe)
    _require_length(shard, recipe)
    weigh = recipe.data.kind == "instruct" and recipe.data.instruct.loss_weighting == "examples"
    dataset = _rows(shard, begun, weigh=weigh)
    base, fingerprint = _base(begun)
    least = check_sequence(base, recipe, ranks)
    collator = StretchCollator(
        tokenizer.pad_token_id or 0, ranks.sequence_rank, ranks.sequence_world, least, weighted=weigh
    )
    sidecar = Sidecar.of(recipe, begun.change, begun.config, tokenizer_sha256, fingerprint, shard.chat_template)
    model = _trainable(base, recipe, shard)
    _announce(model, dataset, begun)
    dtype = getattr(torch, recipe.model.dtype)
    loss_model = LossModel(model, recipe.train.loss_chunk_tokens, dtype, sequence_group(ranks))
    if ranks.world > 1:
        require_same(ranks, _facts(run, model, fingerprint, tokenizer_sha256))
    return _Loaded(model, loss_model, dataset, collator, weigh, sidecar, _source(run, fingerprint))


def _trainer(loaded: _Loaded, begun: Start, metrics: MetricsCallback, stop: StopOnSignal) -> LongContextTrainer:
    """The loop over `loaded`, whose weights are divided among the processes first where the recipe says so."""
    recipe, console, ranks = begun.recipe, begun.console, begun.ranks
    experts = any("expert" in name for name in trainable_names(loaded.model))
    if begun.shard == "fsdp2":
        shard_model(loaded.loss_model, ranks, begun.device)
    changes = _use_deepspeed(loaded.loss_model, begun) if begun.shard in STAGES else {}
    validate = validation(
        recipe,
        loaded.loss_model,
        loaded.sidecar.tokenizer_sha256,
        weigh_documents=loaded.weigh,
        console=console,
        vocabulary=begun.config.get_text_config().vocab_size,
        batches=RowBatches(ranks, loaded.collator),
    )
    guard = StepGuard(loaded.dataset, ranks, console, recipe)
    schedule = AttentionSchedule(loaded.model, recipe, console)
    trainer = (ZeroTrainer if changes else LongContextTrainer)(
        model=loaded.loss_model,
        args=training_arguments(
            recipe,
            RunFolder(recipe.run_path).checkpoints,
            begun.device,
            grad_accum_steps=begun.grad_accum_steps,
            has_experts=experts,
            changes=changes,
        ),
        train_dataset=loaded.dataset,
        data_collator=loaded.collator,
        callbacks=[metrics, guard, schedule, *([validate] if validate else []), stop],
    )
    # The library prints the logs once more where there is no progress bar of its own.
    trainer.remove_callback(PrinterCallback)
    trainer.checkpoints_kept, trainer.ranks, trainer.source = recipe.train.save_total_limit, ranks, loaded.source
    trainer.guard, trainer.weights = guard, weights_file(recipe.adapter)
    if begun.shard == "fsdp2":
        trainer.take_sharded_model()
    return trainer


def _takes_up(checkpoint: Path, source: Mapping[str, str], model: TrainedModel, begun: Start) -> bool:
    """Put the weights of `checkpoint` into `model`; whether nothing is left to do but to write the result."""
    require_source(checkpoint, source)
    with explained_states(checkpoint):
        load_trained(model, checkpoint)
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))  # of another version of the library?
    done = checkpoint_step(checkpoint) == begun.recipe.train.steps
    if done and begun.ranks.is_main:  # no later save will
        discard_older(checkpoint, begun.recipe.train.save_total_limit)
    return done


def _base(begun: Start) -> tuple[PreTrainedModel, str]:
    """The base model and the fingerprint of its weights."""
    recipe, config = begun.recipe, begun.config
    # What is sharded goes to its device a layer at a time: as a whole it may not fit there.
    whole_on = torch.device("cpu") if begun.shards_weights and recipe.model.quantization == "none" else begun.device
    base, fingerprint = load_for_training(source_of_training(recipe), config, whole_on)
    if not keeps_documents_apart(base):
        begun.console.print(
            f"WARNING: packed documents reach each other in model type {config.model_type}, whatever the attention "
            "(docs/architectures.md): use documents as long as context.context_length",
            highlight=False,
        )
    return base, fingerprint


def _use_deepspeed(model: LossModel, begun: Start) -> dict[str, Any]:
    """Leave each process its part of `model`, if it is to have one; returns what the trainer is told of DeepSpeed."""
    config = zero_config(begun.recipe, begun.config)
    changes = join_zero(begun.device)
    if begun.shards_weights:
        shard_zero(model, config, begun.device)
    return {**changes, "deepspeed": config, "bf16": False}  # the config says what computes in 16 bits


def _source(run: RunFolder, fingerprint: str) -> dict[str, str]:
    """What a run that goes on from a checkpoint must find as it was."""
    return {"training data (data/train)": sha256_file(run.train_shard / MANIFEST), "base model": fingerprint}


def _facts(run: RunFolder, model: TrainedModel, fingerprint: str, tokenizer_sha256: str) -> dict[str, str]:
    """What must be the same on all processes beside the recipe, by name; hashes, shortened."""
    held_out = run.heldout_shard / MANIFEST
    facts = {
        "tokenizer": tokenizer_sha256,
        "training data (manifest)": sha256_file(run.train_shard / MANIFEST),
        "held-out data (manifest)": sha256_file(held_out) if held_out.exists() else "none",
        "base model": fingerprint,
        "weights before training": weights_fingerprint(model),
    }
    return {name: value[:12] for name, value in facts.items()}


def _rows(shard: TokenShard, begun: Start, *, weigh: bool) -> PackedDataset:
    # Texts are to teach positions that the model does not know yet; instructions need not.
    known = begun.change.original_context_length if begun.recipe.data.kind == "text" else 1
    return PackedDataset(shard, begun.recipe.context.context_length, min_length=known, weigh_documents=weigh)


def _require_kind(shard: TokenShard, recipe: Recipe) -> None:
    found = "text" if shard.mask is None else "instruct"
    if found != recipe.data.kind:
        raise DataError(
            f"{shard.folder} was prepared with data.kind={found}, the recipe says {recipe.data.kind}: run "
            "`longlora prepare` again"
        )


def _require_length(shard: TokenShard, recipe: Recipe) -> None:
    """Instructions are shortened to the context when they are prepared, and may have been for another one."""
    prepared, wanted = shard.context_length, recipe.context.context_length
    if prepared not in (None, wanted):
        raise DataError(
            f"{shard.folder} was prepared with context.context_length={prepared}, the recipe says {wanted}: run "
            "`longlora prepare` again"
        )


def _trainable(base: PreTrainedModel, recipe: Recipe, shard: TokenShard) -> TrainedModel:
    """The base model with what is trained and the memory levers of the recipe."""
    rows = shard.occurring_tokens().tolist() if recipe.adapter.embedding_rows == "occurring" else None
    model = make_trainable(base, recipe.adapter, rows)
    cast_to_compute_dtype(model, getattr(torch, recipe.model.dtype))
    apply_memory_levers(model, recipe)
    return model


def _announce(model: TrainedModel, dataset: PackedDataset, begun: Start) -> None:
    trained, every = parameter_counts(model)
    frozen = f"beside {every - trained:,} frozen ones" if every > trained else "(full fine-tuning)"
    ranks, shard = begun.ranks, begun.recipe.parallel.shard
    among = f", {ranks.world} processes" if ranks.world > 1 else ""
    among += f" that share the model ({shard})" if ranks.world > 1 and shard != "none" else ""
    begun.console.print(
        f"training {trained:,} parameters {frozen} on {len(dataset):,} "
        f"sequences of up to {dataset.context_length:,} tokens, on {begun.device.type}{among}",
        highlight=False,
    )
