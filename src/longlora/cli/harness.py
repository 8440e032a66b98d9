"""``longlora eval harness``: standard benchmarks through lm-evaluation-harness."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longlora.artifacts import RunFolder, write_json
from longlora.cli.options import OverridesArgument, console, read_recipe
from longlora.config import ContextConfig, EvalConfig, ModelConfig, Recipe
from longlora.config.plain_yaml import read_yaml
from longlora.errors import RecipeError, one_line

if TYPE_CHECKING:
    from longlora.evaluation.harness.run import HarnessResult


def harness(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Recipe YAML or run folder.")] = None,
    overrides: OverridesArgument = None,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval, with commas: hellaswag,longbench_qasper.")] = "",
    model: Annotated[str | None, typer.Option(help="Model folder or hub id instead of a recipe.")] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Of the recipe: base, rope_only, trained; all of eval.variants otherwise.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task, the first ones.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in front of each question.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer; what the model covers if left out.")
    ] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Ask in the model's chat format.")] = False,
    truncation: Annotated[
        Literal["middle", "left"] | None,
        typer.Option(help="Where too long prompts are cut; middle for LongBench and InfiniteBench, else left."),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="TASK=PATH", help="Local rows: .jsonl, .json, .parquet or a folder.")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="For tasks that read it: max_seq_lengths=8k.")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Datasets may come from the Hub.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts side by side.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Choice of examples; 1234 is lm-eval's own.")] = 1234,
    samples: Annotated[bool, typer.Option("--samples", help="Write every answer as well.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file instead of the one in the run folder.")] = None,
) -> None:
    """Score a model or the variants of a run on standard benchmarks, with full attention."""
    resolved = _what_to_measure(recipe, overrides, model, variant)
    variants = resolved.eval.variants
    if output and len(variants) > 1:
        raise RecipeError(f"--output names one file for {len(variants)} variants: give one --variant as well")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise RecipeError("no task is named: give --tasks with names of lm-eval, such as --tasks hellaswag,arc_easy")
    settings: dict[str, Any] = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "chat_template": chat_template,
        "truncation": truncation,
        "batch_size": batch_size,
        "seed": seed,
        "data": {name: Path(path) for name, path in _pairs(data, "--data piqa=piqa.jsonl")},
        "download": download,
        "metadata": {key: _yaml_value(key, text) for key, text in _pairs(metadata, "--metadata max_seq_lengths=8k")},
    }
    run, out = RunFolder(resolved.run_path), console()
    loaded = _load(names, settings)
    _require_variants(resolved, run)
    rows: dict[str, list[dict[str, Any]]] = {}
    for each in variants:
        found, result = _measure(resolved, run, each, loaded, max_length, settings, out)
        rows[each] = result.rows
        path = output or (None if model else run.harness(each))
        if path:
            _write(path, found, result, samples, out)
    _print(rows, out)


def _yaml_value(key: str, text: str) -> object:
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        why = one_line(error, 80)
        raise RecipeError(f"--metadata {key}={text[:60]} is no YAML value ({why})") from error


def _what_to_measure(
    recipe: Path | None, overrides: Sequence[str] | None, model: str | None, variant: Sequence[str] | None
) -> Recipe:
    """The recipe with the variants asked for; a model by itself is the ``base`` of a recipe of nothing else."""
    if (recipe is None) == (model is None):
        raise RecipeError("give either a recipe or --model FOLDER")
    if model is not None:
        if variant:
            raise RecipeError(f"--variant {variant[0]} belongs to a recipe: leave it out with --model")
        return Recipe(
            run_dir=".",
            model=ModelConfig(name_or_path=model),
            context=ContextConfig(context_length=1),
            eval=EvalConfig(variants=["base"]),
        )
    assert recipe is not None
    chosen = [f"eval.variants=[{', '.join(variant)}]"] if variant else []
    return read_recipe(recipe, [*(overrides or []), *chosen])


def _load(names: list[str], settings: dict[str, Any]) -> list[Any]:
    """The tasks with their data, before any weights: a wrong name or missing data is said at once."""
    from longlora.evaluation.harness.tasks import load_tasks

    return load_tasks(names, **{key: settings[key] for key in ("data", "num_fewshot", "download", "metadata")})


def _require_variants(recipe: Recipe, run: RunFolder) -> None:
    from longlora.evaluation.variants import require_variants

    require_variants(recipe, run)


def _measure(
    recipe: Recipe,
    run: RunFolder,
    variant: str,
    tasks: list[Any],
    max_length: int | None,
    settings: dict[str, Any],
    out: Console,
) -> tuple[dict[str, Any], HarnessResult]:
    """What is said about a variant, and its results."""
    from longlora.evaluation.harness.run import run_harness
    from longlora.evaluation.variants import contexts_of, environment, load_variant, tokenizer_of
    from longlora.model.build import device_for_run, load_config

    tokenizer = tokenizer_of(recipe)
    contexts = contexts_of(recipe, load_config(recipe.model))
    covered = contexts.covered(variant)
    length = max_length or covered
    names = ", ".join(task.task_name for task in tasks)
    out.print(f"{variant}: {names} up to {length} tokens", highlight=False, markup=False)
    if length > covered:
        out.print(f"{variant}: RoPE covers {covered} tokens only, less than --max-length {length}", highlight=False)
    loaded = load_variant(recipe, run, variant).to(device_for_run())
    result = run_harness(loaded, tokenizer, tasks, max_length=length, **settings)
    found = {
        "schema": 1,
        "variant": variant,
        "original_context_length": contexts.original,
        "covered_context_length": covered,
        **environment(recipe, loaded),
    }
    del loaded
    gc.collect()
    return found, result


def _write(path: Path, found: dict[str, Any], result: HarnessResult, samples: bool, out: Console) -> None:
    """Write the rows, beside those of other tasks that the file has from the same weights and settings."""
    content = {**found, "seconds": result.seconds, "settings": result.settings, "rows": result.rows}
    if samples:
        content["samples"] = result.samples
    before = _comparable_rows(path, content)
    measured = {row["task"] for row in result.rows}
    content["rows"] = [row for row in before if row["task"] not in measured] + result.rows
    write_json(path, content)
    out.print(f"rows: {path}", highlight=False, markup=False)


def _comparable_rows(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier call with the same model and settings; none where they cannot stand side by side."""
    from longlora.evaluation.variants import SAME_MODEL

    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        same = all(before[key] == content[key] for key in SAME_MODEL) and all(
            before["settings"][key] == value
            for key, value in content["settings"].items()
            if key not in ("tasks", "data", "batch_size")
        )
        return list(before["rows"]) if same else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _pairs(arguments: Iterable[str] | None, example: str) -> list[tuple[str, str]]:
    pairs = []
    for argument in arguments or []:
        name, separator, value = argument.partition("=")
        if not (name and separator and value):
            raise RecipeError(f"{argument!r} is not of the form NAME=VALUE, for example {example}")
        pairs.append((name, value))
    return pairs


def _print(rows: dict[str, list[dict[str, Any]]], out: Console) -> None:
    """One line a metric, one column a variant: the value and its standard error."""
    variants = list(rows)
    by_metric: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for variant, own in rows.items():
        for row in own:
            by_metric.setdefault((row["task"], row["metric"]), {})[variant] = row
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("task", "metric"):
        table.add_column(column)
    for column in (*variants, "questions", "examples", "cut prompts"):
        table.add_column(column, justify="right")
    for (task, metric), of_variant in by_metric.items():
        any_row = next(iter(of_variant.values()))
        cut = "/".join(str(of_variant[variant]["truncated"]) for variant in variants if variant in of_variant)
        table.add_row(
            escape(task),
            escape(metric),
            *(_value(of_variant.get(variant)) for variant in variants),
            str(any_row["samples"]),
            str(any_row["num_fewshot"]),
            cut,
        )
    out.print(table)


def _value(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "-"
    return f"{row['value']:.4f}" + (f" ± {row['stderr']:.4f}" if row["stderr"] is not None else "")
