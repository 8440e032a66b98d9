"""``longlora check``: does S2-Attn do on this model what it promises?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longlora.cli.options import OverridesArgument, console, read_recipe
from longlora.config import ModelConfig
from longlora.errors import RecipeError


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command()(check)


def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub id, or a recipe YAML.")],
    overrides: OverridesArgument = None,
) -> None:
    """Check a model: no leak, full attention where it should be, isolated documents, a faithful merge."""
    settings = _model_config(model, overrides)
    import torch

    from longlora.attention.check import check_model
    from longlora.model.build import load_model
    from longlora.model.check import check_merge

    out = console()
    failed = 0
    loaded = load_model(settings, dtype=torch.float32)
    for result in check_model(loaded):
        failed += not result.passed
        out.print(_line(result.passed, result.name, result.detail), highlight=False, soft_wrap=True)
    del loaded
    merge = check_merge(settings)
    failed += not merge.passed
    out.print(_line(merge.passed, merge.name, merge.detail), highlight=False, soft_wrap=True)
    if failed:
        out.print(f"{failed} of 8 checks failed", highlight=False)
        raise typer.Exit(1)


def _model_config(model: str, overrides: list[str] | None) -> ModelConfig:
    if model.endswith((".yaml", ".yml")):
        return read_recipe(Path(model), overrides).model
    if overrides:
        raise RecipeError(f"check {model} takes no overrides such as {overrides[0]}: give a recipe instead of a model")
    return ModelConfig(name_or_path=model)


def _line(passed: bool, name: str, detail: str) -> str:
    mark = "[green]ok  [/green]" if passed else "[red]FAIL[/red]"
    return f"{mark} {name}: {detail}"
