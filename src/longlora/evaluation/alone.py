"""A model by itself: the recipe that measures it as it is, up to a context that its texts fill.

In: a model folder or hub id, and texts. Out: a recipe for `run.evaluate`. No weights are loaded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from longlora.artifacts import RunFolder
from longlora.config import Recipe, build_recipe, load_recipe
from longlora.errors import DataError, RunFolderError
from longlora.evaluation.loss.texts import longest_text
from longlora.model.build import device_for_run, load_config, load_tokenizer
from longlora.model.rope import current_context

CPU_TOKENS = 8192
"""Tokens up to which a CPU measures without being asked for more: attention's cost grows with the square."""
_STEP = 256


def recipe_for_model(
    model: str,
    texts: Sequence[str],
    run_dir: Path,
    context_length: int | None,
    overrides: Sequence[str],
    console: Console,
) -> Recipe:
    """The recipe that measures `model` alone, as the variant ``base``.

    Args:
        texts: what is read, and where needles are hidden.
        context_length: tokens to measure up to; None means what the model covers, or less: as far as the longest text
            reaches, and at most `CPU_TOKENS` without a GPU. `console` is told.
        overrides: dotted settings such as ``eval.tasks=[needle]``.

    Raises:
        LongLoraError: the model, a text or a setting cannot be used, or no text has `context_length` tokens.
    """
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"name_or_path": model},
        "context": {"context_length": context_length or 1},
        "eval": {"variants": ["base"], "haystack": list(texts), "perplexity": {"texts": list(texts)}},
    }
    draft = build_recipe(values, overrides)  # what it says of the model and the texts decides the rest
    covered = draft.model.original_context_length or current_context(load_config(draft.model))
    context = _context(draft, texts, covered, context_length, console)
    values["context"]["context_length"] = context
    values["eval"]["perplexity"]["context_lengths"] = sorted({min(covered, context), context})
    values["eval"]["longppl"] = {"context_length": min(covered, context)}
    return build_recipe(values, overrides)


def require_free(recipe: Recipe) -> None:
    """Refuse a folder in which something else was measured or trained: its recipe would be lost.

    Raises:
        RunFolderError: it holds the recipe of a run, or of another model.
    """
    path = RunFolder(recipe.run_path).recipe
    if not path.exists():
        return
    before = load_recipe(path)
    if before.model != recipe.model or before.eval.variants != ["base"]:
        what = "a run" if before.model == recipe.model else "the measurements of another model"
        raise RunFolderError(f"{recipe.run_dir} holds {what}: give another --run-dir")


def _context(draft: Recipe, texts: Sequence[str], covered: int, wanted: int | None, console: Console) -> int:
    most = wanted or (covered if device_for_run().type == "cuda" else min(covered, CPU_TOKENS))
    if not wanted and most < covered:
        console.print(
            f"the model covers {covered} tokens, which takes long without a GPU: measured up to {most}; "
            f"--context-length {covered} measures all",
            highlight=False,
        )
    longest = longest_text(
        texts,
        load_tokenizer(draft.model),
        most,
        text_field=draft.data.text_field,
        add_special_tokens=draft.data.add_special_tokens,
    )
    tokens = len(longest.tokens)
    if tokens == most:
        return most
    if wanted:
        raise DataError(
            f"--context-length {wanted}: the longest text ({longest.name}) has {tokens} tokens; give a longer --text, "
            f"or --context-length {tokens}"
        )
    context = tokens // _STEP * _STEP or tokens
    console.print(
        f"the longest text ({longest.name}) has {tokens} tokens, less than {most}: measured up to {context}; a longer "
        "--text measures more",
        highlight=False,
    )
    return context
