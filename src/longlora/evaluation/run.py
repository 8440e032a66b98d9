"""Measuring the variants of a recipe: documents read and prompts answered, one JSON file of rows for each variant out.

Every finished row is kept at once (`samples.py`), so that a measurement that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from longlora.artifacts import RunFolder, write_json
from longlora.config import ModelConfig, Recipe
from longlora.errors import DataError, ModelError
from longlora.evaluation.loss.longppl import KeyDocument, long_enough
from longlora.evaluation.material import Material, build_material
from longlora.evaluation.measurement import Measurement
from longlora.evaluation.variants import Contexts, contexts_of, load_variant, require_variants, tokenizer_of
from longlora.model.build import device_for_run, load_config, load_model, load_tokenizer, tokenizer_hash
from longlora.model.rope import current_context


def evaluate(recipe: Recipe, console: Console) -> list[Path]:
    """Measure the variants of `recipe.eval` and write ``eval/VARIANT.json`` for each.

    ``trained`` is the merged model of the run, or its adapter merged in memory where there is no ``merged/`` yet.

    Raises:
        LongLoraError: there is no trained model, no document long enough, or something does not fit; or another process
            measures the same variant of the run.
    """
    run = RunFolder(recipe.run_path)
    tokenizer = tokenizer_of(recipe)
    contexts = contexts_of(recipe, load_config(recipe.model))
    material = _material(recipe, run, tokenizer, contexts, console)
    require_variants(recipe, run)
    keys = _key_documents(recipe, run, tokenizer, contexts, material, console)
    paths = []
    for variant in recipe.eval.variants:
        _warn_beyond(recipe, contexts, material, variant, console)
        with run.lock_evaluation(variant, "longlora eval"):
            model = load_variant(recipe, run, variant).to(device_for_run())
            measurement = Measurement(recipe, model, tokenizer, run.samples(variant), console, variant)
            rows = measurement.of(material, _windows(recipe, contexts), keys, _longppl_context(recipe, contexts))
            about = {
                "schema": 2,
                "variant": variant,
                "original_context_length": contexts.original,
                "context_length": contexts.extended,
                "covered_context_length": contexts.covered(variant),
            }
            paths.append(run.evaluation(variant))
            write_json(paths[-1], about | rows)
        del model, measurement
        gc.collect()
    return paths


def find_prompt(recipe: Recipe, sha256: str) -> str:
    """The text of the prompt whose row has this ``prompt_sha256`` (or one that begins so), made again from the recipe.

    Raises:
        DataError: no prompt, or more than one, of this recipe begins so.
    """
    tokenizer = tokenizer_of(recipe)
    contexts = contexts_of(recipe, load_config(recipe.model))
    run = RunFolder(recipe.run_path)
    material = _material(recipe, run, tokenizer, contexts, Console(quiet=True))
    asked = material.asked()
    found = {prompt.sha256: prompt for prompt in asked if prompt.sha256.startswith(sha256.lower())}
    if len(found) != 1:
        raise DataError(
            f"prompt {sha256!r}: {len(found) or 'none'} of the {len(asked)} prompts of this recipe begin so; "
            "give the recipe that the row was measured with, and more digits"
        )
    return str(tokenizer.decode(next(iter(found.values())).tokens))


def _material(
    recipe: Recipe, run: RunFolder, tokenizer: PreTrainedTokenizerBase, contexts: Contexts, console: Console
) -> Material:
    windows, longppl_context = _windows(recipe, contexts), _longppl_context(recipe, contexts)
    return build_material(recipe, run, tokenizer, windows, longppl_context, console)


def _longppl_context(recipe: Recipe, contexts: Contexts) -> int:
    return recipe.eval.longppl.context_length or contexts.original


def _windows(recipe: Recipe, contexts: Contexts) -> list[int]:
    given = recipe.eval.perplexity.context_lengths
    return given or sorted({contexts.original, contexts.extended})


def _warn_beyond(recipe: Recipe, contexts: Contexts, material: Material, variant: str, console: Console) -> None:
    covered = contexts.covered(variant)
    lengths = {int(prompt.facts["length"]) for prompt in material.asked()}
    if "perplexity" in recipe.eval.tasks:
        lengths |= set(_windows(recipe, contexts))
    if "longppl" in recipe.eval.tasks:
        lengths.add(_longppl_context(recipe, contexts))
    if beyond := sorted(length for length in lengths if length > covered):
        console.print(
            f"{variant}: its RoPE covers {covered} tokens; {', '.join(map(str, beyond))} tokens lie beyond and are "
            "marked in the report",
            highlight=False,
        )


def _key_documents(
    recipe: Recipe,
    run: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Contexts,
    material: Material,
    console: Console,
) -> list[KeyDocument]:
    """Documents of LongPPL with the key tokens that the evaluator finds in them; none where it is not measured."""
    if "longppl" not in recipe.eval.tasks:
        return []
    settings, context = recipe.eval.longppl, _longppl_context(recipe, contexts)
    documents, left_out = long_enough([(text.name, text.tokens) for text in material.plain], context, settings)
    if left_out:
        console.print(f"longppl: {left_out} documents are too short and left out", highlight=False)
    evaluator, covered = recipe.model, contexts.original
    if settings.evaluator is not None:
        evaluator = ModelConfig(name_or_path=settings.evaluator, dtype=recipe.model.dtype)
        covered = context  # unless its config says less
        with contextlib.suppress(ModelError):
            covered = current_context(load_config(evaluator))
    if context > covered:
        console.print(
            f"longppl: RoPE of the evaluator covers {covered} tokens, less than eval.longppl.context_length {context}: "
            "what it finds beyond is of little worth",
            highlight=False,
        )
    other = load_tokenizer(evaluator)
    model = load_model(evaluator).to(device_for_run())
    pair = None if tokenizer_hash(other) == tokenizer_hash(tokenizer) else (tokenizer, other)
    samples = "longppl_evaluator"
    with run.lock_evaluation(samples, "longlora eval"):
        measurement = Measurement(recipe, model, tokenizer, run.samples(samples), console, "longppl evaluator")
        found = measurement.key_documents(documents, context, pair)
    del model, measurement
    gc.collect()
    return found
