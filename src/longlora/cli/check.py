"""``longlora check``: does S2-Attn do on this model what it promises?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

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

    from longlora.attention.check import CheckResult, check_model
    from longlora.attention.registry import use_full, use_s2
    from longlora.model.build import load_model
    from longlora.model.check import check_merge

    out = console()
    passed: list[bool] = []

    def show(result: CheckResult) -> None:
        mark = "[green]ok  [/green]" if result.passed else "[red]FAIL[/red]"
        out.print(f"{mark} {escape(f'{result.name}: {result.detail}')}", highlight=False)
        passed.append(result.passed)

    loaded = load_model(settings, dtype=torch.float32)
    use_s2(loaded)  # a model that cannot use it at all is one line, not a list of failures
    use_full(loaded)
    for result in check_model(loaded):
        show(result)
    del loaded  # the merge needs the memory
    show(check_merge(settings))
    if not all(passed):
        out.print(f"{passed.count(False)} of {len(passed)} checks failed", highlight=False)
        raise typer.Exit(1)


def _model_config(model: str, overrides: list[str] | None) -> ModelConfig:
    if model.endswith((".yaml", ".yml")):
        return read_recipe(Path(model), overrides).model
    if overrides:
        raise RecipeError(f"check {model} takes no overrides such as {overrides[0]}: give a recipe instead of a model")
    return ModelConfig(name_or_path=model)
