"""What the model card tells, gathered from the files of a run and from the base model, if that is at hand.

In: a `RunFolder` and what was exported of it. Out: `CardFacts`. No path of this machine gets into them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

import longlora
from longlora.artifacts import MANIFEST, RunFolder, read_json, sha256_file
from longlora.config import AttentionConfig, ModelConfig, Recipe
from longlora.config.plain_yaml import read_yaml
from longlora.errors import ModelError, RunFolderError
from longlora.model.build import load_config
from longlora.model.card import CardFacts, ShardFacts, TrainingFacts
from longlora.model.read_back import ReadBack
from longlora.model.serving import prompt_of
from longlora.model.sidecar import Sidecar

CARD = "README.md"
_LICENCE = ("license", "license_name", "license_link", "language")
_LEFT_OUT = ("too_short", "too_long", "empty", "undecodable", "control_tokens")
_HUB_CACHE = "models--"


def read_card_facts(
    run: RunFolder,
    recipe: Recipe,
    sidecar: Sidecar,
    model: ReadBack,
    tokenizer: Any,
    *,
    name: str,
    legacy_rope: bool,
    commands: Mapping[str, str],
    training: TrainingFacts | None,
    evaluation: str | None,
) -> CardFacts:
    """Everything a card tells of the model called `name`; commands are as from its own folder.

    Raises:
        RunFolderError: a shard's manifest is damaged.
    """
    shards = {"training": run.train_shard, "held out": run.heldout_shard}
    attention = AttentionConfig(**sidecar.attention)
    return CardFacts(
        name=name,
        base_model=shown(sidecar.base_model),
        front=_front_matter(sidecar),
        sidecar=sidecar,
        attention=attention,
        recipe=recipe,
        rope_before=_rope_before(sidecar),
        legacy_rope=legacy_rope,
        prompt=prompt_of(tokenizer),
        tensors=model.tensors,
        parameters=model.parameters,
        shards={label: _shard(path) for label, path in shards.items() if (path / MANIFEST).exists()},
        training=training,
        evaluation=evaluation,
        commands=commands,
        version=longlora.__version__,
    )


def shown(model: str) -> str:
    """A hub id as it is, also out of the hub's cache; of any other local folder only its name."""
    if not Path(model).is_absolute():
        return model
    cached = next((part for part in Path(model).parts if part.startswith(_HUB_CACHE)), None)
    return cached.removeprefix(_HUB_CACHE).replace("--", "/") if cached else Path(model).name


def _rope_before(sidecar: Sidecar) -> dict[str, Any] | None:
    try:
        config = load_config(ModelConfig(name_or_path=sidecar.base_model, revision=sidecar.base_revision))
    except ModelError:  # the base model is not at hand any more; the export does not need it
        return None
    return getattr(config, "rope_parameters", None)


def _front_matter(sidecar: Sidecar) -> dict[str, Any]:
    """Licence and language of the base model's card, where it lies on this machine; nothing is downloaded."""
    if Path(sidecar.base_model).is_absolute():
        card: Any = Path(sidecar.base_model) / CARD
    else:
        card = try_to_load_from_cache(sidecar.base_model, CARD, revision=sidecar.base_revision)
    try:
        text = Path(card).read_text(encoding="utf-8") if isinstance(card, str | Path) else ""
        values = read_yaml(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return {}
    return {key: values[key] for key in _LICENCE if key in values} if isinstance(values, dict) else {}


def _shard(path: Path) -> ShardFacts:
    remedy = "run `longlora prepare` again"
    values = read_json(path / MANIFEST, remedy)
    try:
        instruct = values.get("kind") == "instruct"
        names = [shown(str(name)) for name in values.get("names", ())]
        return ShardFacts(
            documents=int(values["documents"]),
            tokens=int(values["tokens"]),
            names=_sources(names) if instruct else tuple(names),
            manifest_sha256=sha256_file(path / MANIFEST),
            noun="examples" if instruct else "documents",
            shortened=int(values.get("shortened", {}).get("count", 0)),
            removed_tokens=int(values.get("removed_tokens", 0)),
            left_out=sum(int(values.get(reason, {}).get("count", 0)) for reason in _LEFT_OUT),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path / MANIFEST} is damaged ({error!r}): {remedy}") from None


def _sources(names: list[str]) -> tuple[str, ...]:
    """Examples are named ``file:line``; a reader wants to know the files."""
    files = Counter(name.rpartition(":")[0] or name for name in names)
    return tuple(f"{file} ({count:,})" for file, count in files.items())
