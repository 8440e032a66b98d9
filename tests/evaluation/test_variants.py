"""Which trained model belongs to a recipe: the context it was trained for decides, not the number in the recipe."""

from pathlib import Path

import pytest
from inference_cases import save_askable_adapter
from tiny import save_tiny_model

from longlora.artifacts import RunFolder
from longlora.config import Recipe, build_recipe
from longlora.errors import RunFolderError
from longlora.evaluation.variants import load_variant, require_variants


def recipe(folder: Path, model: Path, context_length: int, kind: str = "instruct") -> Recipe:
    return build_recipe({
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "context": {"context_length": context_length},
        "data": {"kind": kind},
        "eval": {"variants": ["trained"]},
    })  # fmt: skip


def test_examples_shorter_than_the_models_context_leave_it(tmp_path: Path) -> None:
    """The tiny model covers 64 tokens; instructions of up to 48 do not change that."""
    model = save_tiny_model(tmp_path / "base")
    wanted = recipe(tmp_path, model, 48)
    run = RunFolder(wanted.run_path)
    save_tiny_model(run.merged)
    require_variants(wanted, run)
    assert load_variant(wanted, run, "trained").config.max_position_embeddings == 64
    save_tiny_model(run.merged, max_position_embeddings=48)
    with pytest.raises(RunFolderError, match=r"was trained for 48 tokens, .*context_length=48 within 64 of the model:"):
        require_variants(wanted, run)


def test_a_model_of_another_context_is_refused_merged_or_not(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "base")
    right, other = recipe(tmp_path, model, 128), recipe(tmp_path, model, 96)
    run = RunFolder(right.run_path)
    save_askable_adapter(model, run.adapter, 128)
    for _ in range(2):
        require_variants(right, run)
        with pytest.raises(RunFolderError, match=r"trained for 128 tokens, the recipe says context.context_length=96:"):
            require_variants(other, run)
        save_tiny_model(run.merged, max_position_embeddings=128)  # is looked at first from now on


def test_nothing_trained_is_said_with_the_folder(tmp_path: Path) -> None:
    wanted = recipe(tmp_path, save_tiny_model(tmp_path / "base"), 48)
    with pytest.raises(RunFolderError, match=r"run holds no trained model: run `longlora train` first"):
        require_variants(wanted, RunFolder(wanted.run_path))
