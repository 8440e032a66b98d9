"""``longlora eval`` and ``report``."""

from __future__ import annotations

import typer
from rich.console import Console

from longlora.artifacts import RunFolder
from longlora.cli.options import OverridesArgument, RecipeArgument, console, read_recipe


def add_to(app: typer.Typer) -> None:
    app.command(name="eval")(evaluate)
    app.command()(report)


def evaluate(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Measure base, RoPE only and trained on the held-out documents, with full attention."""
    resolved = read_recipe(recipe, overrides)
    from longlora.evaluation.run import evaluate as run_evaluation

    for path in run_evaluation(resolved, console()):
        console().print(f"rows: {path}", highlight=False)


def report(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Write report.html and report.md from the measured rows, and print the table."""
    write_and_print(RunFolder(read_recipe(recipe, overrides).run_path), console())


def write_and_print(run: RunFolder, out: Console) -> None:
    """The report files, and the same table on the terminal."""
    raise NotImplementedError
