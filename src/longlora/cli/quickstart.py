"""``longlora quickstart``: everything once, on a real model and real texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from longlora.cli.measure import write_and_print
from longlora.cli.options import OverridesArgument, console


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command()(quickstart)


def quickstart(
    overrides: OverridesArgument = None,
    model: Annotated[str | None, typer.Option(help="Local folder or hub id instead of SmolLM2-135M-Instruct.")] = None,
    run_dir: Annotated[Path, typer.Option(help="Run folder to make.")] = Path("quickstart"),
) -> None:
    """Extend a small real model to 16,384 tokens and prove it: fetch, train, merge, measure, report."""
    began = time.monotonic()
    out = console()
    from longlora.quickstart.run import quickstart_recipe, run_quickstart

    recipe = quickstart_recipe(run_dir, model, overrides or [], out)
    run = run_quickstart(recipe, out)
    write_and_print([run], run.root, out)
    minutes, seconds = divmod(int(time.monotonic() - began), 60)
    out.print(f"total time {minutes}:{seconds:02}", highlight=False)
