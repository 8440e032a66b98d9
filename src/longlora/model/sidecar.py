"""``longlora.json`` beside what was trained: what must be known before the base model is loaded under an adapter.

An adapter alone is not enough: with the old RoPE it is read on the wrong model, silently. The sidecar holds RoPE,
context, S2-Attn settings, the base model and the tokenizer it was trained with. A fully fine-tuned model has one too,
for what its own config does not tell.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from transformers import PreTrainedConfig

from longlora.artifacts import SIDECAR, read_json, write_json
from longlora.config import AttentionConfig, Recipe
from longlora.errors import RunFolderError
from longlora.model.rope import RopeChange, with_rope
from longlora.storage import without_home

_SCHEMA = 1
_REMEDY = "train again or restore it"
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Tokens = Annotated[int, Field(gt=0, lt=2**40, strict=True)]


@dataclass(frozen=True)
class Sidecar:
    """Everything in ``longlora.json``; lengths in tokens."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    base_model: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
    """A hub id, or the absolute path of a local folder; in the file the home folder is ``~``."""
    base_revision: str | None
    dtype: Literal["bfloat16", "float32"]
    original_context_length: _Tokens
    context_length: _Tokens
    rope_parameters: dict[str, Any]
    attention: dict[str, Any]
    tokenizer_sha256: _Hash
    base_fingerprint: _Hash
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
        return with_rope(config, self.rope_parameters, self.context_length)


def write_sidecar(folder: Path, sidecar: Sidecar) -> None:
    """Write ``longlora.json`` into the folder of what was trained."""
    write_json(folder / SIDECAR, asdict(sidecar) | {"base_model": without_home(sidecar.base_model)})


def read_sidecar(folder: Path) -> Sidecar:
    """The sidecar of what was trained: an adapter folder, or merged/ of a fully fine-tuned run.

    Raises:
        RunFolderError: it is missing, damaged, or of a schema this version does not know; or its base model is a path
            that longlora does not write.
    """
    path = folder / SIDECAR
    values = read_json(path, "this is no adapter folder of longlora; train again or restore it")
    if not isinstance(values, dict) or values.get("schema") != _SCHEMA:
        raise RunFolderError(f"{path} has no schema {_SCHEMA}: it was written by another version")
    try:
        sidecar: Sidecar = TypeAdapter(Sidecar).validate_python(values)
        AttentionConfig.model_validate(sidecar.attention)
    except (ValidationError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged ({_first(error)}): {_REMEDY}") from None
    if not _is_plain(sidecar.rope_parameters):
        raise RunFolderError(f"{path} is damaged (rope_parameters hold other than numbers and names): {_REMEDY}")
    base = Path(sidecar.base_model)
    if ".." in base.parts:
        raise RunFolderError(f"{path} names base_model {sidecar.base_model!r:.100}, which leads upwards: {_REMEDY}")
    home = f"{Path.home()}{sidecar.base_model[1:]}" if sidecar.base_model.startswith("~/") else sidecar.base_model
    return replace(sidecar, base_model=home)


def _first(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep"
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))[:100]}: {first['msg']}"


def _is_plain(parameters: dict[str, Any], nested: bool = True) -> bool:
    """Names and finite numbers, also for each layer type, or lists of numbers, as the types of RoPE have them."""
    return all(
        value is None
        or isinstance(value, str)
        or _is_number(value)
        or (isinstance(value, list) and all(map(_is_number, value)))
        or (nested and isinstance(value, dict) and _is_plain(value, nested=False))
        for value in parameters.values()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e30
