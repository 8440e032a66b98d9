"""The parts of the self-check that are about a recipe and about weights.

The switch to full attention at the end of training; train, save, reload, merge and read back must agree.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longlora.artifacts import write_manifest
from longlora.attention.check import CheckResult
from longlora.attention.probing import ProbeSettings, as_it_was, logits, tokens, tolerance, without_noise
from longlora.config import AdapterConfig, AttentionConfig, ModelConfig
from longlora.errors import LongLoraError
from longlora.model.adapters import add_adapter
from longlora.model.attention import apply_attention, s2_arguments
from longlora.model.build import load_config, load_model, load_tokenizer, tokenizer_hash, weights_fingerprint
from longlora.model.merge import merge_adapter
from longlora.model.rope import current_context, rescale_rope
from longlora.model.sidecar import Sidecar, write_sidecar


def probe_settings(attention: AttentionConfig, context_length: int) -> ProbeSettings:
    """The attention section of a recipe for the checks: its own settings, on groups of some tokens."""
    return ProbeSettings(**s2_arguments(attention, context_length)).scaled_down()


def check_full_phase(model: PreTrainedModel, attention: AttentionConfig, context_length: int) -> CheckResult:
    """Switch as training does: sparse, then full in every layer, and back, as a resumed run with more steps may."""
    name = "the final phase of training is full attention"
    small = probe_settings(attention, context_length).for_float32()
    changes = {"group_size": small.group_size, "group_size_ratio": None, "sink_tokens": small.sink_tokens}
    settings = attention.model_copy(update={**changes, "backend": small.backend})
    ids = tokens(model, 3 * small.group_size + 1)

    def trained(*, full: bool) -> Tensor:
        apply_attention(model, settings, context_length, full=full)
        return logits(model, ids)

    with as_it_was(model), without_noise(model):
        try:
            expected = logits(model.train(), ids)
            sparse, full, again = trained(full=False), trained(full=True), trained(full=False)
        except LongLoraError as error:
            return CheckResult(name, False, str(error))
    limit = tolerance(expected, model)
    off, back = (full - expected).abs().max().item(), (again - sparse).abs().max().item()
    return CheckResult(
        name,
        max(off, back) <= limit,
        f"after the switch it differs from full attention by {off:.2g}, after that back from sparse by {back:.2g}, "
        f"limit {limit:.2g}",
    )


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
