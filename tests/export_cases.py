"""Runs to export: a tiny model with a random adapter, and a stand-in for llama.cpp's converter."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from report_cases import evaluation, save
from tiny import save_tiny_model, stir

from longlora.artifacts import RunFolder, write_manifest
from longlora.config import AdapterConfig, AttentionConfig, ModelConfig, Recipe, build_recipe, dump_recipe
from longlora.model.adapters import add_adapter
from longlora.model.build import load_config, load_model, load_tokenizer, tokenizer_hash, weights_fingerprint
from longlora.model.rope import rescale_rope
from longlora.model.sidecar import Sidecar, write_sidecar

NAMES = [f"document-{number}" for number in range(25)]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def trained_run(
    root: Path, base: Path, *, rope_type: str = "yarn", dtype: str = "float32", rope_factor: float | None = 5.0
) -> tuple[RunFolder, Recipe]:
    """A run folder after training on `base`: 64 -> 256 tokens, every trained weight away from its start."""
    run = RunFolder(root)
    source = ModelConfig(name_or_path=str(base))
    config, change = rescale_rope(load_config(source), 256, rope_type, None, rope_factor)
    model = load_model(source, config, dtype=torch.float32)
    fingerprint = weights_fingerprint(model)
    wrapped = add_adapter(model, AdapterConfig())
    stir(wrapped, seed=0)
    wrapped.save_pretrained(str(run.adapter), save_embedding_layers=False)
    values = {
        "run_dir": str(root),
        "model": {"name_or_path": str(base), "dtype": dtype},
        "context": {"context_length": 256},
        "attention": {"group_size": 64, "sink_tokens": 2},
        "data": {"train": [str(base.parent / "private" / "texts")]},
        "train": {"steps": 7},
    }
    recipe = build_recipe(values, [])
    sidecar = Sidecar.of(recipe, change, config, tokenizer_hash(load_tokenizer(source)), fingerprint)
    assert AttentionConfig(**sidecar.attention).group_size == 64
    write_sidecar(run.adapter, sidecar)
    write_manifest(run.adapter, schema=1, step=7)
    run.recipe.write_text(dump_recipe(recipe), encoding="utf-8")
    run.train_shard.mkdir(parents=True)
    manifest = {"schema": 1, "documents": 25, "tokens": 12345, "names": NAMES}
    (run.train_shard / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    rows = [{"step": step, "loss": 4 - step / 10, "tokens": 256 * step, "seconds": 2.0 * step} for step in range(1, 8)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run, recipe


def measured(run: RunFolder) -> RunFolder:
    """`run` with made-up rows of all three variants."""
    return save(run, **{variant: evaluation(variant) for variant in ("base", "rope_only", "trained")})


def tiny_base(folder: Path, **changes: Any) -> Path:
    """A tiny model with a chat template and a licence."""
    save_tiny_model(folder, **changes)
    template = (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    card = "---\nlicense: apache-2.0\nlanguage: [en]\ndatasets: [secret]\n---\n# Base\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def converter_folder() -> Path | None:
    """llama.cpp's own converter: a folder named by LONGLORA_LLAMA_CPP, or one that .converter/ of the tree holds."""
    tree = Path(__file__).parent.parent / ".converter"
    for place in (os.environ.get("LONGLORA_LLAMA_CPP", ""), str(tree)):
        if place and (Path(place) / "convert_hf_to_gguf.py").is_file():
            return Path(place)
    return None


_STAND_IN = """
import argparse, json, pathlib, sys
import gguf, numpy
from safetensors import safe_open

parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
for name in ("--outtype", "--outfile", "--model-name"):
    parser.add_argument(name)
given = parser.parse_args()
planted = json.loads(PLANTED)
if "fail" in planted:
    print("INFO: working")
    sys.exit("NotImplementedError: " + planted["fail"])
config = json.loads((given.model / "config.json").read_text())
rope = config["rope_parameters"]
writer = gguf.GGUFWriter(given.outfile, "llama")
writer.add_name(given.model_name + " " + given.model.name)
writer.add_context_length(planted.get("context", config["max_position_embeddings"]))
writer.add_rope_freq_base(planted.get("base", rope["rope_theta"]))
kind = planted.get("type", rope["rope_type"])
if kind in ("linear", "yarn"):
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(planted.get("factor", rope.get("factor", 1.0)))
    writer.add_rope_scaling_orig_ctx_len(planted.get("original", rope.get("original_max_position_embeddings", 1)))
if "beta_fast" in planted:
    writer.add_rope_scaling_yarn_beta_fast(planted["beta_fast"])
if "template" in planted:
    writer.add_chat_template(planted["template"])
size = planted.get("vocabulary", config["vocab_size"])
writer.add_tokenizer_model("gpt2")
writer.add_token_list([str(number) for number in range(size)])
with safe_open(given.model / "model.safetensors", framework="np") as reader:
    for name in sorted(reader.keys())[planted.get("skip", 0):]:
        writer.add_tensor(name, numpy.zeros(reader.get_slice(name).get_shape(), numpy.float16))
if "frequencies" in planted:
    writer.add_tensor("rope_freqs.weight", numpy.array(planted["frequencies"], numpy.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def stand_in(folder: Path, **planted: Any) -> Path:
    """A folder with a script of the converter's name that writes what a right one would, but for what is `planted`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = _STAND_IN.replace("PLANTED", repr(json.dumps(planted)))
    (folder / "convert_hf_to_gguf.py").write_text(script, encoding="utf-8")
    return folder
