"""``longlora train``, ``resume`` and ``merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longlora.artifacts import RunFolder
from longlora.cli.options import OverridesArgument, RecipeArgument, console, read_recipe
from longlora.config import build_recipe


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    for command in (train, resume, merge):
        app.command()(command)


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    or_resume: Annotated[
        bool,
        typer.Option(
            "--or-resume",
            help="Go on from the newest whole checkpoint if there is one, and do nothing if the run is finished: for "
            "launchers that start the same command again.",
        ),
    ] = False,
) -> None:
    """Train on the prepared shards: an adapter, or the whole model with adapter.method=full."""
    resolved = read_recipe(recipe, overrides)
    if or_resume and _goes_on(RunFolder(resolved.run_path), recipe, overrides):
        return
    from longlora.training.trainer import train as run_training

    _say(run_training(resolved, console(), prepared=True))


def resume(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Go on from the newest whole checkpoint."""
    resolved = read_recipe(recipe, overrides)
    saved = read_recipe(RunFolder(resolved.run_path).root, None)
    from longlora.planning.settle import adopt_levers

    # What `memory: auto` picked, and on top what the command line says.
    picked = [override for override in overrides or [] if not override.startswith("memory=")]
    resolved = build_recipe(adopt_levers(resolved, saved).model_dump(), picked)
    from longlora.training.trainer import train as run_training

    _say(run_training(resolved, console(), resume=True))


def merge(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Merge the adapter into an ordinary model, and verify it."""
    resolved = read_recipe(recipe, overrides)
    run = RunFolder(resolved.run_path)
    from longlora.model.merge import merge_run

    console().print(merge_run(run, resolved.adapter.method), highlight=False, markup=False)


def _goes_on(run: RunFolder, recipe: Path, overrides: list[str] | None) -> bool:
    """Whether an earlier start of this run left something: it is resumed then, or finished already.

    All processes of a run find the same: none writes before all have joined (`longlora.training.start`).
    """
    from longlora.training.checkpoint import has_checkpoint

    if run.trained.exists():
        console().print(f"finished before: {run.trained}", highlight=False, markup=False)
        return True
    if has_checkpoint(run.checkpoints):
        resume(recipe, overrides)
        return True
    return False


def _say(folder: Path) -> None:
    """adapter: PATH, or merged: PATH."""
    console().print(f"{folder.name}: {folder}", highlight=False, markup=False)
