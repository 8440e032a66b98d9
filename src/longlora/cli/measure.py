"""``longlora eval`` and ``report``."""

from __future__ import annotations

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longlora.artifacts import RunFolder
from longlora.cli.options import OverridesArgument, RecipeArgument, console, read_recipe


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
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
    """The report files, and their main table and verdict on the terminal."""
    from longlora.evaluation.report import write_report

    summary = write_report(run)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(summary.table.columns):
        table.add_column(column, justify="right" if number else "left")
    for row in summary.table.strings():
        table.add_row(*(escape(text) for text in row))
    out.print(table)
    for verdict in summary.verdicts:
        colour = {"PASS": "green", "FAIL": "red"}.get(verdict.status, "yellow")
        line = escape(f"{verdict.claim}: {'; '.join(verdict.numbers)}")
        out.print(f"[{colour}]{verdict.status}[/{colour}] {line}", highlight=False, soft_wrap=True)
    out.print(f"report: {run.report_html}", highlight=False, soft_wrap=True)
