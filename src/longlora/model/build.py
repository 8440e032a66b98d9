"""Building a model from a recipe: config, RoPE and weights in the right order, and the tokenizer.

In: the model and context sections of a recipe. Out: a transformers model in evaluation mode, or its tokenizer.
"""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from longlora.config import ModelConfig
from longlora.errors import ModelError
from longlora.model.rope import assert_rope_applied

_WITHOUT_CODE = "where transformers knows its type, delete auto_map from a local copy's JSON files"


def load_config(model: ModelConfig) -> PreTrainedConfig:
    """The model's config; remote code is refused.

    Raises:
        ModelError: the model is missing, unreadable, or not a causal language model known to transformers.
    """
    source = model.name_or_path
    try:
        config = AutoConfig.from_pretrained(source, revision=model.revision or "main", trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"model {source!r} cannot be read ({_first_line(error)}): {_remedy(source)}") from error
    if getattr(config, "auto_map", None):
        raise ModelError(
            f"model {source!r} brings its own code (auto_map), which longlora does not run: {_WITHOUT_CODE}"
        )
    return config


def load_model(
    model: ModelConfig, config: PreTrainedConfig | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Weights of `model` under `config` (its own if None), full attention, evaluation mode, RoPE checked.

    Raises:
        ModelError: the weights are missing or unreadable, or RoPE is not what the config says.
    """
    return _built(model, config or load_config(model), dtype or getattr(torch, model.dtype))


def load_for_training(
    model: ModelConfig, config: PreTrainedConfig, device: torch.device
) -> tuple[PreTrainedModel, str]:
    """The model on `device`, its linear weights quantized as `model` says, and the fingerprint of the weights as read.

    The merge reads the unquantized weights, so the fingerprint is theirs. For it they are in main memory once, before
    the quantized ones are built.

    Raises:
        ModelError: as `load_model`, or bitsandbytes cannot quantize the model.
    """
    base = load_model(model, config)
    fingerprint = weights_fingerprint(base)
    if model.quantization == "none":
        return base.to(device), fingerprint
    del base
    gc.collect()
    dtype = getattr(torch, model.dtype)
    # Only this: peft's prepare_model_for_kbit_training would turn embeddings and norms into float32.
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    quantized = _built(model, config, dtype, quantization_config=settings, device_map={"": device})
    for module in quantized.modules():
        # On CPUs with AVX512-BF16 bitsandbytes packs weights in its first evaluation pass for a kernel that has no
        # gradient, and keeps them so: training would then go on without gradients, silently.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return quantized, fingerprint


def _built(model: ModelConfig, config: PreTrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    try:
        built = AutoModelForCausalLM.from_pretrained(
            model.name_or_path,
            revision=model.revision or "main",
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,  # a pickle is never opened
            **options,
        )
    except Exception as error:
        remedy = "set model.quantization=none" if options else _remedy(model.name_or_path)
        raise ModelError(f"model {model.name_or_path!r} cannot be built ({_first_line(error)}): {remedy}") from error
    if getattr(config, "rope_parameters", None):
        assert_rope_applied(built, config)
    return built.eval()  # type: ignore[no-any-return]


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; remote code is refused.

    Raises:
        ModelError: there is none, it cannot be read, or it brings its own code.
    """
    source, revision = model.name_or_path, model.revision or "main"
    try:
        own_code = get_tokenizer_config(source, revision=revision).get("auto_map")
        tokenizer = (
            None if own_code else AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        )
    except Exception as error:
        raise ModelError(f"tokenizer of {source!r} cannot be read ({_first_line(error)}): {_remedy(source)}") from error
    if tokenizer is None:
        raise ModelError(
            f"the tokenizer of {source!r} brings its own code (auto_map), which longlora does not run: {_WITHOUT_CODE}"
        )
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything that decides which ids a text gets."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    # Truncation and padding are call-time settings that a fast tokenizer keeps in the same string.
    if backend is not None:
        parsed = json.loads(rules)
        parsed.pop("truncation", None)
        parsed.pop("padding", None)
        rules = json.dumps(parsed, sort_keys=True)
    return hashlib.sha256(rules.encode()).hexdigest()


def weights_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over about 256 values of every weight, in bfloat16: changes when a base model is trained or replaced.

    The same for any data type the model is loaded in, as long as bfloat16 can be made of it.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 256)].to("cpu", torch.bfloat16)
        digest.update(name.encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def device_for_run() -> torch.device:
    """The accelerator of this process if there is one, else the CPU."""
    # With its number: of several processes each has one of its own, which was made the current one.
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _remedy(source: str) -> str:
    if Path(source).exists():
        return "check that the folder holds config.json, *.safetensors and the tokenizer"
    return "give a local folder, or a hub id that this machine can download"
