"""What was trained + base -> an ordinary Hugging Face model, verified, that any inference engine can serve.

Engines such as vLLM and llama.cpp refuse adapters that carry embeddings and norms, so the way to serve is the merge.
Its ``config.json`` carries the new context and RoPE; nothing of longlora is needed to load it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longlora.artifacts import RunFolder, lock_output, new_folder, verify_manifest, write_manifest
from longlora.config import ModelConfig
from longlora.errors import ModelError, RunFolderError
from longlora.model.adapter_files import require_own_adapter
from longlora.model.adapters import load_adapter
from longlora.model.build import load_config, load_model, load_tokenizer, tokenizer_hash, weights_fingerprint
from longlora.model.end_tokens import end_answers, with_end
from longlora.model.serving import answer_end
from longlora.model.sidecar import Sidecar, read_sidecar, write_sidecar
from longlora.model.trainable import TrainedModel, base_of, copy_weights
from longlora.storage import require_free_space

_PROBE_TOKENS = 128
# Largest difference of float32 logits, as a part of their spread, that merging by addition may cause.
_FLOAT32_TOLERANCE = 1e-3
# Rounding merged weights to 16 bits may cost at most what training changed, as KL divergence: beyond that the file
# would hold noise instead of training. Short training changes weights by less than a unit of their last place, so that
# the part is not small (docs/log.md); it is printed, and the report measures the rounded model.
_ROUNDING_TOLERANCE = 1.0


@dataclass(frozen=True)
class MergeCheck:
    """What was measured on a probe of 128 tokens, in float32 arithmetic. KL divergences in nats per token."""

    adapter_to_merged: float
    """Largest difference of logits between adapter and merged float32 weights; 0 where there is no adapter."""
    merged_to_reloaded: float
    """Largest difference of logits between the rounded weights in memory and read back; 0 if the files are right."""
    kl_rounding: float
    """KL(trained || reloaded): what rounding to the saved data type costs."""
    kl_training: float
    """KL(trained || base with rescaled RoPE): what training changed; a merge that did nothing would show here."""

    def summary(self) -> str:
        """One line for a person."""
        return (
            f"logits differ by at most {self.adapter_to_merged:.1e} from the trained ones in float32 and by "
            f"{self.merged_to_reloaded:.1e} after reading back; rounding to the saved type costs KL "
            f"{self.kl_rounding:.1e}, training changed {self.kl_training:.1e}"
        )


def merge_adapter(adapter: Path, output: Path) -> MergeCheck:
    """Merge the adapter folder into `output`, a folder that must not exist, and verify what was written.

    Needs the base model's weights in float32 in memory.

    Raises:
        ModelError: the merged model does not compute what the adapter does, or the adapter changes nothing.
        RunFolderError: `output` exists or does not fit on the disk, or the adapter folder is damaged.
    """
    sidecar = _verified_sidecar(adapter)
    with lock_output(output, "longlora merge"), new_folder(output) as folder:
        return _write_checked(sidecar, lambda base: load_adapter(base, str(adapter)), folder)


def write_whole_model(weights: dict[str, Tensor], sidecar: Sidecar, output: Path, *, step: int) -> MergeCheck:
    """Write a fully fine-tuned model into `output`, a folder that must not exist, verified like a merged one.

    The sidecar and a manifest lie beside the model: they make it what a run trained (`RunFolder.trained`).

    Args:
        weights: what `trained_weights` gives; they and the base model's are in memory in float32 at one time.

    Raises:
        ModelError: the files do not compute what `weights` do, or training changed nothing.
        RunFolderError: `output` exists.
    """

    def with_weights(base: PreTrainedModel) -> PreTrainedModel:
        copy_weights(base, weights, "the trained model")
        return base

    with new_folder(output) as folder:
        check = _write_checked(sidecar, with_weights, folder)
        write_sidecar(folder, sidecar)
        write_manifest(folder, schema=1, step=step)
    return check


def merge_run(run: RunFolder, method: str) -> str:
    """Make merged/ out of what `run` trained by `method` (of `AdapterConfig`), and return what there is to say of it.

    Raises:
        LongLoraError: as of `merge_adapter` and `already_whole`.
    """
    if method == "full":
        return already_whole(run.merged)
    return f"merged: {run.merged}, verified: {merge_adapter(run.adapter, run.merged).summary()}"


def already_whole(folder: Path) -> str:
    """What there is to say of merging a fully fine-tuned run, whose merged/ is `folder`.

    Raises:
        RunFolderError: there is no model yet, or it is damaged.
    """
    if not folder.is_dir():
        raise RunFolderError(
            f"{folder} does not exist: the run is fully fine-tuned, so that `longlora train` or `resume` writes it"
        )
    verify_manifest(folder, "the model is damaged; remove it and `longlora resume`, or train again")
    return (
        f"nothing to merge: the run was fully fine-tuned, {folder} is the whole model already, and its files are whole"
    )


def _write_checked(sidecar: Sidecar, train: Callable[[PreTrainedModel], TrainedModel], folder: Path) -> MergeCheck:
    """Write the base model with what was trained into `folder`, and compare it with what `train` makes of the base.

    Args:
        train: puts what was trained on the base model or into it.
    """
    source = _source(sidecar)
    tokenizer = tokenizer_of(sidecar)
    base = _base_in_float32(source, sidecar)
    width = getattr(torch, sidecar.dtype).itemsize
    require_free_space(folder.parent, width * sum(p.numel() for p in base.parameters()), "the merged model")
    probe = _probe(base)
    base_logits = _logits(base, probe)
    trained = train(base)
    trained_logits = _logits(base_of(trained), probe)
    merged = _merged(trained)
    merged_logits = _logits(merged, probe)
    _require_close(trained_logits, merged_logits)

    _round_weights(merged, getattr(torch, sidecar.dtype))
    merged.save_pretrained(folder)
    if sidecar.chat_template is not None:
        end_answers(folder, answer_end(tokenizer))
    tokenizer.model_max_length = sidecar.context_length
    tokenizer.save_pretrained(folder)
    _round_weights(merged, torch.float32)
    rounded_logits = _logits(merged, probe)
    del base, trained, merged
    gc.collect()
    reloaded = load_model(ModelConfig(name_or_path=str(folder)), dtype=torch.float32)
    _require_self_describing(reloaded, sidecar)
    reloaded_logits = _logits(reloaded, probe)
    check = MergeCheck(
        adapter_to_merged=_difference(trained_logits, merged_logits),
        merged_to_reloaded=_difference(rounded_logits, reloaded_logits),
        kl_rounding=_kl(trained_logits, reloaded_logits),
        kl_training=_kl(trained_logits, base_logits),
    )
    _require_sound(check)
    return check


def merged_model(adapter: Path) -> PreTrainedModel:
    """The merge in memory, in the data type of the run, full attention, evaluation mode."""
    sidecar = _verified_sidecar(adapter)
    source, tokenizer = _source(sidecar), tokenizer_of(sidecar)
    base = _base_in_float32(source, sidecar)
    merged = _merged(load_adapter(base, str(adapter)))
    _round_weights(merged, getattr(torch, sidecar.dtype))
    ends = merged.generation_config.eos_token_id
    if sidecar.chat_template is not None and (more := with_end(ends, answer_end(tokenizer))):
        merged.generation_config.eos_token_id = more
    return merged.eval()


def tokenizer_of(sidecar: Sidecar) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with the chat template that instructions were trained in.

    Raises:
        ModelError: it cannot be read, or changed since training.
    """
    source = _source(sidecar)
    tokenizer = load_tokenizer(source)
    if (found := tokenizer_hash(tokenizer)) != sidecar.tokenizer_sha256:
        raise ModelError(
            f"the tokenizer of {source.name_or_path} changed since training ({found[:12]}, was "
            f"{sidecar.tokenizer_sha256[:12]}): restore the base model"
        )
    tokenizer.chat_template = sidecar.chat_template or tokenizer.chat_template
    return tokenizer


def _round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the weights alone: `model.to(dtype)` would round the frequencies of RoPE as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _verified_sidecar(adapter: Path) -> Sidecar:
    if not adapter.is_dir():
        raise RunFolderError(f"adapter folder {adapter} does not exist: run `longlora train` first")
    verify_manifest(adapter, "the adapter folder is damaged; train again or restore it")
    require_own_adapter(adapter)
    return read_sidecar(adapter)


def _source(sidecar: Sidecar) -> ModelConfig:
    return ModelConfig(name_or_path=sidecar.base_model, revision=sidecar.base_revision)


def _base_in_float32(source: ModelConfig, sidecar: Sidecar) -> PreTrainedModel:
    base = load_model(source, sidecar.apply(load_config(source)), dtype=torch.float32)
    if weights_fingerprint(base) != sidecar.base_fingerprint:
        raise ModelError(f"the weights of {source.name_or_path} changed since training: restore the base model")
    return base


def _merged(trained: TrainedModel) -> PreTrainedModel:
    if not isinstance(trained, PeftModel):
        return trained
    model: PreTrainedModel = trained.merge_and_unload()
    if getattr(model, "peft_config", None) is not None:
        del model.peft_config
    return model


def _probe(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (1, _PROBE_TOKENS), generator=generator)


@torch.no_grad()
def _logits(model: PreTrainedModel, probe: Tensor) -> Tensor:
    return model.eval()(input_ids=probe, use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def _difference(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def _kl(one: Tensor, other: Tensor) -> float:
    p, q = one.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def _require_close(trained: Tensor, merged: Tensor) -> None:
    limit = _FLOAT32_TOLERANCE * (trained.max() - trained.min()).item()
    found = _difference(trained, merged)
    if not found <= limit:
        raise ModelError(f"merged logits differ from the adapter's by {found:.3g}, limit {limit:.3g}: not written")


def _require_self_describing(reloaded: PreTrainedModel, sidecar: Sidecar) -> None:
    config = reloaded.config
    if config.max_position_embeddings != sidecar.context_length or config.rope_parameters != sidecar.rope_parameters:
        raise ModelError(
            f"the saved config says {config.max_position_embeddings} tokens and {config.rope_parameters}, not "
            f"{sidecar.context_length} and {sidecar.rope_parameters}: not written"
        )


def _require_sound(check: MergeCheck) -> None:
    if check.kl_training <= 1e-9:
        raise ModelError("training does not change the base model's output: nothing was trained; not written")
    if check.merged_to_reloaded > 1e-4:
        raise ModelError(f"files read back differ by {check.merged_to_reloaded:.3g} in their logits: not written")
    limit = max(_ROUNDING_TOLERANCE * check.kl_training, 1e-4)
    if check.kl_rounding > limit:
        raise ModelError(
            f"rounding the merged weights costs KL {check.kl_rounding:.3g}, limit {limit:.3g} (training changed "
            f"{check.kl_training:.3g}): set model.dtype=float32 and train again"
        )
