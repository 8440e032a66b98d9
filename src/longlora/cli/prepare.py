"""``longlora prepare``: texts to token shards."""

from __future__ import annotations

import typer

from longlora.cli.options import OverridesArgument, RecipeArgument, console, read_recipe


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command()(prepare)


def prepare(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Tokenize data.train and data.heldout into the run folder."""
    resolved = read_recipe(recipe, overrides)
    from longlora.data.prepare import prepare_shards
    from longlora.model.build import load_tokenizer, tokenizer_hash

    tokenizer = load_tokenizer(resolved.model)
    prepare_shards(resolved, tokenizer, tokenizer_hash(tokenizer), console())
