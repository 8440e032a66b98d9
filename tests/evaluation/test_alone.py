"""A model by itself: up to which context it is measured, and what is said where that is less than asked for."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import save_tiny_model

from longlora.cli.options import save_recipe
from longlora.config import Recipe, build_recipe
from longlora.errors import DataError, ModelError, RunFolderError
from longlora.evaluation import alone
from longlora.evaluation.alone import recipe_for_model, require_free

MODEL_TOKENS = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("alone") / "model", max_position_embeddings=MODEL_TOKENS))


def made(model: str, tmp_path: Path, characters: int, context: int | None, *overrides: str) -> tuple[Recipe, str]:
    """The recipe for a text of as many tokens as characters, and what was said."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefg " * (characters // 8), encoding="utf-8")
    said = io.StringIO()
    recipe = recipe_for_model(
        model, [str(text)], tmp_path / "run", context, overrides, Console(file=said, soft_wrap=True)
    )
    return recipe, said.getvalue()


def test_a_long_text_is_measured_up_to_the_context_of_the_model(model: str, tmp_path: Path) -> None:
    recipe, said = made(model, tmp_path, 4096, None)
    assert recipe.context.context_length == MODEL_TOKENS
    assert recipe.eval.perplexity.context_lengths == [MODEL_TOKENS]
    assert recipe.eval.variants == ["base"]
    assert said == ""


def test_a_short_text_is_measured_as_far_as_it_reaches_and_that_is_said(model: str, tmp_path: Path) -> None:
    recipe, said = made(model, tmp_path, 800, None)
    assert recipe.context.context_length == 768
    assert recipe.eval.perplexity.context_lengths == [768]
    assert recipe.eval.longppl.context_length == 768
    assert "the longest text (text) has 800 tokens, less than 1024: measured up to 768" in said


def test_a_context_that_is_asked_for_is_kept_or_refused(model: str, tmp_path: Path) -> None:
    recipe, said = made(model, tmp_path, 800, 320)
    assert recipe.eval.perplexity.context_lengths == [320]
    assert said == ""
    beyond, _ = made(model, tmp_path, 4096, 2048)
    assert beyond.eval.perplexity.context_lengths == [MODEL_TOKENS, 2048]
    assert beyond.eval.longppl.context_length == MODEL_TOKENS
    with pytest.raises(DataError, match=r"the longest text \(text\) has 800 tokens; .* or --context-length 800"):
        made(model, tmp_path, 800, 1024)


def test_a_cpu_is_not_given_a_very_long_context_without_a_word(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "CPU_TOKENS", 512)
    monkeypatch.setattr(alone, "device_for_run", lambda: torch.device("cpu"))
    recipe, said = made(model, tmp_path, 4096, None)
    assert recipe.context.context_length == 512
    assert "covers 1024 tokens, which takes long without a GPU: measured up to 512; --context-length 1024" in said
    asked, said = made(model, tmp_path, 4096, 1024)
    assert asked.context.context_length == 1024
    assert said == ""


def test_overrides_have_the_last_word(model: str, tmp_path: Path) -> None:
    recipe, _ = made(model, tmp_path, 4096, None, "eval.perplexity.context_lengths=[128]", "eval.tasks=[perplexity]")
    assert recipe.eval.perplexity.context_lengths == [128]
    assert recipe.eval.tasks == ["perplexity"]
    shorter, _ = made(model, tmp_path, 4096, None, "model.original_context_length=256")
    assert shorter.context.context_length == 256


def test_a_wrong_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere.* cannot be read .*give a local folder"):
        made("./nowhere", tmp_path, 64, None)


def test_the_recipe_of_a_run_is_not_written_over(model: str, tmp_path: Path) -> None:
    recipe, _ = made(model, tmp_path, 800, None)
    require_free(recipe)
    save_recipe(recipe)
    require_free(recipe)
    values = {"run_dir": str(tmp_path / "run"), "model": {"name_or_path": model}, "context": {"context_length": 2048}}
    save_recipe(build_recipe(values))
    with pytest.raises(RunFolderError, match="holds a run: give another --run-dir"):
        require_free(recipe)
    values["model"] = {"name_or_path": "another"}
    save_recipe(build_recipe(values))
    with pytest.raises(RunFolderError, match="holds the measurements of another model"):
        require_free(recipe)
