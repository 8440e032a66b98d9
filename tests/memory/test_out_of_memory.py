"""Running out of memory: recognised as what it is, and answered with the largest part and a lever that is left."""

import pytest
import torch
from tiny import llama_config
from transformers import LlamaForCausalLM

from longlora.config import Recipe, build_recipe
from longlora.memory.out_of_memory import explain_out_of_memory, is_out_of_memory, levers, memory_parts
from longlora.model.adapters import add_adapter


def recipe_with(context: int = 4096, **sections: dict[str, object]) -> Recipe:
    model = {"name_or_path": "m", **sections.pop("model", {})}
    return build_recipe({"run_dir": "r", "model": model, "context": {"context_length": context}, **sections})


def adapted(recipe: Recipe, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return add_adapter(LlamaForCausalLM(llama_config(**changes)).to(torch.bfloat16), recipe.adapter)


def real_errors() -> list[BaseException]:
    errors: list[BaseException] = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ]
    try:
        torch.empty(1 << 50)
    except RuntimeError as error:
        errors.append(error)
    return errors


def test_every_way_to_say_it_is_recognised() -> None:
    errors = real_errors()
    assert len(errors) == 3
    assert all(is_out_of_memory(error) for error in errors)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("recipe", "changes", "largest", "remedy"),
    [
        (
            recipe_with(1 << 20, train={"activation_checkpointing": False, "loss_chunk_tokens": 16}),
            {"num_hidden_layers": 8},
            "saved activations",
            "resume with train.activation_checkpointing=true",
        ),
        (
            recipe_with(1 << 20, train={"loss_chunk_tokens": 16}),
            {"intermediate_size": 1000},
            "activations of one layer",
            "resume with train.mlp_tile_tokens=1024",
        ),
        (
            recipe_with(64, train={"mlp_tile_tokens": 8}),
            {"vocab_size": 20000, "tie_word_embeddings": False},
            "trained weights with their gradients and optimizer state",
            "train in another run_dir with adapter.embedding_rows=occurring",
        ),
        (
            recipe_with(2048, train={"mlp_tile_tokens": 8, "loss_chunk_tokens": 2048}),
            {"vocab_size": 400, "hidden_size": 9, "num_hidden_layers": 1},
            "logits of one chunk",
            "resume with train.loss_chunk_tokens=256",
        ),
        (
            recipe_with(8, adapter={"train_embeddings": False}, train={"loss_chunk_tokens": 8}),
            {"hidden_size": 180},
            "frozen weights",
            "train in another run_dir with model.quantization=nf4",
        ),
    ],
)
def test_the_largest_part_and_its_lever_are_named(recipe: Recipe, changes: dict, largest: str, remedy: str) -> None:
    line = explain_out_of_memory(real_errors()[-1], adapted(recipe, **changes), recipe, step=3)
    assert "\n" not in line
    assert line.startswith("out of memory on cpu in step 3 (")
    assert f"GiB of {largest} at " in line
    assert remedy in line
    assert "checkpoints are intact" in line


def test_what_is_used_already_is_not_proposed() -> None:
    recipe = recipe_with(train={"mlp_tile_tokens": 64, "loss_chunk_tokens": 100}, adapter={"train_embeddings": False})
    left = [lever.key for lever in levers(recipe, "cpu") if lever.usable]
    assert left == ["model.quantization"]
    assert {"train.activation_offload", "train.optimizer"} <= {
        lever.key for lever in levers(recipe, "cuda") if lever.usable
    }
    everything = recipe.model_copy(update={"model": recipe.model.model_copy(update={"quantization": "nf4"})})
    line = explain_out_of_memory(MemoryError(), adapted(everything), everything, step=1)
    assert "no lever is left: lower context.context_length" in line


def test_a_smaller_micro_batch_keeps_the_batch() -> None:
    recipe = recipe_with(train={"micro_batch_size": 4, "grad_accum_steps": 2})
    (lever,) = [each for each in levers(recipe, "cpu") if each.key.endswith("micro_batch_size")][:1]
    assert lever.value == "1 train.grad_accum_steps=8"


def test_weights_are_counted_exactly() -> None:
    recipe = recipe_with()
    model = adapted(recipe)
    parts = memory_parts(model, recipe)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parts["trained weights with their gradients and optimizer state"] == trained * 16
    assert parts["frozen weights"] == 2 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
