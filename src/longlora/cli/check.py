"""``longlora check``: does S2-Attn do on this model what it promises?"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from longlora.artifacts import write_atomic
from longlora.cli.options import OverridesArgument, console, read_recipe
from longlora.config import AttentionConfig, ModelConfig
from longlora.errors import RecipeError, RunFolderError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from longlora.attention.check import CheckResult
    from longlora.attention.probing import ProbeSettings


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command()(check)


def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub id, recipe YAML or run folder.")],
    overrides: OverridesArgument = None,
    picture: Annotated[Path, typer.Option(help="PNG with the attention weights of one head of each kind.")] = Path(
        "attention_pattern.png"
    ),
) -> None:
    """Check a model, with the attention of a recipe: no leak, isolated documents, right gradients, a faithful merge."""
    source, attention, context_length = _what_to_check(model, overrides)
    _require_writable(picture)
    import torch

    from longlora.attention.check import check_model
    from longlora.model.attention import apply_attention
    from longlora.model.build import device_for_run, load_model
    from longlora.model.check import check_full_phase, check_merge, probe_settings

    out = console()
    loaded = load_model(source, dtype=torch.float32).to(device_for_run())
    # A model that cannot use S2-Attn at all is one line, not a list of failures.
    supported = apply_attention(loaded, attention, context_length)
    settings = probe_settings(attention, context_length) if supported else None
    _say_what_training_does(out, loaded, settings, source.dtype)
    failed = 0
    for result in check_model(loaded, settings):
        failed += _show(out, result)
    if attention.pattern == "s2" and attention.full_attention_final_fraction:
        failed += _show(out, check_full_phase(loaded, attention, context_length))
    if settings is not None:
        _draw(out, loaded, settings, picture)
    del loaded  # the merge needs the memory
    failed += _show(out, check_merge(source))
    if failed:
        out.print(f"{failed} {'check' if failed == 1 else 'checks'} failed", highlight=False)
        raise typer.Exit(1)


def _what_to_check(model: str, overrides: list[str] | None) -> tuple[ModelConfig, AttentionConfig, int]:
    path = Path(model)
    if model.endswith((".yaml", ".yml")) or (path / "recipe.yaml").is_file():
        recipe = read_recipe(path, overrides)
        return recipe.model, recipe.attention, recipe.context.context_length
    if overrides:
        raise RecipeError(f"check {model} takes no overrides such as {overrides[0]}: give a recipe instead of a model")
    return ModelConfig(name_or_path=model), AttentionConfig(), 0


def _require_writable(picture: Path) -> None:
    """The picture comes after minutes of checks: say at once that it cannot be written."""
    try:
        if picture.is_dir():
            raise IsADirectoryError("it is a folder")
        picture.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=picture.parent):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFolderError(f"picture {picture} cannot be written ({reason}): give --picture another path") from None


def _say_what_training_does(out: Console, model: PreTrainedModel, settings: ProbeSettings | None, dtype: str) -> None:
    import torch

    from longlora.attention.probing import backends_in_training
    from longlora.attention.registry import describe_attention

    # The backend depends on what reaches the layers in training; the model is in float32 here.
    layers = describe_attention(model)
    if settings is None:
        out.print(f"attention in training: {layers}, the model's own", highlight=False)
        return
    backends = ", ".join(backends_in_training(model, settings, getattr(torch, dtype)))
    out.print(f"attention in training: {layers}; backend {backends} in {dtype}", highlight=False)
    if settings.full_attention_layers == "all":
        return
    sinks = f"{settings.sink_tokens} sink {'token' if settings.sink_tokens == 1 else 'tokens'}"
    dtypes = "float32 and, under autocast, bfloat16" if model.device.type == "cuda" else "float32"
    out.print(f"checked with groups of {settings.group_size} and {sinks}, in {dtypes}", highlight=False)


def _show(out: Console, result: CheckResult) -> bool:
    """Print a line; true if the check failed. What could not be compared has neither passed nor failed."""
    mark = {True: "[green]ok  [/green]", False: "[red]FAIL[/red]", None: "[yellow]--  [/yellow]"}[result.passed]
    out.print(f"{mark} {escape(f'{result.name}: {result.detail}')}", highlight=False)
    return result.passed is False


def _draw(out: Console, model: PreTrainedModel, settings: ProbeSettings, picture: Path) -> None:
    from longlora.attention.picture import draw_heads, head_weights

    heads = head_weights(model, settings)
    write_atomic(picture, draw_heads(heads))
    out.print(f"drawn: {'; '.join(head.title for head in heads)}: {picture}", highlight=False, markup=False)
