"""Measuring base, RoPE rescaled only, and trained: a recipe in, one JSON file of rows for each variant out."""

from __future__ import annotations

import gc
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora import __version__
from longlora.artifacts import RunFolder, write_json
from longlora.config import PasskeyConfig, Recipe
from longlora.data.shards import bound_tokens, open_shard
from longlora.errors import DataError, RunFolderError
from longlora.evaluation.passkey import Hidden, filler_prompts, hide_facts
from longlora.evaluation.perplexity import document_rows, first_window
from longlora.evaluation.stream import Reading, read
from longlora.model.build import device_for_run, load_config, load_model, load_tokenizer, tokenizer_hash
from longlora.model.head import OutputHead, output_head
from longlora.model.merge import merged_model
from longlora.model.rope import rescale_for


@dataclass(frozen=True)
class _Text:
    """A held-out document as it is read: with hidden numbers or as it is."""

    name: str
    hidden: Hidden


def evaluate(recipe: Recipe, console: Console) -> list[Path]:
    """Measure the variants of `recipe.eval` and write ``eval/VARIANT.json`` for each.

    ``trained`` is the merged model of the run, or its adapter merged in memory where there is no ``merged/`` yet.

    Raises:
        LongLoraError: there is no trained model, no held-out document long enough, or something does not fit.
    """
    run = RunFolder(recipe.run_path)
    tokenizer = load_tokenizer(recipe.model)
    _, change = rescale_for(recipe, load_config(recipe.model))
    contexts = recipe.eval.perplexity.context_lengths or [change.original_context_length, change.context_length]
    texts, prompts = _material(recipe, run, tokenizer, contexts)
    paths = []
    for variant in recipe.eval.variants:
        began = time.monotonic()
        model = _variant(recipe, run, variant).to(device_for_run())
        head = output_head(model)
        rows = _measure(recipe, model, head, tokenizer, texts, prompts, contexts, console, variant)
        result = {
            "schema": 1,
            "variant": variant,
            "original_context_length": change.original_context_length,
            "context_length": change.context_length,
            **_environment(recipe, model),
            "seconds": time.monotonic() - began,
            **rows,
        }
        path = run.evaluation(variant)
        write_json(path, result)
        paths.append(path)
        del model, head
        gc.collect()
    return paths


def _variant(recipe: Recipe, run: RunFolder, variant: str) -> PreTrainedModel:
    if variant == "base":
        return load_model(recipe.model)
    if variant == "rope_only":
        config, _ = rescale_for(recipe, load_config(recipe.model))
        return load_model(recipe.model, config)
    if run.merged.exists():
        return load_model(recipe.model.model_copy(update={"name_or_path": str(run.merged), "revision": None}))
    if not run.adapter.exists():
        raise RunFolderError(f"{run.adapter} does not exist: run `longlora train` first, or leave out trained")
    return merged_model(run.adapter)


def _material(
    recipe: Recipe, run: RunFolder, tokenizer: PreTrainedTokenizerBase, contexts: Sequence[int]
) -> tuple[list[_Text], list[Hidden]]:
    """Held-out texts to be read for their loss, and prompts that are only answered."""
    settings, passkey = recipe.eval.perplexity, recipe.eval.passkey
    shard = open_shard(run.heldout_shard, tokenizer_hash(tokenizer))
    needed = max(*contexts, settings.tokens_per_document or 0)
    long_enough = [index for index, length in enumerate(shard.lengths) if length >= needed]
    if not long_enough:
        raise DataError(
            f"no held-out document has {needed} tokens, the longest has {max(shard.lengths)}: "
            "add longer ones to data.heldout or lower eval.perplexity.context_lengths"
        )
    lengths = _passkey_lengths(recipe)
    hides = passkey.num_trials > 0 and passkey.haystack == "heldout"
    read_tokens = first_window(contexts, settings.tokens_per_document)
    if hides and max(lengths) > read_tokens:
        raise DataError(
            f"eval.passkey.lengths {max(lengths)} is longer than the {read_tokens} tokens that are read of each "
            "held-out document: raise eval.perplexity.context_lengths or take eval.passkey.haystack=filler"
        )

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    texts = []
    for trial, index in enumerate(long_enough[: settings.max_documents]):
        tokens = shard.document(index)[:needed].tolist()
        if hides:
            hidden = hide_facts(encode, tokens, lengths, passkey.depths, trial, recipe.eval.seed)
        else:
            hidden = Hidden(tokens, [True] * len(tokens), [], [])
        texts.append(_Text(shard.names[index], hidden))
    prompts = []
    if passkey.num_trials and passkey.haystack == "filler":
        before, _ = bound_tokens(tokenizer)
        prompts = filler_prompts(encode, before, lengths, passkey.depths, passkey.num_trials, recipe.eval.seed)
    return texts, prompts


def _passkey_lengths(recipe: Recipe) -> list[int]:
    passkey: PasskeyConfig = recipe.eval.passkey
    context = recipe.context.context_length
    return passkey.lengths or [context * quarter // 4 for quarter in (1, 2, 3, 4)]


def _measure(
    recipe: Recipe,
    model: PreTrainedModel,
    head: OutputHead,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[_Text],
    prompts: list[Hidden],
    contexts: Sequence[int],
    console: Console,
    variant: str,
) -> dict[str, Any]:
    settings = recipe.eval.perplexity
    reader = partial(
        read,
        model,
        head,
        chunk_tokens=recipe.eval.prefill_chunk_tokens,
        loss_chunk_tokens=recipe.train.loss_chunk_tokens,
    )
    perplexity: list[dict[str, Any]] = []
    positions: list[dict[str, Any]] = []
    passkey: list[dict[str, Any]] = []
    for count, text in enumerate(texts, 1):
        console.print(f"{variant}: document {count}/{len(texts)} {text.name}", highlight=False)
        tokens = text.hidden.tokens
        first = reader(tokens[: first_window(contexts, settings.tokens_per_document)], text.hidden.questions)
        passkey += _passkey_rows(text.name, text.hidden, first, tokenizer)
        rows, places = document_rows(
            text.name,
            first.losses_T,
            text.hidden.scored,
            contexts,
            settings.stride,
            settings.tokens_per_document,
            partial(_window_losses, reader, tokens),
        )
        perplexity += rows
        positions += places
    for count, prompt in enumerate(prompts, 1):
        fact = prompt.facts[0]
        console.print(
            f"{variant}: passkey {count}/{len(prompts)} length {fact['length']} depth {fact['depth']}", highlight=False
        )
        reading = reader(prompt.tokens, prompt.questions, score=False)
        passkey += _passkey_rows(None, prompt, reading, tokenizer)
    return {"perplexity": perplexity, "positions": positions, "passkey": passkey}


def _window_losses(reader: Callable[[Sequence[int]], Reading], tokens: Sequence[int], start: int, stop: int) -> Tensor:
    return reader(tokens[start:stop]).losses_T


def _passkey_rows(
    document: str | None, hidden: Hidden, reading: Reading, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    return [
        {
            **fact,
            "document": document,
            "answer": tokenizer.decode(answer.likeliest).strip(),
            "correct": answer.likeliest == question.answer,
            "log_probability": answer.log_probability,
            "tokens": len(question.answer),
        }
        for fact, question, answer in zip(hidden.facts, hidden.questions, reading.answers, strict=True)
    ]


def _environment(recipe: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    return {
        "model": recipe.model.name_or_path,
        "rope_parameters": getattr(model.config, "rope_parameters", None),
        "attention": f"full ({model.config._attn_implementation})",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")} | {"longlora": __version__},
        "commit": _commit(),
        "date": date.today().isoformat(),
        "seed": recipe.eval.seed,
    }


def device_name(device: torch.device) -> str:
    """What a row says about the hardware: the GPU, or the CPU with its threads and vector units."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        made = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return made.stdout.strip() or None if made.returncode == 0 else None
