"""``longlora bench``: what a training step costs here, ours beside full attention."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from longlora.cli.options import OverridesArgument, console, read_recipe
from longlora.config import Recipe, build_recipe
from longlora.errors import PlanError

if TYPE_CHECKING:
    from longlora.bench.step import StepCost, Variant

_FIRST = "Trainer and PEFT LoRA, full attention"
_WAYS: dict[str, tuple[Variant, dict[str, Any]]] = {
    _FIRST: ("trainer", {}),
    "longlora, full attention": ("longlora", {"pattern": "full"}),
    "longlora, S2-Attn": ("longlora", {}),
}
_CONTEXTS = (4096, 8192)
_SHORTEST = 64


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command()(bench)


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, hub id, recipe YAML or run folder.")],
    overrides: OverridesArgument = None,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a step; can be repeated. Default: the recipe's, or 4096 and 8192."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of each, of which the first is not counted.")] = 3,
    layers: Annotated[int | None, typer.Option(help="Only so many layers of the model, to be quicker.")] = None,
) -> None:
    """Time training steps of the model with random weights: what one would write without us, and ours.

    Needs the model's config alone. Each line is measured in a process of its own, so that its peak memory is its own.
    """
    if steps < 2:
        raise PlanError(f"--steps {steps}: must be at least 2, because the first is not counted")
    recipe, contexts = _recipe(model, overrides, context)
    from longlora.bench.inputs import random_model
    from longlora.bench.step import StepJob, measure_apart
    from longlora.memory.allocator import return_freed_memory
    from longlora.model.build import load_config
    from longlora.planning.rehearsal import with_layers

    config = load_config(recipe.model)
    if layers is not None:
        config = with_layers(config, _some(layers, config.get_text_config(decoder=True).num_hidden_layers))
    values = recipe.model_dump(include={"model", "attention", "adapter", "train"})
    return_freed_memory()  # what this process took to make a model is for those that train it
    out = console()
    for tokens in contexts:
        costs: dict[str, StepCost | str] = {}
        with tempfile.TemporaryDirectory(prefix="longlora-bench-") as folder:
            made = Path(folder) / "model"
            random_model(config, tokens, made)
            for number, (name, (variant, attention)) in enumerate(_WAYS.items()):
                own = values | {"attention": values["attention"] | attention}
                place = str(Path(folder) / str(number))
                costs[name] = measure_apart(StepJob(variant, str(made), place, tokens, steps, values=own))
        out.print(_table(tokens, costs))


def _some(layers: int, there_are: int) -> int:
    if not 1 <= layers <= there_are:
        raise PlanError(f"--layers {layers}: the model has {there_are}, give 1 to {there_are}")
    return layers


def _recipe(model: str, overrides: list[str] | None, context: list[int] | None) -> tuple[Recipe, list[int]]:
    if context and min(context) < _SHORTEST:
        raise PlanError(f"--context {min(context)}: must be at least {_SHORTEST}")
    path = Path(model)
    if model.endswith((".yaml", ".yml")) or (path / "recipe.yaml").is_file():
        recipe = read_recipe(path, overrides)
        return recipe, context or [recipe.context.context_length]
    contexts = context or list(_CONTEXTS)
    values = {"run_dir": "bench", "model": {"name_or_path": model}, "context": {"context_length": max(contexts)}}
    return build_recipe(values, overrides or []), contexts


def _table(tokens: int, costs: dict[str, StepCost | str]) -> Table:
    table = Table(
        f"{tokens:,} tokens", "s / step", "tokens / s", "peak memory", "speed", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in table.columns[1:]:
        column.justify = "right"
    first = costs[_FIRST]
    for name, cost in costs.items():
        if isinstance(cost, str):
            table.add_row(name, escape(cost))
            continue
        times = "" if isinstance(first, str) else f"{first.seconds / cost.seconds:.2f} x"
        memory = f"{cost.peak_bytes / 1e9:.2f} GB"
        table.add_row(name, f"{cost.seconds:.2f}", f"{cost.tokens_per_second:,.0f}", memory, times)
    return table
