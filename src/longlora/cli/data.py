"""``longlora data``: training sets out of a user's own documents."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longlora.cli.options import console
from longlora.config import ModelConfig
from longlora.errors import DataError

if TYPE_CHECKING:
    from longlora.data.documents import Document
    from longlora.data.longqa.build import Maker
    from longlora.data.longqa.text import TokenCounter

data = typer.Typer(help="Training sets out of your own documents.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.add_typer(data, name="data")


@data.callback()
def _group() -> None:
    """Training sets out of your own documents."""


@data.command()
def longqa(
    files: Annotated[
        list[str], typer.Argument(metavar="FILES...", help="Texts: .txt, .md, .jsonl, .parquet, folders, datasets.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the set; begun by the same command, it is gone on with.")],
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of an example; repeat for several lengths. [default: 4096]")
    ] = None,
    per_document: Annotated[int, typer.Option(min=1, help="Examples of each document at each length, at most.")] = 50,
    tasks: Annotated[str, typer.Option(help="Offline tasks, with commas; all if left out.")] = "",
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Decides windows, questions, wordings and the split.")
    ] = 0,
    heldout: Annotated[
        list[str] | None,
        typer.Option(help="Share of the documents to hold out, or names of documents (repeat). [default: 0.2]"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id whose tokenizer counts; else characters / 4.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible endpoint that writes the questions.")
    ] = None,
    endpoint_model: Annotated[str | None, typer.Option(help="Name of the model to ask there.")] = None,
    key_env: Annotated[str | None, typer.Option(help="Environment variable with the endpoint's key.")] = None,
    text_field: Annotated[str, typer.Option(help="Column with the text in .jsonl, .parquet and datasets.")] = "text",
    replace: Annotated[bool, typer.Option("--replace", help="Start anew in a folder with other settings.")] = False,
) -> None:
    """Make long questions and answers with their evidence, by rules or through an endpoint."""
    from longlora.data.formats import printable
    from longlora.data.longqa.build import LongQASettings, build_longqa

    out = console()
    maker = _maker(tasks, endpoint, endpoint_model, key_env)
    share, names = _held_out([printable(value) for value in heldout or []])
    settings = LongQASettings(
        lengths=tuple(sorted(set(tokens or [4096]))),
        per_document=per_document,
        seed=seed,
        heldout_share=share,
        heldout_names=names,
        tokens_by=f"the tokenizer of {model}" if model else "characters / 4",
    )
    settings.check()
    documents, read = _read(files, text_field)
    out.print(read, highlight=False, markup=False)
    facts = build_longqa(
        documents,
        output,
        settings,
        maker,
        _counter(model),
        command=printable(shlex.join(["longlora", *sys.argv[1:]])),
        replace=replace,
        say=lambda line: out.print(line, highlight=False, markup=False),
    )
    for name, count in facts.too_short.items():
        out.print(f"left out, too short: {name} ({count} tokens)", highlight=False, markup=False)
    for name, original in facts.copies:
        out.print(f"left out: {name}, a copy of {original}", highlight=False, markup=False)
    out.print(f"{printable(str(output))}: {facts.summary()}", highlight=False, markup=False)


def _maker(tasks: str, endpoint: str | None, endpoint_model: str | None, key_env: str | None) -> Maker:
    from longlora.data.longqa.endpoint import Endpoint
    from longlora.data.longqa.tasks import Offline, known_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if endpoint is None:
        if endpoint_model or key_env:
            raise DataError("--endpoint-model and --key-env belong to an endpoint: give --endpoint URL as well")
        return Offline(known_tasks(names))
    if not endpoint_model:
        raise DataError(f"--endpoint {endpoint} needs the name of a model there: give --endpoint-model NAME")
    if names:
        raise DataError("--tasks are made without an endpoint: leave out either --tasks or --endpoint")
    return Endpoint(endpoint, endpoint_model, key_env)


def _held_out(values: Sequence[str]) -> tuple[float, tuple[str, ...]]:
    """A share, or names of documents."""
    if not values:
        return 0.2, ()
    try:
        share = float(values[0])
    except ValueError:
        return 0.0, tuple(values)
    if len(values) > 1:
        raise DataError(f"--heldout {values[0]} is a share and {values[1]!r} is given too: give a share or names")
    return share, ()


def _read(files: Sequence[str], text_field: str) -> tuple[list[Document], str]:
    from longlora.data.documents import ReadReport, read_documents

    report = ReadReport()
    try:
        documents = list(read_documents(files, text_field, report))
    except DataError as error:
        raise DataError(str(error).replace("data.text_field=NAME", "--text-field NAME")) from None
    if not documents:
        raise DataError(f"no document is left ({report.summary()}): give UTF-8 texts with words in them")
    return documents, report.summary()


def _counter(model: str | None) -> TokenCounter:
    from longlora.data.longqa.text import quarter_of_characters

    if model is None:
        return quarter_of_characters
    from longlora.model.build import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(name_or_path=model))

    def count(texts: Sequence[str]) -> list[int]:
        encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    return count
