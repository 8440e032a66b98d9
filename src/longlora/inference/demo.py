"""A page in the browser: load a document, see whether it fits, ask, and watch the answer come with its numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlora.errors import LongLoraError, ModelError
from longlora.inference.address import require_free
from longlora.inference.files import MAX_FILE_BYTES, read_file
from longlora.inference.prompt import Message
from longlora.inference.session import LongSession, Sampling

if TYPE_CHECKING:
    import gradio

_TYPES = [".txt", ".md", ".html", ".htm", ".pdf"]
_ONE_AT_A_TIME = "model"
_DELETE_AFTER_SECONDS = 3600
# Colours of both schemes are the theme's own, so that the page follows the browser's.
_CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.35rem; margin: 0; }
#title p { margin: .2rem 0 0; opacity: .75; }
.state { font-size: .92rem; min-height: 1.5em; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.state .bar { height: .5rem; margin-top: .45rem; border-radius: .25rem; background: var(--border-color-primary); }
.state .bar div { height: 100%; border-radius: inherit; background: var(--color-accent); }
.state.refused { color: var(--error-text-color, #b91c1c); }
.state.refused .bar div { background: #dc2626; }
footer { display: none !important; }
"""
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


@dataclass(frozen=True)
class _Loaded:
    """A document that is open in one browser window."""

    text: str
    tokens: int


class _Page:
    """What the page does, without its layout. All text that is not ours is escaped."""

    def __init__(self, session: LongSession) -> None:
        self._session = session

    def load(self, path: str | None, answer_tokens: float) -> tuple[_Loaded | None, str]:
        """The document of an uploaded file, and the line about it; None if it cannot be used."""
        if path is None:
            return None, _state("no document")
        try:
            file = read_file(Path(path))
        except LongLoraError as error:
            # The folder of uploads means nothing to a person.
            return None, _state(str(error).replace(str(Path(path).parent) + os.sep, ""), refused=True)
        tokens, window = self._session.count(file.text), self._session.window
        line = f"{file.name}: {tokens:,} tokens of the model's window of {window:,}"
        missing = tokens + int(answer_tokens) - window
        if missing > 0:
            line += f"; too long by {missing:,} tokens with {int(answer_tokens):,} for the answer"
        if file.note:
            line += f"; {file.note.partition(': ')[2]}"
        return _Loaded(file.text, tokens), _state(line, refused=missing > 0, share=tokens / window)

    def ask(
        self,
        loaded: _Loaded | None,
        question: str,
        answer_tokens: float,
        temperature: float,
        top_p: float,
        seed: float,
    ) -> Iterator[tuple[str, str]]:
        """(answer so far, line with its numbers), again and again."""
        if not question.strip():
            yield "", _state("no question: type one", refused=True)
            return
        message = Message("user", question.strip(), (loaded.text,) if loaded else ())
        try:
            sampling = Sampling(float(temperature), float(top_p), int(seed))
            answer = self._session.ask([message], max_new_tokens=int(answer_tokens), sampling=sampling)
            for _ in answer:
                numbers = answer.numbers
                reading = numbers.to_first_token is None
                yield answer.text, _state(numbers.line(), share=numbers.read / numbers.lengths.prompt * reading)
            yield answer.text, _state(answer.numbers.line())
        except LongLoraError as error:
            yield "", _state(str(error), refused=True)


def build_demo(session: LongSession, name: str) -> gradio.Blocks:
    """The page, not launched yet. `name` is what a person calls the model.

    Raises:
        ModelError: gradio is missing.
    """
    gr = require_gradio()
    page = _Page(session)
    title = f"<h1>{escape(name)}</h1><p>Questions about one document, answered within {session.window:,} tokens.</p>"
    with gr.Blocks(
        title=f"longlora: {name}",
        analytics_enabled=False,
        delete_cache=(_DELETE_AFTER_SECONDS, _DELETE_AFTER_SECONDS),
    ) as blocks:
        gr.HTML(title, elem_id="title")
        loaded = gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                file = gr.File(label=f"Document ({', '.join(_TYPES)})", file_types=_TYPES, height=150, elem_id="file")
                document = gr.HTML(_state("no document"), elem_id="document")
                with gr.Accordion("Options", open=False):
                    budget = gr.Slider(
                        1, max(2, session.window // 2), value=max(1, min(512, session.window // 8)), step=1,
                        label="Most tokens of an answer", elem_id="budget",
                    )  # fmt: skip
                    temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: most likely token)")
                    top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top p")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed")
            with gr.Column(scale=3, min_width=320):
                question = gr.Textbox(label="Question", lines=2, max_lines=6, elem_id="question", autofocus=True)
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
                answer = gr.Textbox(label="Answer", lines=10, max_lines=30, interactive=False, elem_id="answer")
                numbers = gr.HTML(_state(""), elem_id="numbers")
        private = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": _ONE_AT_A_TIME}
        gr.on(
            [file.change, budget.release], page.load, [file, budget], [loaded, document], show_progress="hidden",
            **private,
        )  # fmt: skip
        running = gr.on(
            [ask.click, question.submit], page.ask, [loaded, question, budget, temperature, top_p, seed],
            [answer, numbers], show_progress="hidden", **private,
        )  # fmt: skip
        stop.click(None, cancels=[running], api_visibility="private")
    return blocks


def launch_demo(blocks: gradio.Blocks, host: str, port: int, *, wait: bool = True) -> None:
    """Show the page on `host`; returns when it is interrupted, or at once without `wait`.

    Nothing is shared, counted or fetched from elsewhere, and no file of this machine but an upload can be read.

    Raises:
        DataError: nothing can listen there.
    """
    gr = require_gradio()
    require_free(host, port)
    blocks.launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=not wait,
        max_file_size=MAX_FILE_BYTES, allowed_paths=[], enable_monitoring=False, ssr_mode=False, mcp_server=False,
        pwa=False, run_history=False, footer_links=[], inbrowser=False, css=_CSS, theme=gr.themes.Base(**_FONTS),
    )  # fmt: skip


def require_gradio() -> Any:
    """gradio, with its counting of users switched off.

    Raises:
        ModelError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio
    except ImportError:
        raise ModelError("the page needs gradio: pip install 'longlora[demo]'") from None
    return gradio


def _state(line: str, *, refused: bool = False, share: float = 0.0) -> str:
    """A line for a person as HTML, with a bar if something is partly full or partly read."""
    bar = f'<div class="bar"><div style="width: {min(1.0, share):.1%}"></div></div>' if share else ""
    return f'<div class="state{" refused" if refused else ""}" role="status">{escape(line)}{bar}</div>'
