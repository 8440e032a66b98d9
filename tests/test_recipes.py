"""The recipes for GPUs: the paper's numbers, and each model as training would make it, on the meta device."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from model_configs import MODELS, PARAMETERS, model_config

from longlora.config import Recipe, load_recipe
from longlora.model.rope import expected_frequencies, rescale_for
from longlora.planning.machines import gpu
from longlora.planning.mesh import mesh_of, on_one_device, require_whole_groups
from longlora.planning.outline import meta_base, meta_model

RECIPES = sorted((Path(__file__).parent.parent / "src" / "longlora" / "recipes").glob("*.yaml"))
OF_GPUS = [path.stem for path in RECIPES if re.search(r"_(\d+x)?(a100|h[12]00)$", path.stem)]
# Recipe -> context, rate (paper, section 4.1 and tables 4 and 12).
PAPER = {
    "llama-2-7b_8k_8xa100": (8192, 2e-5),
    "llama-2-7b_16k_8xa100": (16384, 2e-5),
    "llama-2-7b_32k_8xa100": (32768, 2e-5),
    "llama-2-7b_100k_8xa100": (102400, 2e-5),
    "llama-2-13b_64k_8xa100": (65536, 2e-5),
    "llama-2-70b_32k_8xa100": (32768, 1e-5),
    "llama-2-70b_32k-nf4_8xa100": (32768, 1e-5),
}
TODAY = {
    "llama-3.1-8b_512k": ("meta-llama/Llama-3.1-8B", 524288, 4.0),
    "qwen3-8b_256k": ("Qwen/Qwen3-8B-Base", 262144, 8.0),
    "smollm3-3b_128k": ("HuggingFaceTB/SmolLM3-3B-Base", 131072, 2.5),
}


def shipped(name: str) -> Recipe:
    return load_recipe(next(path for path in RECIPES if path.stem == name))


def devices(name: str) -> int:
    return int(name.rsplit("_", 1)[1].rpartition("x")[0] or 1)


def test_every_run_of_the_paper_and_of_today_is_there() -> None:
    today = {name.rsplit("_", 1)[0] for name in OF_GPUS} & TODAY.keys()
    assert PAPER.keys() <= set(OF_GPUS)
    assert today == TODAY.keys()
    for model in today:
        assert {devices(name) for name in OF_GPUS if name.startswith(model)} == {1, 8}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_configs_are_those_of_the_published_models(name: str) -> None:
    base = meta_base(model_config(name), "bfloat16")
    assert sum(parameter.numel() for parameter in base.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_papers_hyper_parameters(name: str) -> None:
    recipe, (context, rate) = shipped(name), PAPER[name]
    train, attention, adapter = recipe.train, recipe.attention, recipe.adapter
    rows = train.micro_batch_size * train.grad_accum_steps * devices(name) // recipe.parallel.sequence
    assert (recipe.context.context_length, train.learning_rate, rows) == (context, rate, 64)
    assert (train.steps, train.warmup_steps, train.weight_decay) == (1000, 20, 0)
    assert (train.adam_beta1, train.adam_beta2) == (0.9, 0.95)
    assert (attention.resolve_group_size(context), attention.sink_tokens) == (context // 4, 0)
    assert (adapter.r, adapter.lora_alpha, adapter.target_modules) == (8, 16, "attention")
    assert adapter.train_embeddings
    assert adapter.train_norms
    _, change = rescale_for(recipe, model_config(recipe.model.name_or_path))
    assert (change.after["rope_type"], change.after["factor"]) == ("linear", context / 4096)


@pytest.mark.parametrize("name", OF_GPUS)
def test_recipe_is_named_after_what_it_does(name: str) -> None:
    recipe = shipped(name)
    context = re.search(r"_(\d+)k[-_]", name)
    assert context is not None
    # 100k is 25 x 4,096.
    assert recipe.context.context_length // 1000 >= int(context[1]) >= recipe.context.context_length // 1100
    assert recipe.run_dir == f"runs/{name}" or "sft" in name
    assert recipe.model.name_or_path in MODELS
    # A mesh of these devices, with a group at least for each.
    mesh = mesh_of(recipe, gpu("h100-80g", devices(name)))
    assert mesh.devices == devices(name)
    require_whole_groups(recipe)
    assert on_one_device(recipe).context.context_length * mesh.sequence == recipe.context.context_length


@pytest.mark.parametrize("name", OF_GPUS)
def test_model_is_built_with_rescaled_rope_and_what_is_trained(name: str) -> None:
    recipe = shipped(name)
    config = model_config(recipe.model.name_or_path)
    extended, change = rescale_for(recipe, config)
    with torch.device("meta"):  # PEFT makes a linear layer for tied embeddings
        model = meta_model(extended, recipe)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.config.max_position_embeddings == recipe.context.context_length or recipe.data.kind == "instruct"
    # The slowest frequency is stretched by the whole factor, whatever the type.
    before, after = (expected_frequencies(each)[0][-1].item() for each in (config, extended))
    factor = recipe.context.rope_factor or change.context_length / change.original_context_length
    assert before / after == pytest.approx(factor, rel=1e-4)
    trained = {parameter_name for parameter_name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in each for each in trained)
    assert any("embed_tokens" in each for each in trained) is recipe.adapter.train_embeddings
    assert sum("norm" in each for each in trained) >= 2 * config.num_hidden_layers + 1
    if name.rsplit("_", 1)[0] in TODAY:
        hub_id, context, ratio = TODAY[name.rsplit("_", 1)[0]]
        assert (recipe.model.name_or_path, recipe.context.context_length) == (hub_id, context)
        assert factor == ratio
