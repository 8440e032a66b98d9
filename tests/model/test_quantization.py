"""NF4 base weights: training on them is training on the same weights written out in full. Needs bitsandbytes."""

from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model
from torch import nn

from longlora.config import AdapterConfig, ModelConfig
from longlora.model.adapters import add_adapter
from longlora.model.build import load_config, load_for_training, load_model, weights_fingerprint

bitsandbytes = pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
IDS = torch.randint(128, (2, 30), generator=torch.Generator().manual_seed(1))


def settings(folder: Path, quantization: str = "nf4", dtype: str = "float32") -> ModelConfig:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    save_tiny_model(folder, hidden_size=128, intermediate_size=256, **heads)
    return ModelConfig(name_or_path=str(folder), dtype=dtype, quantization=quantization)


def written_out(quantized: nn.Module, plain: nn.Module) -> nn.Module:
    """`plain` with the values that the 4-bit weights of `quantized` stand for."""
    own = dict(plain.named_modules())
    for name, module in quantized.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            assert (values - own[name].weight).abs().max() > 0, "quantizing has changed nothing"
            own[name].weight.data = values.to(own[name].weight.dtype)
    return plain


def gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.eval()
    with torch.no_grad():  # as training begins: with a look at the logits
        model(input_ids=IDS)
    loss = model.train()(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_loss_and_gradients_are_those_of_the_weights_written_out(tmp_path: Path) -> None:
    source = settings(tmp_path)
    quantized, _ = load_for_training(source, load_config(source), CPU)
    plain = written_out(quantized, load_model(source))
    results = []
    for model in (quantized, plain):
        adapted = add_adapter(model, AdapterConfig(target_modules="all-linear"))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora" in name:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        results.append(gradients(adapted))
    (loss, grads), (expected_loss, expected) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(
            grads[name], grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name} {text}"
        )


def test_what_is_quantized_and_what_is_not(tmp_path: Path) -> None:
    source = settings(tmp_path, dtype="bfloat16")
    quantized, fingerprint = load_for_training(source, load_config(source), CPU)
    linear = {name: module for name, module in quantized.named_modules() if isinstance(module, nn.Linear)}
    assert [name for name, m in linear.items() if not isinstance(m, bitsandbytes.nn.Linear4bit)] == ["lm_head"]
    assert quantized.get_input_embeddings().weight.dtype is torch.bfloat16
    for module in linear.values():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            assert module.weight.quant_state.quant_type == "nf4"
            assert module.weight.quant_state.nested, "double quantization"
            assert module.compute_dtype is torch.bfloat16
    assert fingerprint == weights_fingerprint(load_model(source)), "the merge compares with the unquantized weights"
    plain, same = load_for_training(settings(tmp_path, "none"), load_config(source), CPU)
    assert same == fingerprint
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in plain.modules())
