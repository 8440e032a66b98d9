"""A page in the browser: load a document, see whether it fits, ask, and watch the answer come with its numbers."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlora.errors import LongLoraError, ModelError
from longlora.inference.address import require_free
from longlora.inference.demo_html import CSS, answer_html, state_html, title_html
from longlora.inference.files import MAX_FILE_BYTES, read_file
from longlora.inference.prompt import Message
from longlora.inference.session import LongSession, Sampling

if TYPE_CHECKING:
    import gradio

_TYPES = [".txt", ".md", ".html", ".htm", ".pdf"]
_ONE_AT_A_TIME = "model"
_DELETE_AFTER_SECONDS = 3600
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


@dataclass(frozen=True)
class _Loaded:
    """A document that is open in one browser window."""

    text: str
    tokens: int
    note: str


class _Page:
    """What the page does, without its layout. Everything it shows is HTML of `demo_html`."""

    def __init__(self, session: LongSession) -> None:
        self._session = session
        self._stopped: set[str] = set()
        """Windows whose answer a person wants no more of."""

    def load(self, path: str | None, answer_tokens: float) -> tuple[_Loaded | None, str, str, str]:
        """The document of an uploaded file (None if it cannot be used), the line about it, and no answer yet."""
        nothing = answer_html(""), state_html("")
        if path is None:
            return None, self.fit(None, answer_tokens), *nothing
        try:
            file = read_file(Path(path))
        except LongLoraError as error:
            # The folder of uploads means nothing to a person.
            line = str(error).replace(str(Path(path).parent) + os.sep, "")
            return None, state_html(line, refused=True), *nothing
        loaded = _Loaded(file.text, self._session.count(file.text), file.note.partition(": ")[2])
        return loaded, self.fit(loaded, answer_tokens), *nothing

    def fit(self, loaded: _Loaded | None, answer_tokens: float) -> str:
        """The line about a document: its tokens against the window."""
        if loaded is None:
            return state_html(f"no document yet; text, Markdown, HTML or PDF up to {MAX_FILE_BYTES // 2**20} MiB")
        window = self._session.window
        line = f"{loaded.tokens:,} tokens of the model's window of {window:,}"
        missing = loaded.tokens + int(answer_tokens) - window
        if missing > 0:
            line += f"; too long by {missing:,} tokens with {int(answer_tokens):,} kept for the answer"
        if loaded.note:
            line += f"; {loaded.note}"
        return state_html(line, refused=missing > 0, share=loaded.tokens / window)

    def start(self, window_id: str) -> tuple[str, str]:
        """What is shown until the model is free."""
        self._stopped.discard(window_id)
        return answer_html(""), state_html("waiting for the model")

    def stop(self, window_id: str) -> None:
        """End the answer of a window after the pass that is under way."""
        self._stopped.add(window_id)

    def ask(
        self,
        window_id: str,
        loaded: _Loaded | None,
        question: str,
        answer_tokens: float,
        temperature: float,
        top_p: float,
        seed: float | None,
    ) -> Iterator[tuple[str, str]]:
        """(answer so far, line with its numbers), again and again. An empty box, None, is a seed of 0."""
        if not question.strip():
            yield answer_html(""), state_html("no question: type one", refused=True)
            return
        message = Message("user", question.strip(), (loaded.text,) if loaded else ())
        try:
            sampling = Sampling(float(temperature), float(top_p), int(seed or 0))
            answer = self._session.ask([message], max_new_tokens=int(answer_tokens), sampling=sampling)
            for _ in answer:
                if window_id in self._stopped:
                    break
                numbers = answer.numbers
                reading = numbers.to_first_token is None
                share = numbers.read / numbers.lengths.prompt * reading
                yield answer_html(answer.text, going=not reading), state_html(numbers.line(), share=share)
            if window_id in self._stopped:
                answer.numbers.ended = "stopped"
            yield answer_html(answer.text), state_html(answer.numbers.line())
        except LongLoraError as error:
            yield answer_html(""), state_html(str(error), refused=True)


def build_demo(session: LongSession, name: str) -> gradio.Blocks:
    """The page, not launched yet. `name` is what a person calls the model.

    Raises:
        ModelError: gradio is missing.
    """
    gr = require_gradio()
    page = _Page(session)
    with gr.Blocks(
        title=f"longlora: {name}",
        analytics_enabled=False,
        delete_cache=(_DELETE_AFTER_SECONDS, _DELETE_AFTER_SECONDS),
    ) as blocks:
        gr.HTML(title_html(name, session.window), elem_id="title")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                usual = max(1, min(512, session.window // 8))
                file = gr.File(label="Document", show_label=False, file_types=_TYPES, height=130, elem_id="file")
                document = gr.HTML(page.fit(None, usual), elem_id="document")
                with gr.Accordion("Options", open=False, elem_id="options"):
                    options = _options(gr, session.window, usual)
            with gr.Column(scale=3, min_width=320):
                question = gr.Textbox(
                    label="Question", lines=2, max_lines=6, elem_id="question", autofocus=True,
                    placeholder="What does the document say about ...?",
                )  # fmt: skip
                with gr.Row(elem_id="buttons"):
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop", visible=False)
                numbers = gr.HTML(state_html(""), elem_id="numbers")
                answer = gr.HTML(answer_html(""), elem_id="answer")
        loaded = gr.State(None)
        window_id = gr.State(lambda: secrets.token_hex(8))
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        file.change(page.load, [file, options[0]], [loaded, document, answer, numbers], **quiet)
        options[0].release(page.fit, [loaded, options[0]], [document], **quiet)

        def begin(window: str) -> tuple[Any, ...]:
            return *page.start(window), gr.update(interactive=False), gr.update(visible=True, interactive=True)

        def stopping(window: str) -> Any:
            page.stop(window)
            return gr.update(interactive=False)

        begun = gr.on(
            [ask.click, question.submit], begin, [window_id], [answer, numbers, ask, stop], queue=False, **quiet
        )
        asked = begun.then(
            page.ask, [window_id, loaded, question, *options], [answer, numbers],
            concurrency_limit=1, concurrency_id=_ONE_AT_A_TIME, **quiet,
        )  # fmt: skip
        stop.click(stopping, [window_id], [stop], queue=False, **quiet)
        asked.then(lambda: (gr.update(interactive=True), gr.update(visible=False)), None, [ask, stop], **quiet)
    return blocks


def _options(gr: Any, window: int, usual: int) -> list[Any]:
    """Controls of what `_Page.ask` takes after the question, in its order."""
    longest = max(2, window // 2)
    return [
        gr.Slider(1, longest, value=usual, step=1, label="Most tokens of an answer", elem_id="budget"),
        gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: most likely token)"),
        gr.Slider(0.05, 1, value=1, step=0.05, label="Top p"),
        gr.Number(0, precision=0, minimum=0, label="Seed"),
    ]


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
        pwa=False, run_history=False, footer_links=[], inbrowser=False, css=CSS, theme=gr.themes.Base(**_FONTS),
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
