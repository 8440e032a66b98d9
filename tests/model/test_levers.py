"""The memory levers of a recipe on a model: the same loss and gradients as without them, or a refusal by name."""

import copy
import importlib.util
import sys
import types

import pytest
import torch
from tiny import llama_config
from transformers import LlamaForCausalLM, PreTrainedModel

from longlora.config import Recipe, build_recipe
from longlora.errors import LongLoraError
from longlora.model import levers
from longlora.model.adapters import add_adapter, cast_to_compute_dtype
from longlora.model.head import mixed_precision
from longlora.model.levers import apply_memory_levers, check_levers

IDS = torch.randint(128, (2, 33), generator=torch.Generator().manual_seed(1))
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def recipe_with(quantization: str = "none", **train: object) -> Recipe:
    return build_recipe(
        {
            "run_dir": "r",
            "model": {"name_or_path": "m", "quantization": quantization, "dtype": "float32"},
            "context": {"context_length": 64},
            "train": train,
        }
    )


def adapted(layers: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    recipe = recipe_with()
    return add_adapter(LlamaForCausalLM(llama_config(num_hidden_layers=layers)), recipe.adapter).train()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


PLAIN = {"activation_checkpointing": False}


@pytest.mark.parametrize("every", [1, 2, 3, 9])
def test_checkpointing_every_n_layers_is_exact(every: int) -> None:
    plain, checkpointed = adapted(), adapted()
    apply_memory_levers(plain, recipe_with(**PLAIN))
    apply_memory_levers(checkpointed, recipe_with(activation_checkpointing_every=every))
    calls = []
    for index, layer in enumerate(checkpointed.get_base_model().model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))
    expected, found = gradients(plain), gradients(checkpointed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert [calls.count(index) for index in range(4)] == [2 if index % every == 0 else 1 for index in range(4)]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_tiled_mlps_with_and_without_checkpointing(checkpointing: bool) -> None:
    plain, tiled = adapted().double(), adapted().double()
    apply_memory_levers(plain, recipe_with(**PLAIN))
    apply_memory_levers(tiled, recipe_with(activation_checkpointing=checkpointing, mlp_tile_tokens=10))
    expected, found = gradients(plain), gradients(tiled)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def test_compiled_norms_give_the_same_loss_and_gradients() -> None:
    plain, compiled = adapted(2), adapted(2)
    apply_memory_levers(plain, recipe_with())
    apply_memory_levers(compiled, recipe_with(compile_norms=True))
    torch._dynamo.utils.counters.clear()
    expected, found = gradients(plain), gradients(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_compiled_norms_without_a_compiler_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def none() -> str:
        raise RuntimeError("No working C++ compiler found in\n CXX")

    check_levers(recipe_with(compile_norms=True), CPU)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(LongLoraError, match=r"compile_norms=true needs a C\+\+ compiler .*install g\+\+") as caught:
        check_levers(recipe_with(compile_norms=True), CPU)
    assert "\n" not in str(caught.value)
    check_levers(recipe_with(compile_norms=True), CUDA)


def test_activations_are_converted_once() -> None:
    """Autocast and PEFT convert them to and fro if they are let."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(llama_config(num_hidden_layers=2)).to(torch.bfloat16)
    model = add_adapter(base, recipe_with().adapter).train()
    cast_to_compute_dtype(model, torch.bfloat16)
    seen: list[torch.dtype] = []
    for name, module in model.named_modules():
        if name.endswith(("lora_A.default", "gate_proj", "layernorm.modules_to_save.default")):
            module.register_forward_hook(lambda _m, args, out: seen.extend((args[0].dtype, out.dtype)))
    with mixed_precision(model):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(seen) == 2 * 2 * (4 + 1 + 2)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("quantization", "train", "device", "expected"),
    [
        ("none", {"activation_offload": True}, CPU, "activation_offload=true needs a CUDA device, this run is on cpu"),
        ("none", {"optimizer": "adamw_8bit"}, CPU, "train.optimizer=adamw_8bit needs a CUDA device"),
        ("none", {"optimizer": "paged_adamw_8bit"}, CPU, "train.optimizer=paged_adamw_8bit needs a CUDA device"),
        ("none", {"liger_kernels": True}, CPU, "train.liger_kernels=true needs a CUDA device"),
        ("none", {"optimizer": "adamw_8bit"}, CUDA, "needs the package bitsandbytes.* pip install 'longlora"),
        ("none", {"liger_kernels": True}, CUDA, "needs the package liger_kernel.* pip install 'liger-kernel'"),
        ("nf4", {}, CPU, "model.quantization=nf4 needs the package bitsandbytes.* pip install 'longlora"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_before_weights_are_read(
    quantization: str, train: dict, device: torch.device, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LongLoraError, match=expected) as caught:
        check_levers(recipe_with(quantization, **train), device)
    assert "\n" not in str(caught.value)


def test_nothing_is_refused_by_default() -> None:
    check_levers(recipe_with(), CPU)
    check_levers(recipe_with(activation_checkpointing_every=2, mlp_tile_tokens=4), CPU)
    check_levers(recipe_with(activation_offload=True), CUDA)


def test_an_older_transformers_is_refused_where_it_lacks_the_lever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "activation_checkpointing_enable", lambda self, kwargs=None: None)
    with pytest.raises(LongLoraError, match=r"transformers has no every_n_layers: upgrade to transformers>=5\.23"):
        check_levers(recipe_with(activation_checkpointing_every=2), CPU)
    with pytest.raises(LongLoraError, match="has no every_n_layers and offload"):
        check_levers(recipe_with(activation_checkpointing_every=2, activation_offload=True), CUDA)
    monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable")
    check_levers(recipe_with(), CPU)


def test_architectures_without_checkpointing_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(2)
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(LongLoraError, match="LlamaForCausalLM does not support activation checkpointing: set"):
        apply_memory_levers(model, recipe_with())
    apply_memory_levers(model, recipe_with(**PLAIN))
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", True)
    monkeypatch.setattr(levers, "GradientCheckpointingLayer", torch.nn.Bilinear)
    with pytest.raises(LongLoraError, match=r"every=2: LlamaForCausalLM can only checkpoint all of its layers"):
        apply_memory_levers(model, recipe_with(activation_checkpointing_every=2))


def test_liger_kernels_are_asked_for_without_their_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which imports on CUDA machines only."""
    asked: dict[str, object] = {}
    stand_in = types.ModuleType("monkey_patch")
    stand_in.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    stand_in._apply_liger_kernel_to_instance = lambda **kwargs: asked.update(kwargs)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", stand_in)
    model = adapted(2)
    apply_memory_levers(model, recipe_with(liger_kernels=True))
    assert asked == {"model": model.get_base_model(), "cross_entropy": False, "fused_linear_cross_entropy": False}
    stand_in.MODEL_TYPE_TO_APPLY_LIGER_FN.clear()
    with pytest.raises(LongLoraError, match="liger-kernel has none for the model type llama"):
        apply_memory_levers(model, recipe_with(liger_kernels=True))


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("train", {"activation_checkpointing": False, "activation_checkpointing_every": 2}, "every=2, activation_off"),
        ("train", {"activation_checkpointing": False, "activation_offload": True}, "set activation_checkpointing=true"),
        ("adapter", {"train_embeddings": False, "embedding_rows": "occurring"}, "needs train_embeddings=true"),
        ("train", {"mlp_tile_tokens": 0}, "train.mlp_tile_tokens = 0"),
        ("train", {"optimizer": "sgd"}, "train.optimizer = 'sgd'"),
        ("model", {"name_or_path": "m", "quantization": "int8"}, "model.quantization = 'int8'"),
    ],
)
def test_settings_that_contradict_each_other(section: str, values: dict, expected: str) -> None:
    recipe = copy.deepcopy({"run_dir": "r", "model": {"name_or_path": "m"}, "context": {"context_length": 64}})
    with pytest.raises(LongLoraError, match=expected):
        build_recipe({**recipe, section: values})
