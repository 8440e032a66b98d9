"""The page: what it says without a browser, and in headless Chromium what a person sees."""

from __future__ import annotations

import itertools
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from inference_cases import WINDOW, askable_model, askable_tokenizer
from matplotlib.image import imread

from longlora.errors import DataError, ModelError
from longlora.inference.demo import _Page, build_demo, launch_demo
from longlora.inference.prompt import Message
from longlora.inference.session import LongSession

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = "<img src=x onerror=alert(1)> ${1+1} {{2+2}}.txt"
DOCUMENT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 6


@pytest.fixture(scope="module")
def session() -> LongSession:
    return LongSession(askable_model(), askable_tokenizer(), chunk_tokens=32)


def test_what_the_page_says_of_a_document(session: LongSession, tmp_path: Path) -> None:
    page = _Page(session)
    (tmp_path / HOSTILE).write_text("a" * 100)
    loaded, line = page.load(str(tmp_path / HOSTILE), 64)
    assert loaded is not None
    assert (loaded.text, loaded.tokens) == ("a" * 100, 100)
    assert "&lt;img src=x onerror=alert(1)&gt;" in line
    assert "100 tokens of the model&#x27;s window of 1,024" in line
    assert "<img" not in line
    assert "refused" not in line
    (tmp_path / "long.txt").write_text("a" * WINDOW)
    loaded, line = page.load(str(tmp_path / "long.txt"), 64)
    assert loaded is not None
    assert "too long by 64 tokens with 64 for the answer" in line
    assert "refused" in line
    (tmp_path / "b.txt").write_bytes(b"\0")
    loaded, line = page.load(str(tmp_path / "b.txt"), 64)
    assert loaded is None
    assert ">b.txt is a binary file" in line  # without the folder of uploads
    assert page.load(None, 64)[0] is None


def test_an_answer_comes_in_pieces_with_its_progress_and_numbers(session: LongSession, tmp_path: Path) -> None:
    page = _Page(session)
    (tmp_path / "a.txt").write_text(DOCUMENT)
    loaded, _ = page.load(str(tmp_path / "a.txt"), 20)
    shown = list(page.ask(loaded, " What time? ", 20, 0, 1, 0))
    assert "reading: 32 of" in shown[0][1]
    assert [text for text, _ in shown][-1] == max((text for text, _ in shown), key=len) != ""
    assert all(later.startswith(text) for (text, _), (later, _) in itertools.pairwise(shown))
    assert "first token after" in shown[-1][1]
    assert "tokens/s" in shown[-1][1]
    for asked, expected in (
        (("", 20, 0, 1, 0), "no question"),
        (("Why?", WINDOW, 0, 1, 0), "the model&#x27;s window is 1,024"),
        (("Why?", 20, -1, 1, 0), "temperature -1 is below 0"),
    ):
        [(text, line)] = page.ask(loaded, *asked)
        assert text == ""
        assert expected in line
        assert "refused" in line


def test_a_missing_gradio_is_one_line(session: LongSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModelError, match=r"the page needs gradio: pip install 'longlora\[demo\]'"):
        build_demo(session, "tiny")


@pytest.fixture(scope="module")
def address(session: LongSession) -> Iterator[str]:
    """The page of a model, on a free port."""
    pytest.importorskip("gradio", minversion="6")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blocks = build_demo(session, "tiny <b>model</b>")
    launch_demo(blocks, "127.0.0.1", port, wait=False)
    with pytest.raises(DataError, match=f"cannot listen on 127.0.0.1 port {port}"):
        launch_demo(blocks, "127.0.0.1", port, wait=False)
    yield f"http://127.0.0.1:{port}"
    blocks.close(verbose=False)


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on the path")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.slow
def test_upload_ask_and_see_the_answer_come(address: str, browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.set_default_timeout(90_000)
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
    page.goto(address)

    def upload(name: str, content: str, expected: str) -> str:
        (tmp_path / name).write_text(content)
        if clear := page.query_selector('#file [aria-label="Clear"]'):
            clear.click()
            page.wait_for_selector("#document >> text=no document")
        page.set_input_files("#file input[type=file]", str(tmp_path / name))
        page.wait_for_selector(f"#document >> text={expected}")
        return str(page.inner_text("#document"))

    assert page.inner_text("#title h1") == "tiny <b>model</b>"
    assert upload("april.txt", DOCUMENT, "april.txt").startswith("april.txt: 444 tokens of the model's window of 1,024")
    # What the answer box holds, at every moment that it changes.
    page.evaluate("""() => { const box = document.querySelector('#answer textarea'); window.seen = [];
      setInterval(() => { if (window.seen.at(-1) !== box.value) window.seen.push(box.value) }, 5) }""")
    page.fill("#question textarea", "What time?")
    page.click("#ask")
    message = Message("user", "What time?", (DOCUMENT,))
    expected = "".join(LongSession(askable_model(), askable_tokenizer()).ask([message], max_new_tokens=WINDOW // 8))
    expected = expected.replace("\r", "\n")  # as every text box does
    page.wait_for_function("text => document.querySelector('#answer textarea').value === text", arg=expected)
    assert "first token after" in page.inner_text("#numbers")
    assert "tokens/s" in page.inner_text("#numbers")
    seen = page.evaluate("() => window.seen.filter(text => text)")
    assert len(seen) > 3, "the answer came at once, not streamed"
    assert all(later.startswith(text) for text, later in itertools.pairwise(seen))
    assert page.input_value("#answer textarea") == seen[-1]
    picture = tmp_path / "page.png"
    page.screenshot(path=picture)
    pixels = (numpy.asarray(imread(picture))[:, :, :3] * 255).round()
    assert numpy.median(pixels) > 230  # paper
    assert (pixels.mean(axis=2) < 90).mean() > 0.004  # ink

    upload("long.txt", "x" * 2000, "too long by")
    page.click("#ask")
    page.wait_for_selector("#numbers .refused >> text=document 2,000 + question 10")
    assert "the model's window is 1,024" in page.inner_text("#numbers")
    assert page.input_value("#answer textarea") == ""
    upload(HOSTILE, "short", "5 tokens of")
    page.set_viewport_size({"width": 390, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert errors == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
