"""Full fine-tuning: whole small runs, what they write, that resuming is exact, and that every verb takes the result."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_jobs import mark_again
from command_line import Result
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import bear_texts, save_tiny_model
from transformers import AutoModelForCausalLM

from longlora.artifacts import RunFolder
from longlora.attention.registry import is_sparse
from longlora.config import Recipe, build_recipe
from longlora.data.prepare import prepare_shards
from longlora.errors import LongLoraError
from longlora.evaluation.variants import load_variant, require_variants
from longlora.inference.load import load, locate
from longlora.model.build import load_tokenizer, tokenizer_hash
from longlora.model.export import export_run
from longlora.model.sidecar import read_sidecar
from longlora.training import trainer
from longlora.training.trainer import train

QUIET = Console(quiet=True)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"

pytestmark = pytest.mark.usefixtures("one_thread")


def make_recipe(tmp_path: Path, model: Path, run: str = "run", **changes: Any) -> Recipe:
    """64 -> 128 tokens on four texts; changes under dotted names with two underscores for the dot."""
    texts = bear_texts(tmp_path / "texts")
    values = {
        "run_dir": str(tmp_path / run),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "context": {"context_length": 128, "rope_type": "linear"},
        "attention": {"group_size": 32, "sink_tokens": 2},
        "adapter": {"method": "full"},
        "data": {"train": [str(texts)], "heldout": [str(texts)]},
        "train": {
            "steps": 4, "grad_accum_steps": 2, "learning_rate": 0.003, "warmup_steps": 0, "save_steps": 2,
            "loss_chunk_tokens": 50,
        },
    }  # fmt: skip
    recipe = build_recipe(values, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()])
    tokenizer = load_tokenizer(recipe.model)
    prepare_shards(recipe, tokenizer, tokenizer_hash(tokenizer), QUIET)
    return recipe


def checkpoint(recipe: Recipe, step: int) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(recipe.run_path).checkpoints / f"checkpoint-{step}" / "model.safetensors")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(128, (1, 100), generator=torch.Generator().manual_seed(5))
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("tied", [True, False])
def test_everything_is_trained_and_an_ordinary_model_is_left(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    recipe = make_recipe(tmp_path, source)
    run, models = RunFolder(recipe.run_path), []
    write = trainer.write_result
    monkeypatch.setattr(trainer, "write_result", lambda model, *rest: (models.append(model), write(model, *rest))[1])
    assert train(recipe, QUIET) == run.merged == run.trained
    assert not run.adapter.exists()

    before, after = AutoModelForCausalLM.from_pretrained(source), AutoModelForCausalLM.from_pretrained(run.merged)
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    assert len(new) == (20 if tied else 21)
    for name, parameter in new.items():
        assert (parameter - old[name]).abs().max() > 1e-3, name
    assert (after.get_output_embeddings().weight is after.get_input_embeddings().weight) is tied
    assert ("lm_head.weight" in load_file(run.merged / "model.safetensors")) is not tied

    (trained,) = models
    assert not is_sparse(trained.train()), "full attention afterwards, in training as well"
    torch.testing.assert_close(logits(after), logits(trained.eval()), rtol=1e-4, atol=1e-4)
    assert (logits(after) - logits(before)).abs().max() > 0.1
    assert after.config.max_position_embeddings == 128
    assert after.config.rope_parameters["factor"] == 2.0
    assert read_sidecar(run.trained).context_length == 128
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in run.metrics.read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5


def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path, tiny_model_folder: Path) -> None:
    whole, stopped = (make_recipe(tmp_path, tiny_model_folder, name) for name in ("whole", "stopped"))
    train(whole, QUIET)
    train(stopped, QUIET)
    run, expected = RunFolder(stopped.run_path), checkpoint(whole, 4)
    # As if it had been killed while it wrote its last checkpoint.
    shutil.rmtree(run.merged)
    (run.checkpoints / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    train(stopped, QUIET, resume=True)
    resumed = checkpoint(stopped, 4)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    one, other = (load_file(RunFolder(each.run_path).merged / "model.safetensors") for each in (whole, stopped))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    with pytest.raises(LongLoraError, match=r"merged exists: the run is finished"):
        train(stopped, QUIET, resume=True)
    with pytest.raises(LongLoraError, match="already holds merged/"):
        train(stopped, QUIET)
    # Only the result is lost: no step is trained again.
    shutil.rmtree(run.merged)
    trained = run.metrics.read_text()
    train(stopped, QUIET, resume=True)
    assert run.metrics.read_text() == trained
    again = load_file(run.merged / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder, train__steps=2)
    train(recipe, QUIET)
    run = RunFolder(recipe.run_path)
    shutil.rmtree(run.merged)
    weights = checkpoint(recipe, 2)
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, run.checkpoints / "checkpoint-2" / "model.safetensors")
    mark_again(run.checkpoints / "checkpoint-2")
    with pytest.raises(LongLoraError, match=r"does not fit the recipe: 1 parameters differ, first model\.norm\.weight"):
        train(recipe, QUIET, resume=True)


def test_bfloat16_is_for_computing_and_float32_for_the_weights(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Steps far below what bfloat16 can hold: they count, and so do the digits of a base stored in float32."""
    changes = {"model__dtype": "bfloat16", "train__steps": 2, "train__validation_steps": 2}
    recipe = make_recipe(tmp_path, tiny_model_folder, train__learning_rate=1e-6, **changes)
    # So little training is lost in a file of bfloat16, which is said; the checkpoint holds it.
    with pytest.raises(LongLoraError, match=r"rounding the merged weights costs KL .* set model\.dtype=float32"):
        train(recipe, QUIET)
    assert not RunFolder(recipe.run_path).merged.exists()
    base = dict(AutoModelForCausalLM.from_pretrained(tiny_model_folder).named_parameters())
    for name, tensor in checkpoint(recipe, 2).items():
        assert tensor.dtype is torch.float32
        assert 0 < (tensor - base[name]).abs().max() < 3e-6, name

    recipe = make_recipe(tmp_path, tiny_model_folder, "more", **changes)
    out = io.StringIO()
    train(recipe, Console(file=out, width=200))
    assert "step 2: validation loss" in out.getvalue()
    merged = AutoModelForCausalLM.from_pretrained(RunFolder(recipe.run_path).merged)
    assert merged.dtype is torch.bfloat16
    for name, tensor in checkpoint(recipe, 2).items():
        assert torch.equal(dict(merged.named_parameters())[name], tensor.bfloat16()), name


def test_memory_levers_change_nothing_but_rounding(tmp_path: Path, tiny_model_folder: Path) -> None:
    plain = make_recipe(tmp_path, tiny_model_folder, "plain", train__steps=2, train__activation_checkpointing="false")
    levers = make_recipe(
        tmp_path, tiny_model_folder, "levers",
        train__steps=2, train__activation_checkpointing_every=2, train__mlp_tile_tokens=30,
    )  # fmt: skip
    for recipe in (plain, levers):
        train(recipe, QUIET)
    found = checkpoint(levers, 2)
    for name, tensor in checkpoint(plain, 2).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_every_verb_takes_the_result(tmp_path: Path, tiny_model_folder: Path, longlora: Callable[..., Result]) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder)
    run = RunFolder(recipe.run_path)
    train(recipe, QUIET)

    done = longlora("merge", str(run.recipe))
    assert done.returncode == 0
    assert "nothing to merge: the run was fully fine-tuned" in " ".join(done.stdout.split())

    require_variants(recipe, run)
    assert load_variant(recipe, run, "trained").config.max_position_embeddings == 128

    for name in (run.root, run.merged):  # its sidecar does not make an adapter of it
        assert (locate(str(name)).kind, locate(str(name)).name) == ("model", str(run.merged))
    (tmp_path / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    assert load(str(run.root), tmp_path / "template.jinja")[0].config.max_position_embeddings == 128

    exported = export_run(run, recipe, tmp_path / "exported")
    assert exported.model.context_length == 128
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    assert "| trained | every parameter" in card
    assert "LoRA rank" not in card

    (run.merged / "model.safetensors").write_bytes(b"half")
    assert "its manifest says" in longlora("merge", str(run.recipe)).stderr
    shutil.rmtree(run.merged)
    assert "does not exist: the run is fully fine-tuned" in longlora("merge", str(run.recipe)).stderr
