"""``longlora eval`` with its commands, and ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from longlora.artifacts import RunFolder
from longlora.cli.harness import harness
from longlora.cli.options import OverridesArgument, RecipeArgument, console, read_recipe, save_recipe
from longlora.errors import RecipeError

_DEFAULT = "recipe"


class _RunByDefault(TyperGroup):
    """``longlora eval RECIPE`` is ``longlora eval recipe RECIPE``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args and args[0] in self.commands else [_DEFAULT, *args])


evaluation = typer.Typer(
    cls=_RunByDefault,
    no_args_is_help=True,
    help="Measure models with full attention; `eval RECIPE` is `eval recipe RECIPE`.",
)


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    evaluation.command(name=_DEFAULT)(evaluate)
    evaluation.command(name="model")(evaluate_model)
    evaluation.command(name="prompt")(prompt)
    evaluation.command(name="harness")(harness)
    app.add_typer(evaluation, name="eval")
    app.command()(report)


def evaluate(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Measure base, RoPE only and trained; an interrupted measurement goes on where it was."""
    resolved = read_recipe(recipe, overrides)
    from longlora.evaluation.run import evaluate as run_evaluation

    for path in run_evaluation(resolved, console()):
        console().print(f"rows: {path}", highlight=False, markup=False)


def evaluate_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub id, extended by anybody.")],
    overrides: OverridesArgument = None,
    text: Annotated[list[str] | None, typer.Option(help="Long text to read; may be given many times.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Where rows and report go (default: eval_MODEL).")] = None,
    context_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens to measure up to (default: what model and text have, 8192 on a CPU at most)."),
    ] = None,
) -> None:
    """Measure any model as it is, without a recipe, and write its report."""
    if not text:
        raise RecipeError("nothing to read: give at least one --text FILE")
    from longlora.evaluation.alone import recipe_for_model, require_free
    from longlora.evaluation.run import evaluate as run_evaluation

    folder = run_dir or Path(f"eval_{Path(model).resolve().name}")
    resolved = recipe_for_model(model, text, folder, context_length, overrides or [], console())
    require_free(resolved)
    save_recipe(resolved)
    run_evaluation(resolved, console())
    write_and_print([RunFolder(resolved.run_path)], resolved.run_path, console())


def prompt(
    recipe: RecipeArgument,
    sha256: Annotated[str, typer.Argument(metavar="SHA256", help="First digits of a row's prompt_sha256.")],
    overrides: OverridesArgument = None,
) -> None:
    """Print the prompt that a row was measured with, made again from the recipe."""
    resolved = read_recipe(recipe, overrides)
    from longlora.evaluation.run import find_prompt

    typer.echo(find_prompt(resolved, sha256))


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Recipes or run folders, and KEY=VALUE overrides for one recipe."),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder of the report (default: that of the first run).")] = None,
) -> None:
    """Write report.html, report.md and results.json from the rows of one or more runs, and print the table."""
    paths = [Path(run) for run in runs if Path(run).exists() or "=" not in run]
    overrides = [run for run in runs if not Path(run).exists() and "=" in run]
    if overrides and len(paths) != 1:
        raise RecipeError(f"override {overrides[0]!r} with {len(paths)} runs: overrides need exactly one recipe")
    folders = [RunFolder(read_recipe(path, overrides).run_path) for path in paths]
    write_and_print(folders, output or folders[0].root, console())


def write_and_print(runs: list[RunFolder], folder: Path, out: Console) -> None:
    """The report files, and their main table and verdict on the terminal."""
    from longlora.evaluation.report.write import write_report

    summary = write_report(runs, RunFolder(folder))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(summary.table.columns):
        table.add_column(column, justify="right" if number else "left")
    for row in summary.table.strings():
        table.add_row(*(escape(text) for text in row))
    out.print(table)
    for note in (*summary.notes, *(f"not measured: {name}" for name in summary.missing)):
        out.print(escape(note), highlight=False, soft_wrap=True)
    for verdict in summary.verdicts:
        colour = {"PASS": "green", "FAIL": "red"}.get(verdict.status, "yellow")
        of_run = f"{verdict.run}: " if len(runs) > 1 else ""
        line = escape(f"{of_run}{verdict.claim}: {'; '.join(verdict.numbers)}")
        out.print(f"[{colour}]{verdict.status}[/{colour}] {line}", highlight=False, soft_wrap=True)
    out.print(f"report: {RunFolder(folder).report_html}", highlight=False, markup=False, soft_wrap=True)
