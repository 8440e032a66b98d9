"""The training run: a thin `transformers.Trainer` around a PEFT model with shifted sparse attention.

What is not the library's: the loss in chunks, saving the adapter alone (no pickle of arguments), a manifest that makes
a checkpoint count, and stopping at the first loss that is not a number.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from longlora.artifacts import RunFolder, new_folder, write_atomic, write_manifest
from longlora.attention.check import keeps_documents_apart
from longlora.attention.registry import use_full
from longlora.config import Recipe, dump_recipe, load_recipe
from longlora.data.packing import PackedDataset, collate
from longlora.data.shards import TokenShard, open_shard
from longlora.errors import DataError, ModelError, RunFolderError
from longlora.memory.allocator import return_freed_memory_if_tight
from longlora.model.adapters import add_adapter, cast_to_compute_dtype, trainable_names
from longlora.model.build import device_for_run, load_config, load_for_training, load_tokenizer, tokenizer_hash
from longlora.model.levers import OPTIMIZERS, apply_memory_levers, check_levers
from longlora.model.rope import RopeChange, rescale_for
from longlora.model.sidecar import Sidecar, write_sidecar
from longlora.planning.machines import this_machine
from longlora.planning.memory import Memory
from longlora.planning.out_of_memory import explained_out_of_memory, is_out_of_memory
from longlora.planning.settle import adopt_levers, settle_memory
from longlora.training.attention_schedule import AttentionSchedule, moved_full_phase
from longlora.training.checkpoint import (
    checkpoint_step,
    complete_checkpoint,
    has_whole_checkpoint,
    newest_checkpoint,
)
from longlora.training.interrupt import StopOnSignal
from longlora.training.loss_model import LossModel, weight_of_batches
from longlora.training.metrics import MetricsCallback
from longlora.training.validation import validation


def train(recipe: Recipe, console: Console, *, resume: bool = False) -> Path:
    """Train the adapter of `recipe` and return its folder.

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
    with new_folder(run.adapter) as folder:
        save_adapter(model, folder)
        if sidecar.chat_template is not None:
            tokenizer = load_tokenizer(recipe.model)
            tokenizer.chat_template = sidecar.chat_template
            tokenizer.save_pretrained(folder)
        write_sidecar(folder, sidecar)
        write_manifest(folder, schema=1, step=recipe.train.steps)
    return run.adapter


def _train(
    recipe: Recipe,
    config: PreTrainedConfig,
    change: RopeChange,
    checkpoint: Path | None,
    metrics: MetricsCallback,
    console: Console,
) -> tuple[PeftModel, Sidecar]:
    """Load the model of `config`, train it from `checkpoint` on, and return it with what goes beside its adapter."""
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
    base, fingerprint = load_for_training(recipe.model, config, device)
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
    loss_model = LossModel(model, recipe.train.loss_chunk_tokens)
    validate = validation(recipe, loss_model, tokenizer_sha256, weigh_documents=weigh, console=console)
    trainer = LongContextTrainer(
        model=loss_model,
        args=_arguments(recipe, run.checkpoints, base.device),
        train_dataset=dataset,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id or 0),
        callbacks=[metrics, AttentionSchedule(model, recipe, console), *([validate] if validate else []), stop],
    )
    # The library prints the logs once more where there is no progress bar of its own.
    trainer.remove_callback(PrinterCallback)
    trainer.checkpoints_kept = recipe.train.save_total_limit
    write_atomic(run.recipe, dump_recipe(recipe))
    if checkpoint is not None and checkpoint_step(checkpoint) >= recipe.train.steps:
        trainer._load_from_checkpoint(str(checkpoint))  # stopped between its last checkpoint and its adapter
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


def _trainable(base: PreTrainedModel, recipe: Recipe, shard: TokenShard) -> PeftModel:
    """The base model with its adapter and the memory levers of the recipe."""
    rows = shard.occurring_tokens().tolist() if recipe.adapter.embedding_rows == "occurring" else None
    model = add_adapter(base, recipe.adapter, rows)
    cast_to_compute_dtype(model, getattr(torch, recipe.model.dtype))
    apply_memory_levers(model, recipe)
    return model


def _announce(model: PeftModel, dataset: PackedDataset, console: Console) -> None:
    trained, every = model.get_nb_trainable_parameters()
    console.print(
        f"training {trained:,} parameters beside {every - trained:,} frozen ones on {len(dataset):,} "
        f"sequences of up to {dataset.context_length:,} tokens, on {model.device.type}",
        highlight=False,
    )


def _resume_from(run: RunFolder, console: Console) -> Path:
    if run.adapter.exists():
        raise RunFolderError(f"{run.adapter} exists: the run is finished; merge or evaluate it")
    checkpoint, passed_over = newest_checkpoint(run.checkpoints)
    for line in passed_over:
        console.print(f"passed over: {line}", highlight=False)
    console.print(f"going on from {checkpoint}", highlight=False)
    return checkpoint


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save everything that was trained as one safetensors file, and check that nothing is missing in it.

    Raises:
        ModelError: a trained parameter did not reach the file.
    """
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    # PEFT leaves the names of its wrappers and of the adapter out of the file.
    wanted = {
        name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")
        for name in trainable_names(model)
    }
    if missing := sorted(wanted - saved):
        raise ModelError(
            f"{folder}/adapter_model.safetensors lacks {len(missing)} of {len(wanted)} trained tensors, first "
            f"{missing[0]}: this is a bug of longlora, please report it"
        )


class LongContextTrainer(Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with our loss model and our rules for checkpoints."""

    checkpoints_kept = 2

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise ModelError(
                f"loss is {loss.item()} in step {self.state.global_step + 1}: lower train.learning_rate "
                f"(now {self.args.learning_rate:g}) and resume; nothing was saved from this step"
            )
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # Where examples weigh the same, their weights take the place of the number of labels.
        weight = weight_of_batches(batch_samples)
        if weight is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        weight = weight.to(device)
        return self.accelerator.gather(weight).sum() if self.args.world_size > 1 else weight

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # Clipping comes right before the optimizer's step: the last moment at which the weights are still good.
        norm = super()._clip_grad_norm(model)
        if not torch.isfinite(torch.as_tensor(norm)):
            raise ModelError(
                f"gradient norm is {float(norm)} in step {self.state.global_step + 1}: lower train.learning_rate "
                f"(now {self.args.learning_rate:g}) and resume; nothing was saved from this step"
            )
        return norm

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.accelerator.unwrap_model(self.model).peft_model, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                complete_checkpoint(folder, keep=self.checkpoints_kept)
        except (OSError, RuntimeError, SafetensorError) as error:  # each library's own way to say that a disk is full
            shutil.rmtree(folder, ignore_errors=True)
            if is_out_of_memory(error):
                raise
            free = shutil.disk_usage(self.args.output_dir).free
            raise RunFolderError(
                f"{folder.name} cannot be written to {self.args.output_dir} ({free / 2**30:.2f} GiB free): {error}; "
                "free space and resume, earlier checkpoints are whole"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        peft_model = self.accelerator.unwrap_model(model or self.model).peft_model
        weights = load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors")
        result = set_peft_model_state_dict(peft_model, weights)
        if result.unexpected_keys:
            raise RunFolderError(f"{resume_from_checkpoint} does not fit the recipe: {result.unexpected_keys[:3]}")


def _arguments(recipe: Recipe, folder: Path, device: torch.device) -> TrainingArguments:
    train = recipe.train
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=train.steps,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.grad_accum_steps,
        optim=OPTIMIZERS[train.optimizer],
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        bf16=recipe.model.dtype == "bfloat16",
        seed=train.seed,
        data_seed=train.seed,
        logging_steps=train.logging_steps,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        save_steps=train.save_steps,
        save_total_limit=None,  # complete_checkpoint removes old ones, and only after the new one is whole
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        report_to=[],
    )
