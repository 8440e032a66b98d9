"""The training run: a recipe and prepared shards in, an adapter or, after full fine-tuning, a whole model out.

Read `loop.py` for the steps and their checkpoints, `loss_model.py` for the loss in chunks.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedConfig, PreTrainedModel, set_seed
from transformers.trainer_callback import PrinterCallback

from longlora.artifacts import RunFolder, write_atomic
from longlora.attention.check import keeps_documents_apart
from longlora.attention.registry import use_full
from longlora.config import Recipe, dump_recipe, load_recipe
from longlora.data.packing import PackedDataset, collate
from longlora.data.shards import TokenShard, open_shard
from longlora.errors import DataError, RunFolderError
from longlora.memory.allocator import return_freed_memory_if_tight
from longlora.model.adapters import cast_to_compute_dtype
from longlora.model.build import device_for_run, load_config, load_for_training, load_tokenizer, tokenizer_hash
from longlora.model.levers import apply_memory_levers, check_levers
from longlora.model.rope import RopeChange, rescale_for
from longlora.model.sidecar import Sidecar
from longlora.model.trainable import TrainedModel, make_trainable, parameter_counts, source_of_training
from longlora.planning.machines import this_machine
from longlora.planning.memory import Memory
from longlora.planning.out_of_memory import explained_out_of_memory
from longlora.planning.settle import adopt_levers, settle_memory
from longlora.training.attention_schedule import AttentionSchedule, moved_full_phase
from longlora.training.checkpoint import checkpoint_step, has_whole_checkpoint, newest_checkpoint
from longlora.training.interrupt import StopOnSignal
from longlora.training.loop import LongContextTrainer, training_arguments
from longlora.training.loss_model import LossModel
from longlora.training.metrics import MetricsCallback
from longlora.training.result import write_result
from longlora.training.validation import validation


def train(recipe: Recipe, console: Console, *, resume: bool = False) -> Path:
    """Train what `recipe` says and return the folder of the result: adapter/, or merged/ after full fine-tuning.

    Needs the token shards of `longlora prepare`. With `resume`, goes on from the newest whole checkpoint.

    Raises:
        LongLoraError: the run folder is in use, or something that the run needs is missing or does not fit.
    """
    run = RunFolder(recipe.run_path)
    checkpoint = _resume_from(run, console) if resume else None
    if checkpoint is not None:
        saved = load_recipe(run.recipe)
        recipe = adopt_levers(recipe, saved)
        if moved := moved_full_phase(saved, recipe, checkpoint_step(checkpoint)):
            console.print(moved, highlight=False)
    else:
        run.require_unused()
    device = device_for_run()
    check_levers(recipe, device)
    config, change = rescale_for(recipe, load_config(recipe.model))
    recipe, memory = _settle(recipe, config, console)
    metrics = MetricsCallback(run.metrics, console)
    with explained_out_of_memory(
        recipe, memory, device, step=lambda: metrics.step, resumable=lambda: has_whole_checkpoint(run.checkpoints)
    ):
        model, sidecar = _train(recipe, config, change, checkpoint, metrics, console)
    use_full(model)
    return write_result(model, sidecar, run, recipe.train.steps, console)


def _train(
    recipe: Recipe,
    config: PreTrainedConfig,
    change: RopeChange,
    checkpoint: Path | None,
    metrics: MetricsCallback,
    console: Console,
) -> tuple[TrainedModel, Sidecar]:
    """Load the model of `config`, train it from `checkpoint` on, and return it with what goes beside its weights."""
    run, device = RunFolder(recipe.run_path), device_for_run()
    set_seed(recipe.train.seed)  # here, because planning draws random numbers too
    tokenizer = load_tokenizer(recipe.model)
    tokenizer_sha256 = tokenizer_hash(tokenizer)
    shard = open_shard(run.train_shard, tokenizer_sha256)
    instruct = recipe.data.kind == "instruct"
    _require_kind(shard, recipe)
    weigh = instruct and recipe.data.instruct.loss_weighting == "examples"
    dataset = PackedDataset(
        shard,
        recipe.context.context_length,
        min_length=1 if instruct else change.original_context_length,
        weigh_documents=weigh,
    )
    base, fingerprint = load_for_training(source_of_training(recipe), config, device)
    if not keeps_documents_apart(base):
        console.print(
            f"WARNING: packed documents reach each other in model type {config.model_type}, whatever the attention "
            "(docs/architectures.md): use documents as long as context.context_length",
            highlight=False,
        )
    sidecar = Sidecar.of(recipe, change, config, tokenizer_sha256, fingerprint, shard.chat_template)
    model = _trainable(base, recipe, shard)
    _announce(model, dataset, console)
    stop = StopOnSignal(console)
    loss_model = LossModel(model, recipe.train.loss_chunk_tokens, getattr(torch, recipe.model.dtype))
    validate = validation(recipe, loss_model, tokenizer_sha256, weigh_documents=weigh, console=console)
    trainer = LongContextTrainer(
        model=loss_model,
        args=training_arguments(recipe, run.checkpoints, base.device),
        train_dataset=dataset,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id or 0),
        callbacks=[metrics, AttentionSchedule(model, recipe, console), *([validate] if validate else []), stop],
    )
    # The library prints the logs once more where there is no progress bar of its own.
    trainer.remove_callback(PrinterCallback)
    trainer.checkpoints_kept = recipe.train.save_total_limit
    write_atomic(run.recipe, dump_recipe(recipe))
    if checkpoint is not None and checkpoint_step(checkpoint) >= recipe.train.steps:
        trainer._load_from_checkpoint(str(checkpoint))  # stopped between its last checkpoint and its result
        return model, sidecar
    try:
        with stop:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        metrics.close()
    return model, sidecar


def _require_kind(shard: TokenShard, recipe: Recipe) -> None:
    found = "text" if shard.mask is None else "instruct"
    if found != recipe.data.kind:
        raise DataError(
            f"{shard.folder} was prepared with data.kind={found}, the recipe says {recipe.data.kind}: run "
            "`longlora prepare` again"
        )


def _settle(recipe: Recipe, config: PreTrainedConfig, console: Console) -> tuple[Recipe, Memory | None]:
    """The recipe with its memory levers, and what it is planned to take; a run that does not fit is refused here."""
    machine = this_machine()
    settled = settle_memory(recipe, config, machine)
    if settled.line:
        console.print(settled.line, highlight=False)
    peak = settled.memory.peak if settled.memory else None
    if not machine.cuda and return_freed_memory_if_tight(peak, machine.memory_bytes):
        console.print("memory is short: what is freed goes back to the system at once, which takes time")
    return settled.recipe, settled.memory


def _trainable(base: PreTrainedModel, recipe: Recipe, shard: TokenShard) -> TrainedModel:
    """The base model with what is trained and the memory levers of the recipe."""
    rows = shard.occurring_tokens().tolist() if recipe.adapter.embedding_rows == "occurring" else None
    model = make_trainable(base, recipe.adapter, rows)
    cast_to_compute_dtype(model, getattr(torch, recipe.model.dtype))
    apply_memory_levers(model, recipe)
    return model


def _announce(model: TrainedModel, dataset: PackedDataset, console: Console) -> None:
    trained, every = parameter_counts(model)
    frozen = f"beside {every - trained:,} frozen ones" if every > trained else "(full fine-tuning)"
    console.print(
        f"training {trained:,} parameters {frozen} on {len(dataset):,} "
        f"sequences of up to {dataset.context_length:,} tokens, on {model.device.type}",
        highlight=False,
    )


def _resume_from(run: RunFolder, console: Console) -> Path:
    if run.trained.exists():
        raise RunFolderError(f"{run.trained} exists: the run is finished; merge, evaluate or export it")
    checkpoint, passed_over = newest_checkpoint(run.checkpoints)
    for line in passed_over:
        console.print(f"passed over: {line}", highlight=False)
    console.print(f"going on from {checkpoint}", highlight=False)
    return checkpoint
