"""``longlora ask``, ``chat``, ``serve`` and ``demo``: a model answers about long documents."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longlora.cli.options import console
from longlora.errors import DataError
from longlora.inference.address import LOOPBACK

if TYPE_CHECKING:
    from longlora.inference.files import FileText
    from longlora.inference.lengths import Numbers
    from longlora.inference.session import LongSession

_INTERRUPTED = 130

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Merged model, adapter or run folder, or a hub id.")
]
ServedArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Merged model, a run folder that holds one, or a hub id; no adapter.")
]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens kept free for an answer.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token; higher is more random.")]
TopP = Annotated[float, typer.Option(help="Draw from the most likely tokens of this probability together.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn.")]
ChunkTokens = Annotated[int, typer.Option(help="Tokens of a forward pass while a prompt is read.")]
Template = Annotated[
    Path | None, typer.Option("--chat-template", help="Jinja chat template instead of the model's own.")
]
Host = Annotated[str, typer.Option(help="Address to listen on; any other than this machine's own is open to others.")]
Port = Annotated[int, typer.Option(help="Port to listen on.")]


def add_to(app: typer.Typer) -> None:
    """Register the verbs of this file."""
    app.command()(ask)
    app.command()(chat)
    app.command()(serve)
    app.command()(demo)


def ask(
    model: ModelArgument,
    words: Annotated[
        list[str], typer.Argument(metavar='FILE... "QUESTION"', help="Text, Markdown, HTML or PDF files; - is stdin.")
    ],
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    chunk_tokens: ChunkTokens = 2048,
    chat_template: Template = None,
) -> None:
    """Answer a question about files: the answer on stdout as it comes, its numbers on stderr."""
    *files, question = words
    _require_question(files, question)
    texts = _read_files(files)
    from longlora.inference.prompt import Message
    from longlora.inference.session import Sampling
    from longlora.inference.terminal import printable

    sampling = Sampling(temperature, top_p, seed)
    session = _session(model, chunk_tokens, chat_template)
    message = Message("user", question, tuple(text.text for text in texts))
    answer = session.ask([message], max_new_tokens=max_new_tokens, sampling=sampling)
    try:
        for piece in answer:
            _show_reading(answer.numbers)
            print(printable(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    finally:
        print(flush=True)
        _say(answer.numbers.line())


def chat(
    model: ModelArgument,
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE...]", help="Documents to talk about.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    chunk_tokens: ChunkTokens = 2048,
    chat_template: Template = None,
) -> None:
    """Talk about files: /file PATH, /clear, /exit; Ctrl-C stops an answer, twice it ends."""
    _read_files([str(path) for path in files or []])
    from longlora.inference.chat import Chat
    from longlora.inference.session import Sampling

    sampling = Sampling(temperature, top_p, seed)
    session = _session(model, chunk_tokens, chat_template)
    out = console()
    Chat(session, out, input, max_new_tokens=max_new_tokens, sampling=sampling).run(files or [])


def serve(model: ServedArgument, host: Host = LOOPBACK, port: Port = 8000) -> None:
    """Serve a merged model over an OpenAI-compatible API, by transformers' own server."""
    from longlora.inference.address import require_free, warning

    require_free(host, port)
    if Path(model).exists():
        # A request may name any model; nothing is to be downloaded for one.
        os.environ["HF_HUB_OFFLINE"] = "1"
    from longlora.inference.serve import serve as run_server
    from longlora.inference.serve import served_model, served_window

    name = served_model(model)
    _say(warning(host, "the server"))
    _say(f"serving on http://{host}:{port}/v1 with model={name}; Ctrl-C ends")
    if window := served_window(name):
        _say(f"its window is {window:,} tokens, and the server does not refuse what is longer: `longlora ask` does")
    with contextlib.suppress(KeyboardInterrupt):
        run_server(name, host, port)


def demo(
    model: ModelArgument,
    host: Host = LOOPBACK,
    port: Port = 7860,
    chunk_tokens: ChunkTokens = 2048,
    chat_template: Template = None,
) -> None:
    """Show a page in the browser: load a document, see its length against the window, ask."""
    from longlora.inference.address import require_free, warning
    from longlora.inference.demo import build_demo, launch_demo, require_gradio

    require_gradio()
    require_free(host, port)
    _say(warning(host, "the page"))
    blocks = build_demo(_session(model, chunk_tokens, chat_template), Path(model).name or model)
    _say(f"page on http://{host}:{port}; Ctrl-C ends")
    launch_demo(blocks, host, port)


def _require_question(files: list[str], question: str) -> None:
    if _is_file(question) or question == "-":
        raise DataError(f"the last argument is the question, and {question} is a file: add the question behind it")
    if not question.strip():
        raise DataError("the question is empty: write one behind the files")
    if not files:
        raise DataError(f"no file before the question {question!r}: give at least one, - for stdin, or use chat")


def _is_file(words: str) -> bool:
    try:
        return Path(words).is_file()
    except (OSError, ValueError):  # a question may be longer than any name, which Python before 3.12 raises about
        return False


def _read_files(files: list[str]) -> list[FileText]:
    """Before the model is loaded, which takes longer: a file that cannot be read is said at once."""
    from longlora.inference.files import MAX_FILE_BYTES, read_file, text_of

    texts = []
    for name in files:
        if name == "-":
            texts.append(text_of(sys.stdin.buffer.read(MAX_FILE_BYTES + 1), "stdin"))
        else:
            texts.append(read_file(Path(name).expanduser()))
        _say(texts[-1].note)
    return texts


def _session(model: str, chunk_tokens: int, template: Path | None) -> LongSession:
    from longlora.inference.load import load
    from longlora.inference.session import LongSession

    return LongSession(*load(model, template), chunk_tokens=chunk_tokens)


def _show_reading(numbers: Numbers) -> None:
    """How far a long prompt is read, in one line of a terminal that the answer takes over."""
    if sys.stderr.isatty() and numbers.tokens <= 1:
        line = numbers.line() if numbers.to_first_token is None else ""
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def _say(line: str | None) -> None:
    if line:
        print(line, file=sys.stderr, flush=True)
