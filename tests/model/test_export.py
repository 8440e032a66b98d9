"""An export is the trained model, says so itself, gives nothing private away, and is refused when anything differs."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from export_cases import LLAMA3, NAMES, tiny_base, trained_run
from safetensors.torch import load_file, save_file
from tiny import llama_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from longlora.artifacts import RunFolder, verify_manifest
from longlora.config import Recipe
from longlora.errors import LongLoraError, ModelError, RunFolderError
from longlora.model.card import TrainingFacts
from longlora.model.card_facts import shown
from longlora.model.export import export_run, legacy_rope_keys
from longlora.model.merge import merge_adapter, merged_model
from longlora.model.rope import assert_rope_applied, expected_frequencies, rescale_rope

Run = tuple[RunFolder, Recipe]


@pytest.fixture(scope="module")
def merged_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A yarn run with merged/; tests copy what they damage."""
    place = tmp_path_factory.mktemp("home")
    run, recipe = trained_run(place / "run", tiny_base(place / "tiny-base"))
    merge_adapter(run.adapter, run.merged)
    return run, recipe


@pytest.fixture
def copied(merged_run: Run, tmp_path: Path) -> RunFolder:
    """The run with a merged/ of its own, which may be damaged."""
    shutil.copytree(merged_run[0].root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.mark.parametrize(
    ("rope_type", "tied", "dtype"),
    [
        ("yarn", True, "float32"),
        ("linear", False, "bfloat16"),
        ("theta", True, "bfloat16"),
        ("llama3", False, "float32"),
    ],
)
def test_the_export_computes_what_was_trained(tmp_path: Path, rope_type: str, tied: bool, dtype: str) -> None:
    changes: dict[str, Any] = {"tie_word_embeddings": tied}
    if rope_type == "llama3":
        changes["rope_parameters"] = dict(LLAMA3)
    base = tiny_base(tmp_path / "base", **changes)
    run, recipe = trained_run(
        tmp_path / "run", base, rope_type="auto" if rope_type == "llama3" else rope_type, dtype=dtype
    )
    exported = export_run(run, recipe, tmp_path / "out")
    assert not run.merged.exists()

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert_rope_applied(model, model.config)
    assert model.dtype == getattr(torch, dtype)
    assert model.config.max_position_embeddings == 256
    ids = torch.randint(128, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, merged_model(run.adapter)(ids).logits)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.model.tensors == len(stored) == (20 if tied else 21)
    assert exported.model.parameters == sum(tensor.numel() for tensor in stored.values())
    assert exported.model.tied == tied
    assert exported.model.dtype == dtype
    verify_manifest(tmp_path / "out", "")
    assert {"rope_parameters", "rope_theta", "rope_scaling"} <= set(
        json.loads((tmp_path / "out/config.json").read_text())
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 256
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("rope_type", ["yarn", "linear", "theta", "llama3"])
def test_older_names_of_rope_give_the_same_frequencies(tmp_path: Path, rope_type: str) -> None:
    changes = {"rope_parameters": dict(LLAMA3)} if rope_type == "llama3" else {}
    config, _ = rescale_rope(llama_config(**changes), 256, "auto" if rope_type == "llama3" else rope_type, None, 5.0)
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    older = legacy_rope_keys(values)
    assert older["rope_theta"] == values["rope_parameters"]["rope_theta"]
    if rope_type == "theta":
        assert older["rope_scaling"] is None
        assert older["rope_theta"] > 10000.0
    else:
        assert older["rope_scaling"]["rope_type"] == rope_type
        assert "rope_theta" not in older["rope_scaling"]
    frequencies, scaling = expected_frequencies(config)
    # Readers that know both names, the older ones only, and the new one only, all see the same model.
    without = {key: value for key, value in values.items() if key != "rope_parameters"}
    for held in (values | older, without | older, values):
        path.write_text(json.dumps(held))
        read = AutoConfig.from_pretrained(tmp_path)
        found, found_scaling = expected_frequencies(read)
        assert torch.equal(found, frequencies)
        assert found_scaling == scaling
        assert read.rope_parameters == config.rope_parameters
        assert read.max_position_embeddings == 256


def test_older_names_can_be_left_out_and_are_left_out_for_nested_sets(merged_run: Run, tmp_path: Path) -> None:
    export_run(*merged_run, tmp_path / "out", legacy_rope=False)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "rope_parameters" in values
    assert not {"rope_scaling", "rope_theta"} & set(values)
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1.0}, "sliding_attention": {"rope_theta": 1.0}}
    assert legacy_rope_keys({"rope_parameters": nested}) == {}
    partial = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0, "partial_rotary_factor": 0.5}
    assert legacy_rope_keys({"rope_parameters": partial}) == {
        "rope_theta": 5.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "partial_rotary_factor": 0.5,
    }


def test_the_card_tells_what_was_done_and_nothing_private(merged_run: Run, tmp_path: Path) -> None:
    run, recipe = merged_run
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    table = "| measure | trained |\n| --- | ---: |\n| loss | 1.234 |"
    training = TrainingFacts(7, 3.9, 3.3, 1792.0, 14.0)
    export_run(run, recipe, tmp_path / "My model", training=training, evaluation=table)
    assert before == {path: path.stat().st_mtime_ns for path in run.root.rglob("*")}
    card = (tmp_path / "My model" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "tiny-base"
    assert front["license"] == "apache-2.0"
    assert front["language"] == ["en"]
    assert "datasets" not in front
    assert front["library_name"] == "transformers"
    assert "longlora" in front["tags"]
    for told in (
        "# My model",
        "from 64 to 256 tokens",
        "groups of 64 tokens",
        "| sink tokens | 2 |",
        "| LoRA rank, alpha, dropout | 8, 16, 0 |",
        "| RoPE | rope_type default, rope_theta 10000.0 | rope_type yarn, factor 5.0,",
        "| steps | 7 |",
        "| tokens read | 1,792 |",
        "| time | 14 s (0.00 h) |",
        "| training | 25 | 12,345 | 0 | 0 |",
        f"{', '.join(NAMES[:20])} and 5 more",
        table,
        "--max-model-len 256",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert told in card
    for path in (tmp_path / "My model").iterdir():
        if path.suffix in (".md", ".json", ".jinja"):
            text = path.read_text(encoding="utf-8")
            assert str(run.root.parent) not in text
            assert str(tmp_path) not in text
            assert str(Path.home()) + "/" not in text


def test_a_run_without_log_shards_base_and_measurements_is_told_as_such(copied: RunFolder, merged_run: Run) -> None:
    shutil.rmtree(copied.root / "data")
    sidecar = json.loads((copied.adapter / "longlora.json").read_text())
    sidecar["base_model"] = "/nowhere/of/somebody/gone-model"
    (copied.adapter / "longlora.json").write_text(json.dumps(sidecar))
    export_run(copied, merged_run[1], copied.root / "out")
    card = (copied.root / "out" / "README.md").read_text()
    assert "base_model: gone-model" in card
    assert "somebody" not in card
    assert "| RoPE | not known |" in card
    assert "This model was not measured." in card
    assert "the data is not named here" in card
    assert "license" not in card


def test_a_path_in_the_run_s_files_is_not_given_away(copied: RunFolder, merged_run: Run) -> None:
    config = json.loads((copied.merged / "config.json").read_text())
    # Where a config was read from is dropped.
    (copied.merged / "config.json").write_text(json.dumps(config | {"_name_or_path": str(copied.root)}))
    export_run(copied, merged_run[1], copied.root / "out")
    (copied.merged / "config.json").write_text(json.dumps(config | {"note": str(copied.root)}))
    with pytest.raises(ModelError, match="config.json would give away the path"):
        export_run(copied, merged_run[1], copied.root / "again")
    assert not (copied.root / "again").exists()


def test_a_run_on_instructions_tells_its_format_and_ends_answers(copied: RunFolder, merged_run: Run) -> None:
    sidecar = json.loads((copied.adapter / "longlora.json").read_text())
    template = (copied.merged / "chat_template.jinja").read_text()
    (copied.adapter / "longlora.json").write_text(json.dumps(sidecar | {"chat_template": template}))
    facts = {"kind": "instruct", "documents": 3, "tokens": 90, "names": ["/home/me/a.json:1", "b.jsonl:1", "b.jsonl:2"]}
    facts |= {"shortened": {"count": 2}, "removed_tokens": 40, "too_long": {"count": 1}}
    (copied.train_shard / "manifest.json").write_text(json.dumps(facts))
    data = merged_run[1].data.model_copy(update={"kind": "instruct"})
    recipe = merged_run[1].model_copy(update={"data": data})
    export_run(copied, recipe, copied.root / "out")
    card = (copied.root / "out" / "README.md").read_text()
    for told in (
        "fine-tuned on instructions",
        "| prompt format | the base model's own chat template |",
        "| training | 3 | 90 | 2, by 40 tokens together | 1 |",
        "Examples of training: a.json (1), b.jsonl (2).",
        "<|im_start|>user\nYour question",
    ):
        assert told in card
    assert "/home/me" not in card


def test_a_full_disk_and_a_place_of_the_run_leave_nothing(
    copied: RunFolder, merged_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    for own in (copied.merged / "in", copied.adapter, copied.checkpoints, copied.root / "data", copied.root / "eval"):
        with pytest.raises(RunFolderError, match="is where the run keeps"):
            export_run(copied, merged_run[1], own)
    monkeypatch.setattr(shutil, "copyfile", full)
    before = sorted(copied.root.rglob("*"))
    with pytest.raises(RunFolderError, match="No space left"):
        export_run(copied, merged_run[1], copied.root / "out")
    assert sorted(copied.root.rglob("*")) == before


def test_a_local_copy_out_of_the_hub_s_cache_keeps_its_id() -> None:
    assert shown("/home/me/.cache/hub/models--org--some-model/snapshots/abc") == "org/some-model"
    assert shown("/home/me/models/mine") == "mine"
    assert shown("org/name") == "org/name"


def test_shards_stay_shards_and_other_files_stay_behind(copied: RunFolder, merged_run: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(copied.merged)
    (copied.merged / "model.safetensors").unlink()
    model.save_pretrained(copied.merged, max_shard_size="50KB")
    (copied.merged / "notes.txt").write_text("mine")
    (copied.merged / "pytorch_model.bin").write_bytes(b"pickle")
    exported = export_run(copied, merged_run[1], copied.root / "out")
    files = {path.name for path in (copied.root / "out").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    assert exported.model.tensors == 20
    assert not {"notes.txt", "pytorch_model.bin"} & files
    next((copied.merged).glob("*-of-*.safetensors")).unlink()
    with pytest.raises(RunFolderError, match="is missing"):
        export_run(copied, merged_run[1], copied.root / "again")


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(merged: Path) -> None:
        path = merged / "config.json"
        values = json.loads(path.read_text())
        for key, value in changes.items():
            if isinstance(value, dict):
                values[key] = values[key] | value
            else:
                values[key] = value
        path.write_text(json.dumps(values))

    return change


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(merged: Path) -> None:
        stored = load_file(merged / "model.safetensors")
        change(stored)
        save_file(stored, merged / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def _cut(merged: Path) -> None:
    data = (merged / "model.safetensors").read_bytes()
    (merged / "model.safetensors").write_bytes(data[:-100])


def _other_tokenizer(merged: Path) -> None:
    path = merged / "tokenizer.json"
    values = json.loads(path.read_text())
    words = values["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(values))


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_config(rope_parameters={"factor": 4.0}), "RoPE .*'factor': 4.0"),
        (_config(rope_parameters={"rope_type": "linear"}), "RoPE .*linear"),
        (_config(rope_parameters={"rope_theta": 500.0}), "RoPE .*'rope_theta': 500.0"),
        (_config(max_position_embeddings=128), "context 128 tokens, trained for 256"),
        (_config(head_dim=16), "8 tensors mismatched, such as .*k_proj"),
        (_config(dtype="bfloat16"), "config says bfloat16"),
        (_config(tie_word_embeddings=False), "1 tensors missing, such as lm_head.weight"),
        (_config(num_hidden_layers=3), "9 tensors missing"),
        (_weights(lambda stored: stored.pop(UP)), f"1 tensors missing, such as {UP}"),
        (_weights(lambda stored: stored.update(junk=torch.ones(1))), "1 tensors unexpected, such as junk"),
        (
            _weights(lambda stored: stored.update({"lm_head.weight": torch.ones(128, 72)})),
            "tied, and the files hold lm_head",
        ),
        (_weights(lambda stored: stored[NORM].fill_(torch.nan)), f"{NORM} .* no numbers"),
        (_weights(lambda stored: stored.update({k: v.bfloat16() for k, v in stored.items()})), "weights in bfloat16"),
        (_cut, "model.safetensors of the merged model is damaged"),
        (lambda merged: (merged / "model.safetensors").unlink(), "holds no model"),
        (lambda merged: (merged / "config.json").write_text("{"), "config.json cannot be read"),
        (_other_tokenizer, "tokenizer .*, trained with"),
    ],
)
def test_a_damaged_merged_model_is_refused_in_one_line(
    copied: RunFolder, merged_run: Run, damage: Callable[[Path], None], message: str
) -> None:
    damage(copied.merged)
    with pytest.raises(LongLoraError, match=message) as caught:
        export_run(copied, merged_run[1], copied.root / "out")
    assert "\n" not in str(caught.value)
    assert "longlora merge" in str(caught.value)
    assert {path.name for path in copied.root.iterdir()} >= {"merged", "adapter"}
    assert not [path for path in copied.root.iterdir() if path.name.startswith((".", "out"))]


def test_an_output_that_exists_and_a_run_without_adapter_are_refused(merged_run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(RunFolderError, match="already exists"):
        export_run(*merged_run, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(RunFolderError, match=r"longlora\.json does not exist"):
        export_run(RunFolder(tmp_path / "empty"), merged_run[1], tmp_path / "other")
