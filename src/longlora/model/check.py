"""The part of the self-check that is about weights: train, save, reload, merge and read back must agree."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from longlora.artifacts import write_manifest
from longlora.attention.check import CheckResult
from longlora.config import AdapterConfig, AttentionConfig, ModelConfig
from longlora.errors import LongLoraError
from longlora.model.adapters import add_adapter
from longlora.model.build import load_config, load_model, load_tokenizer, tokenizer_hash, weights_fingerprint
from longlora.model.merge import merge_adapter
from longlora.model.rope import current_context, rescale_rope
from longlora.model.sidecar import Sidecar, write_sidecar


def check_merge(model: ModelConfig) -> CheckResult:
    """Give every trained weight of a fresh adapter a random value, save it, and merge it with all of merge's checks.

    Works in a temporary folder; needs twice the model's size in float32 in memory and once on disk.
    """
    name = "adapter, merged and reloaded model agree and differ from the base"
    try:
        with tempfile.TemporaryDirectory(prefix="longlora-check-") as folder:
            adapter = Path(folder) / "adapter"
            _random_adapter(model, adapter)
            check = merge_adapter(adapter, Path(folder) / "merged")
    except LongLoraError as error:
        return CheckResult(name, False, str(error))
    return CheckResult(
        name,
        True,
        f"largest difference of logits: merged {check.adapter_to_merged:.2g}, reloaded {check.merged_to_reloaded:.2g}; "
        f"KL to base {check.kl_training:.2g}",
    )


def _random_adapter(source: ModelConfig, folder: Path) -> None:
    config = load_config(source)
    context = source.original_context_length or current_context(config)
    extended, change = rescale_rope(config, 2 * context, "auto", source.original_context_length)
    base = load_model(source, extended, dtype=torch.float32)
    fingerprint = weights_fingerprint(base)
    model = add_adapter(base, AdapterConfig())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = 0.02 if parameter.abs().max() == 0 else 0.1 * parameter.std(unbiased=False)
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer_sha256 = tokenizer_hash(load_tokenizer(source))
    sidecar = Sidecar(
        base_model=source.name_or_path,
        base_revision=source.revision,
        dtype="float32",
        original_context_length=change.original_context_length,
        context_length=change.context_length,
        rope_parameters=extended.rope_parameters,
        attention=AttentionConfig().model_dump(),
        tokenizer_sha256=tokenizer_sha256,
        base_fingerprint=fingerprint,
    )
    write_sidecar(folder, sidecar)
    write_manifest(folder, schema=1, step=0)
