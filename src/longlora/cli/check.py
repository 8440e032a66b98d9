"""``longlora check``: does S2-Attn do on this model what it promises?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from longlora.artifacts import write_atomic
from longlora.cli.options import OverridesArgument, console, read_recipe
from longlora.config import AttentionConfig, ModelConfig
from longlora.errors import RecipeError


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command()(check)


def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub id, or a recipe YAML.")],
    overrides: OverridesArgument = None,
    picture: Annotated[Path, typer.Option(help="PNG with the attention weights of one head of each kind.")] = Path(
        "attention_pattern.png"
    ),
) -> None:
    """Check a model: no leak, full attention where it should be, isolated documents, a faithful merge."""
    recipe = read_recipe(Path(model), overrides) if model.endswith((".yaml", ".yml")) else None
    if recipe is None and overrides:
        raise RecipeError(f"check {model} takes no overrides such as {overrides[0]}: give a recipe instead of a model")
    settings = recipe.model if recipe else ModelConfig(name_or_path=model)
    attention = recipe.attention if recipe else AttentionConfig()
    import torch

    from longlora.attention.check import CheckResult, check_model
    from longlora.attention.picture import draw_heads, head_weights
    from longlora.attention.registry import describe_attention, use_full, use_s2
    from longlora.model.build import device_for_run, load_model
    from longlora.model.check import check_merge

    out = console()
    passed: list[bool] = []

    def show(result: CheckResult) -> None:
        mark = "[green]ok  [/green]" if result.passed else "[red]FAIL[/red]"
        out.print(f"{mark} {escape(f'{result.name}: {result.detail}')}", highlight=False)
        passed.append(result.passed)

    loaded = load_model(settings, dtype=torch.float32).to(device_for_run())
    layers: dict[str, Any] = {
        "shift": attention.shift,
        "full_attention_layers": attention.full_attention_layers,
        "backend": attention.backend,
    }
    # A model that cannot use S2-Attn at all is one line, not a list of failures.
    group_size = attention.group_size or attention.resolve_group_size(recipe.context.context_length if recipe else 0)
    use_s2(loaded, group_size=group_size, sink_tokens=attention.sink_tokens, **layers)
    out.print(f"attention in training: {describe_attention(loaded)}", highlight=False)
    use_full(loaded)
    for result in check_model(loaded):
        show(result)
    heads = head_weights(loaded, **layers)
    write_atomic(picture, draw_heads(heads))
    out.print(f"drawn with groups of 16: {'; '.join(head.title for head in heads)}: {picture}", highlight=False)
    del loaded  # the merge needs the memory
    show(check_merge(settings))
    if not all(passed):
        out.print(f"{passed.count(False)} of {len(passed)} checks failed", highlight=False)
        raise typer.Exit(1)
