"""Arguments that all verbs share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from longlora.artifacts import RunFolder, write_atomic
from longlora.config import Recipe, dump_recipe, load_recipe
from longlora.errors import RecipeError
from longlora.training.distributed import read_ranks

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe YAML, or a run folder that holds a recipe.yaml.")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Dotted overrides, for example train.steps=20.")
]


def read_recipe(path: Path, overrides: Sequence[str] | None) -> Recipe:
    """The recipe of a YAML file, or of a run folder wherever that lies now, with overrides."""
    if not path.is_dir():
        return load_recipe(path, overrides or [])
    if any(override.startswith("run_dir=") for override in overrides or []):
        raise RecipeError(f"run_dir is {path} already, because a run folder was given: leave the override out")
    recipe = load_recipe(RunFolder(path).recipe, overrides or [])
    return recipe.model_copy(update={"run_dir": str(path)})


def save_recipe(recipe: Recipe) -> None:
    """Leave the resolved recipe in the run folder."""
    write_atomic(RunFolder(recipe.run_path).recipe, dump_recipe(recipe))


def console() -> Console:
    """Where results are printed: stdout, without colours or bars when it is no terminal; of several processes, one."""
    # A log file has no width: lines there must not be broken at 80 columns. A document may be called a.jsonl:100: .
    width = None if sys.stdout.isatty() else 140
    return Console(soft_wrap=True, width=width, emoji=False, quiet=not read_ranks().is_main)
