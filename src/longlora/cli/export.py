"""``longlora export``: a finished run as a folder to give away or to serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from longlora.artifacts import RunFolder
from longlora.cli.options import RecipeArgument, console, read_recipe
from longlora.errors import RecipeError

if TYPE_CHECKING:
    from longlora.model.card import TrainingFacts
    from longlora.model.export import Exported


Kind = Literal["f16", "bf16", "q8_0"]


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command()(export)


def export(
    run: RecipeArgument,
    output: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")],
    legacy_rope: Annotated[
        bool, typer.Option(help="Write RoPE also under the names that readers before transformers 5 look for.")
    ] = True,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write a GGUF file and Ollama's Modelfile as well.")] = False,
    gguf_type: Annotated[Kind, typer.Option(help="Type of the weights in the GGUF file.")] = "f16",
    llama_cpp: Annotated[
        Path | None, typer.Option(help="Folder with llama.cpp's convert_hf_to_gguf.py (default: its command on PATH).")
    ] = None,
) -> None:
    """Write the merged model, its tokenizer and a model card, read everything back, and say how to serve it."""
    if not gguf and (llama_cpp is not None or gguf_type != "f16"):
        raise RecipeError("--llama-cpp and --gguf-type are about GGUF: add --gguf or leave them out")
    recipe = read_recipe(run, None)
    folder = RunFolder(recipe.run_path)
    if folder.recipe.exists():  # what the run was made with, whatever became of the recipe file since
        recipe = read_recipe(folder.root, None)
    llama_cpp = llama_cpp and llama_cpp.expanduser()
    from longlora.model.export import export_run
    from longlora.model.gguf_export import find_converter

    exported = export_run(
        folder,
        recipe,
        output.expanduser(),
        training=_training(folder),
        evaluation=_evaluation(folder),
        legacy_rope=legacy_rope,
        converter=find_converter(llama_cpp, gguf_type) if gguf else None,
    )
    _print(exported, console())


def _training(run: RunFolder) -> TrainingFacts | None:
    from longlora.evaluation.report.training_log import read_training
    from longlora.model.card import TrainingFacts

    rows = read_training(run)
    if not rows:
        return None
    first, last = rows[0], rows[-1]
    return TrainingFacts(last.step, first.loss, last.loss, last.tokens, last.seconds)


def _evaluation(run: RunFolder) -> str | None:
    """The report's main table as Markdown, with the notes without which it would mislead; None if not measured."""
    from longlora.evaluation.report.compare import read_comparison
    from longlora.evaluation.report.markdown import to_markdown
    from longlora.evaluation.report.page import Page, Paragraph, Section
    from longlora.evaluation.report.records import VARIANTS
    from longlora.evaluation.report.summary import summarize

    if not any(run.evaluation(variant).exists() for variant in VARIANTS):
        return None
    summary = summarize(read_comparison([run]))
    notes = [
        "Measured with full attention. base: the model as it came; RoPE only: the same weights with rescaled rotary "
        "position embeddings; trained: this model. Intervals are 95 %.",
        *summary.notes,
        *(f"Not measured: {name}." for name in summary.missing),
    ]
    section = Section("Evaluation", (*(Paragraph(note) for note in notes), summary.table))
    text = to_markdown(Page("", "", (section,)))
    return text.partition("## Evaluation")[2].strip()


def _print(exported: Exported, out: Console) -> None:
    from longlora.model.card import rope_text

    model = exported.model
    out.print(
        f"exported: {escape(str(exported.folder))}, read back: {model.context_length:,} tokens, "
        f"{escape(rope_text(model.rope_parameters))}; {model.parameters:,} parameters in {model.tensors:,} tensors of "
        f"{model.dtype}, embeddings {'tied' if model.tied else 'not tied'}",
        highlight=False,
    )
    if exported.gguf is not None:
        file = exported.gguf
        rope = file.rope_type if file.rope_factor is None else f"{file.rope_type} x{file.rope_factor:g}"
        out.print(
            f"GGUF: {escape(file.name)}, read back: {file.context_length:,} tokens, RoPE {rope}, base "
            f"{file.rope_base:g}; {file.tensors:,} tensors, {file.vocabulary:,} tokens in its vocabulary",
            highlight=False,
        )
    for engine, command in exported.commands.items():
        out.print(f"{engine}: {escape(command)}", highlight=False, soft_wrap=True)
