"""The recipes for GPUs end to end in two processes: the same files, with a tiny model of the same architecture."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_cases import launch, losses, trained
from model_configs import model_config
from rich.console import Console
from tiny import VOCABULARY, bear_texts, word_tokenizer
from transformers import AutoModelForCausalLM

from longlora.artifacts import RunFolder, write_atomic
from longlora.config import Recipe, dump_recipe, load_recipe
from longlora.data.prepare import prepare_shards
from longlora.model.build import load_tokenizer, tokenizer_hash

RECIPES = Path(__file__).parents[2] / "src" / "longlora" / "recipes"
NAMES = [path.stem for path in sorted(RECIPES.glob("*.yaml")) if re.search(r"_(\d+x)?(a100|h[12]00)$", path.stem)]
PROCESSES = 2
ORIGINAL = 64
# What a CPU cannot do: bitsandbytes' optimizers and offloading to main memory. All else is the recipe's.
NOT_ON_A_CPU = ("train.optimizer=adamw", "train.activation_offload=false")


def kind(name: str) -> tuple[str, bool, bool]:
    """What a recipe exercises of several processes; one of each kind runs by default."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    return recipe.parallel.shard, recipe.parallel.sequence > 1, recipe.model.quantization != "none"


TEXTS = [name for name in NAMES if load_recipe(RECIPES / f"{name}.yaml").data.kind == "text"]
FIRST = {kind(name): name for name in reversed(TEXTS)}.values()


def tiny_model(folder: Path, hub_id: str) -> Path:
    """A model of the same class, 64 tokens long, with as many kinds of layers and a third of the heads for keys."""
    config = model_config(hub_id)
    rope = dict(config.rope_parameters)
    if "original_max_position_embeddings" in rope:  # llama3, already stretched by 8
        rope["original_max_position_embeddings"] = int(ORIGINAL / rope["factor"])
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4 if "Llama-2-7b" in hub_id else 2, "head_dim": 16,
        "max_position_embeddings": ORIGINAL, "rope_parameters": rope, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(model_config(hub_id, **sizes)).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def tiny_run(folder: Path, name: str) -> Recipe:
    """The recipe with 64 tokens where its model has its own context, shards prepared; its `parallel` for two."""
    path = RECIPES / f"{name}.yaml"
    real = load_recipe(path)
    config = model_config(real.model.name_or_path)
    native = real.model.original_context_length or config.max_position_embeddings
    context = ORIGINAL * real.context.context_length // native
    attention = [] if real.attention.group_size is None else ["attention.group_size=16"]
    original = [] if real.model.original_context_length is None else [f"model.original_context_length={ORIGINAL}"]
    tiles = [] if real.train.mlp_tile_tokens is None else ["train.mlp_tile_tokens=32"]
    texts = bear_texts(folder / "texts")
    recipe = load_recipe(
        path,
        [
            f"run_dir={folder / 'run'}",
            "memory=unchecked",
            f"model.name_or_path={tiny_model(folder / 'model', real.model.name_or_path)}",
            f"context.context_length={context}",
            f"data.train=[{texts}]",
            f"data.heldout=[{texts}]",
            "train.steps=2",
            "train.save_steps=2",
            "train.grad_accum_steps=2",
            "train.warmup_steps=1",
            f"parallel.sequence={min(real.parallel.sequence, PROCESSES)}",
            *(*attention, *original, *tiles, *NOT_ON_A_CPU),
        ],
    )
    tokenizer = load_tokenizer(recipe.model)
    prepare_shards(recipe, tokenizer, tokenizer_hash(tokenizer), Console(quiet=True))
    write_atomic(RunFolder(recipe.run_path).recipe, dump_recipe(recipe))
    return recipe


def check(folder: Path, name: str) -> None:
    recipe = tiny_run(folder, name)
    found = launch(recipe, processes=PROCESSES, launcher="forked")
    assert found.returncode == 0, found.stderr
    if recipe.parallel.shard != "none":
        assert f"{PROCESSES} processes that share the model ({recipe.parallel.shard})" in found.stdout
    assert len(losses(recipe)) == 2
    assert all(math.isfinite(loss) for loss in losses(recipe))
    tensors = trained(recipe)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name), "nothing was learned"
    assert any("embed_tokens" in each for each in tensors) is recipe.adapter.train_embeddings
    assert any("norm" in each for each in tensors)


@pytest.mark.distributed
@pytest.mark.parametrize("name", FIRST)
def test_a_recipe_of_each_kind_trains_in_two_processes(name: str, tmp_path: Path) -> None:
    check(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TEXTS if name not in FIRST])
def test_the_other_recipes_train_in_two_processes(name: str, tmp_path: Path) -> None:
    check(tmp_path, name)
