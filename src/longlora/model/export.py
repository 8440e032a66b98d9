"""A run as a folder that others can load: the merged model, its tokenizer, a model card, and GGUF on demand.

In: a `RunFolder` after training. Out: a folder that was read back and agrees with what the run's sidecar says.
Read `read_back.py` for what is compared, `card.py` for what the card tells.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import longlora
from longlora.artifacts import RunFolder, lock_output, new_folder, read_json, write_manifest
from longlora.config import ModelConfig, Recipe
from longlora.errors import ModelError, RunFolderError
from longlora.model.build import load_tokenizer
from longlora.model.card import TrainingFacts, model_card
from longlora.model.card_facts import CARD, read_card_facts
from longlora.model.end_tokens import end_answers
from longlora.model.gguf_export import Converter, GgufFacts, write_gguf
from longlora.model.merge import already_whole, merge_adapter
from longlora.model.read_back import ReadBack, read_back
from longlora.model.serving import answer_end, command_lines, modelfile
from longlora.model.sidecar import Sidecar, read_sidecar
from longlora.storage import require_free_space

MODELFILE, _CONFIG, _GENERATION = "Modelfile", "config.json", "generation_config.json"
# What an ordinary model folder holds; anything else that lies in merged/ is left behind.
_MODEL_FILES = (
    _CONFIG,
    _GENERATION,
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
    "additional_chat_templates",
)
# Names under which configs and tokenizers remember where they were read.
_ORIGINS = ("_name_or_path", "_model_name_or_path", "name_or_path")


@dataclass(frozen=True)
class Exported:
    """What was written: facts of the model and of the GGUF file as read back, and engine -> command line."""

    folder: Path
    model: ReadBack
    gguf: GgufFacts | None
    commands: Mapping[str, str]


def export_run(
    run: RunFolder,
    recipe: Recipe,
    output: Path,
    *,
    training: TrainingFacts | None = None,
    evaluation: str | None = None,
    legacy_rope: bool = True,
    converter: Converter | None = None,
) -> Exported:
    """Write the merged model of `run` into `output`, a folder that must not exist, and read it back.

    Args:
        training: steps and cost for the card.
        evaluation: Markdown for the card.
        legacy_rope: also write RoPE under the names that readers before transformers 5 look for.
        converter: makes a GGUF file in the same folder as well; none if None.

    Raises:
        ModelError: the model cannot be merged, or what was written is not what the run trained; nothing is kept.
        RunFolderError: `output` exists, does not fit on the disk or is a folder that the run writes, or the run has no
            adapter or a damaged merged/.
    """
    _require_own_place(run, output)
    if recipe.adapter.method == "full":
        already_whole(run.merged)
    sidecar = read_sidecar(run.trained)
    name, length = output.resolve().name, sidecar.context_length
    gguf_name = f"{name}-{converter.kind}.gguf" if converter else None
    with lock_output(output, "longlora export"), new_folder(output) as folder:
        _require_room(run, folder, converter)
        _take_model(run, folder)
        _rewrite_configs(folder, legacy_rope=legacy_rope)
        model = read_back(folder, sidecar)
        tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder)))
        if sidecar.chat_template is not None:
            end_answers(folder, answer_end(tokenizer))
        facts = read_card_facts(
            run,
            recipe,
            sidecar,
            model,
            tokenizer,
            name=name,
            legacy_rope=legacy_rope,
            commands=command_lines(".", length, name, gguf_name),
            training=training,
            evaluation=evaluation,
        )
        (folder / CARD).write_text(model_card(facts), encoding="utf-8")
        gguf = None
        if converter and gguf_name:
            gguf = write_gguf(converter, folder, folder / gguf_name, name, sidecar, model)
            (folder / MODELFILE).write_text(modelfile(gguf_name, length, tokenizer), encoding="utf-8")
        _require_no_paths(folder, _private(run, sidecar))
        write_manifest(folder, schema=1, longlora=longlora.__version__)
    return Exported(output, model, gguf, command_lines(str(output), length, name, gguf_name))


def _require_own_place(run: RunFolder, output: Path) -> None:
    place = output.resolve()
    for own in (run.merged, run.adapter, run.checkpoints, run.train_shard.parent, run.evaluation("base").parent):
        if place.is_relative_to(own.resolve()):
            raise RunFolderError(f"output folder {output} is where the run keeps {own.name}/: name another one")


def _require_room(run: RunFolder, folder: Path, converter: Converter | None) -> None:
    """The weights, and those of a GGUF file, at least a quarter of them; a merge made now asks for itself."""
    weights = sum(path.stat().st_size for path in run.merged.glob("*.safetensors"))
    gguf = 0 if converter is None else weights // (4 if converter.kind == "q8_0" else 2)
    require_free_space(folder.parent, weights + gguf, "the exported model")


def _take_model(run: RunFolder, folder: Path) -> None:
    """The files of merged/, or of a merge made now."""
    if run.merged.is_dir():
        source = run.merged
    else:
        source = folder / "merging"
        merge_adapter(run.adapter, source)
    for pattern in _MODEL_FILES:
        for path in sorted(source.glob(pattern)):
            if source == run.merged:
                (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / path.name)
            else:
                moved = path.replace(folder / path.name)
                moved.chmod(0o755 if moved.is_dir() else 0o644)
    if source != run.merged:
        shutil.rmtree(source)
    if not (folder / _CONFIG).exists() or not list(folder.glob("*.safetensors")):
        raise RunFolderError(f"{run.merged} holds no model: remove it and run `longlora merge` again")


def _rewrite_configs(folder: Path, *, legacy_rope: bool) -> None:
    """Take out where files were read, and put RoPE under its older names beside the new one."""
    for path in folder.glob("*config.json"):
        values = read_json(path, "remove merged/ and run `longlora merge` again")
        if not isinstance(values, dict):
            raise RunFolderError(
                f"{path.name} of merged/ is no JSON object: remove merged/ and run `longlora merge` again"
            )
        values = {key: value for key, value in values.items() if key not in _ORIGINS}
        if legacy_rope and path.name == _CONFIG:
            values |= legacy_rope_keys(values)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def legacy_rope_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` for the ``rope_parameters`` of a config file.

    Empty where a model has a set for each layer type: the older names hold one set only.
    """
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return {}
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    keys: dict[str, Any] = {"rope_theta": parameters["rope_theta"]}
    keys["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if "partial_rotary_factor" in parameters:
        keys["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    return keys


def _private(run: RunFolder, sidecar: Sidecar) -> list[str]:
    """Beginnings of paths of this machine, which must not be in what is given away."""
    base = [sidecar.base_model] if Path(sidecar.base_model).is_absolute() else []
    return [*base, str(run.root.resolve()), f"{Path.home()}/"]


def _require_no_paths(folder: Path, private: list[str]) -> None:
    for path in (folder / CARD, folder / MODELFILE, *folder.glob("*config.json"), *folder.glob("*.jinja")):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for place in private:
            if place in text:
                raise ModelError(f"{path.name} would give away the path {place}: take it out of the run's files")
