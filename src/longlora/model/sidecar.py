"""``longlora.json`` beside what was trained: what must be known before the base model is loaded under an adapter.

An adapter alone is not enough: with the old RoPE it is read on the wrong model, silently. The sidecar holds RoPE,
context, S2-Attn settings, the base model and the tokenizer it was trained with. A fully fine-tuned model has one too,
for what its own config does not tell.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from longlora.artifacts import SIDECAR, read_json, write_json
from longlora.config import Recipe
from longlora.errors import RunFolderError
from longlora.model.rope import RopeChange

_SCHEMA = 1


@dataclass(frozen=True)
class Sidecar:
    """Everything in ``longlora.json``; lengths in tokens."""

    base_model: str
    base_revision: str | None
    dtype: str
    original_context_length: int
    context_length: int
    rope_parameters: dict[str, Any]
    attention: dict[str, Any]
    tokenizer_sha256: str
    base_fingerprint: str
    """`weights_fingerprint` of the base model."""
    chat_template: str | None = None
    """The template of the instructions it was trained on; None for texts, and the base model's own stays in use."""
    schema: int = field(default=_SCHEMA)

    @staticmethod
    def of(
        recipe: Recipe,
        change: RopeChange,
        config: PreTrainedConfig,
        tokenizer_sha256: str,
        base_fingerprint: str,
        chat_template: str | None = None,
    ) -> Sidecar:
        """The sidecar of a run; a local base model is named by its absolute path."""
        local = Path(recipe.model.name_or_path)
        return Sidecar(
            base_model=str(local.resolve()) if local.exists() else recipe.model.name_or_path,
            base_revision=recipe.model.revision,
            dtype=recipe.model.dtype,
            original_context_length=change.original_context_length,
            context_length=change.context_length,
            rope_parameters=config.rope_parameters,
            attention=recipe.attention.model_dump(),
            tokenizer_sha256=tokenizer_sha256,
            base_fingerprint=base_fingerprint,
            chat_template=chat_template,
        )

    def apply(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A copy of the base model's `config` with the RoPE and context the adapter was trained for."""
        extended = copy.deepcopy(config)
        extended.rope_parameters = copy.deepcopy(self.rope_parameters)
        extended.max_position_embeddings = self.context_length
        return extended


def write_sidecar(folder: Path, sidecar: Sidecar) -> None:
    """Write ``longlora.json`` into the folder of what was trained."""
    write_json(folder / SIDECAR, asdict(sidecar))


def read_sidecar(folder: Path) -> Sidecar:
    """The sidecar of what was trained: an adapter folder, or merged/ of a fully fine-tuned run.

    Raises:
        RunFolderError: it is missing, damaged, or of a schema this version does not know.
    """
    values = read_json(folder / SIDECAR, "this is no adapter folder of longlora; train again or restore it")
    if not isinstance(values, dict) or values.get("schema") != _SCHEMA:
        raise RunFolderError(f"{folder / SIDECAR} has no schema {_SCHEMA}: it was written by another version")
    try:
        return Sidecar(**values)
    except TypeError as error:
        raise RunFolderError(f"{folder / SIDECAR} is damaged ({error}): train again or restore it") from None
