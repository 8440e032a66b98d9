"""``longlora eval harness`` as a person meets it: a table, rows in a file, and one line for a mistake."""

import json
from pathlib import Path

import pytest
import typer
from click.testing import Result
from transformers import AutoConfig
from typer.testing import CliRunner

from longlora.cli.harness import harness
from longlora.errors import DataError, LongLoraError, RecipeError

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is the extra [bench] and is not installed")

from lm_eval.tasks import TaskManager  # noqa: E402

from longlora.evaluation.harness import tasks as harness_tasks  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    {"goal": "to boil an egg", "sol1": "put it into hot water", "sol2": "put it into the freezer", "label": 0},
    {"goal": "to open a door", "sol1": "paint it", "sol2": "turn the handle", "label": 1},
]


@pytest.fixture(scope="module")
def piqa_alone() -> TaskManager:
    root = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_defaults=False, include_path=[str(root / "piqa"), str(root / "arc")])


@pytest.fixture
def command(
    piqa_alone: TaskManager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model_folder: Path
) -> CliRunner:
    """An empty folder with a recipe and rows of PIQA in it."""
    monkeypatch.setattr(harness_tasks, "_manager", lambda with_names: piqa_alone)
    monkeypatch.chdir(tmp_path)
    Path("piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    Path("recipe.yaml").write_text(
        f"run_dir: run\nmodel: {{name_or_path: {tiny_model_folder}, dtype: float32}}\n"
        "context: {context_length: 512}\n",
        encoding="utf-8",
    )
    return CliRunner()


def call(runner: CliRunner, *arguments: str) -> Result:
    app = typer.Typer()
    app.command()(harness)
    return runner.invoke(app, list(arguments))


def error_of(result: Result) -> LongLoraError:
    assert isinstance(result.exception, LongLoraError), result.output
    return result.exception


PIQA = ("--tasks", "piqa", "--data", "piqa=piqa.jsonl")


def test_all_variants_of_a_recipe_are_measured_and_written(command: CliRunner) -> None:
    result = call(command, "recipe.yaml", *PIQA, "--variant", "base", "--variant", "rope_only", "--samples")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "piqa" in result.output
    assert "rope_only" in result.output
    for variant, covered in (("base", 64), ("rope_only", 512)):
        found = json.loads(Path(f"run/eval/{variant}.harness.json").read_text(encoding="utf-8"))
        assert found["schema"] == 1
        assert found["variant"] == variant
        assert found["covered_context_length"] == covered
        assert found["settings"]["max_length"] == covered  # what this variant's RoPE was made for
        assert found["attention"] == "full (sdpa)"
        assert {row["metric"] for row in found["rows"]} == {"acc", "acc_norm"}
        assert all(row["task"] == "piqa" and row["samples"] == 2 for row in found["rows"])
        assert len(found["samples"]) == 2


def test_a_model_folder_is_measured_without_a_recipe(command: CliRunner, tiny_model_folder: Path) -> None:
    result = call(command, "--model", str(tiny_model_folder), *PIQA, "--limit", "1", "--output", "rows.json")
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(Path("rows.json").read_text(encoding="utf-8"))
    assert found["model"] == str(tiny_model_folder)
    assert found["rows"][0]["samples"] == 1
    context = AutoConfig.from_pretrained(tiny_model_folder).max_position_embeddings
    assert found["settings"]["max_length"] == context
    assert not Path("run").exists()


def test_rows_of_other_tasks_stay_only_beside_the_same_settings(command: CliRunner) -> None:
    arc = {"question": "?", "choices": {"text": ["fire", "ice"], "label": ["A", "B"]}, "answerKey": "B"}
    Path("arc.jsonl").write_text(json.dumps(arc), encoding="utf-8")
    written = Path("run/eval/base.harness.json")

    def tasks() -> set[str]:
        return {row["task"] for row in json.loads(written.read_text(encoding="utf-8"))["rows"]}

    assert call(command, "recipe.yaml", *PIQA, "--variant", "base").exit_code == 0
    arguments = ("--tasks", "arc_easy", "--data", "arc_easy=arc.jsonl", "--variant", "base")
    assert call(command, "recipe.yaml", *arguments).exit_code == 0
    assert tasks() == {"piqa", "arc_easy"}
    assert call(command, "recipe.yaml", *arguments, "model.dtype=bfloat16").exit_code == 0
    assert tasks() == {"arc_easy"}, "the other row was measured in float32"
    assert call(command, "recipe.yaml", *PIQA, "--variant", "base", "model.dtype=bfloat16").exit_code == 0
    assert tasks() == {"piqa", "arc_easy"}
    assert call(command, "recipe.yaml", *PIQA, "--variant", "base", "--limit", "1").exit_code == 0
    assert tasks() == {"piqa"}


def test_a_length_beyond_the_model_is_said(command: CliRunner) -> None:
    result = call(command, "recipe.yaml", *PIQA, "--variant", "base", "--max-length", "128")
    assert result.exit_code == 0, (result.output, result.exception)
    assert "RoPE covers 64 tokens only, less than --max-length 128" in result.output


@pytest.mark.parametrize(
    ("arguments", "kind", "expected"),
    [
        ((), RecipeError, "give either a recipe or --model"),
        (("recipe.yaml", "--model", "m", *PIQA), RecipeError, "give either a recipe or --model"),
        (("--model", "m", "--variant", "base", *PIQA), RecipeError, "belongs to a recipe"),
        (("recipe.yaml",), RecipeError, "no task is named"),
        (("recipe.yaml", *PIQA, "--output", "x.json"), RecipeError, "one file for 3 variants"),
        (("recipe.yaml", "--tasks", "piqa", "--data", "piqa.jsonl"), RecipeError, "not of the form NAME=VALUE"),
        (("recipe.yaml", *PIQA, "--metadata", "max_seq_lengths=[8k"), RecipeError, "is no YAML value"),
        (("recipe.yaml", *PIQA, "--variant", "bass"), RecipeError, "bass"),
        (("recipe.yaml", "--tasks", "pica"), DataError, "did you mean piqa?"),
        (("recipe.yaml", "--tasks", "ruler_vt"), DataError, "eval.tasks"),
    ],
)
def test_mistakes_are_one_line(
    command: CliRunner, arguments: tuple[str, ...], kind: type[LongLoraError], expected: str
) -> None:
    error = error_of(call(command, *arguments))
    assert isinstance(error, kind)
    assert expected in str(error)


def test_a_seed_that_no_library_takes_is_refused(command: CliRunner) -> None:
    result = call(command, "recipe.yaml", *PIQA, "--seed", str(2**32))
    assert result.exit_code == 2
    assert "4294967295" in result.output


def test_without_the_extra_it_is_said_how_to_get_it(command: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    assert "pip install 'longlora[bench]'" in str(error_of(call(command, "recipe.yaml", *PIQA)))
