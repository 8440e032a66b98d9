"""The page: what it says without a browser, and in headless Chromium what a person sees."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import pytest
from inference_cases import WINDOW, askable_model, askable_tokenizer
from matplotlib.image import imread

from longlora.errors import DataError, ModelError
from longlora.inference.demo import _Page, build_demo, launch_demo
from longlora.inference.demo_html import answer_html, state_html, title_html
from longlora.inference.files import MAX_FILE_BYTES
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
    loaded, line, answer, numbers = page.load(str(tmp_path / HOSTILE), 64)
    assert loaded is not None
    assert (loaded.text, loaded.tokens) == ("a" * 100, 100)
    assert "100 tokens of the model&#x27;s window of 1,024" in line
    assert "refused" not in line
    assert "The answer appears here" in answer  # that about the document before is gone
    assert numbers == state_html("")
    (tmp_path / "long.txt").write_text("a" * WINDOW)
    loaded, line, _, _ = page.load(str(tmp_path / "long.txt"), 64)
    assert loaded is not None
    assert "too long by 64 tokens with 64 kept for the answer" in line
    assert "refused" in line
    assert "too long by 4 tokens" in page.fit(loaded, 4)
    (tmp_path / HOSTILE).write_bytes(b"\0")
    loaded, line, _, _ = page.load(str(tmp_path / HOSTILE), 64)
    assert loaded is None
    assert "<span>&lt;img src=x onerror=alert(1)&gt; ${1+1} {{2+2}}.txt is a binary file" in line  # without its folder
    assert "<img" not in line
    loaded, line, _, _ = page.load(None, 64)
    assert loaded is None
    assert "no document" in line


def test_an_answer_comes_in_pieces_with_its_progress_and_numbers(session: LongSession, tmp_path: Path) -> None:
    page = _Page(session)
    (tmp_path / "a.txt").write_text(DOCUMENT)
    loaded = page.load(str(tmp_path / "a.txt"), 20)[0]
    shown = list(page.ask("w", loaded, " What time? ", 20, 0, 1, 0))
    assert "reading: 32 of" in shown[0][1]
    assert '<div class="bar">' in shown[0][1]
    texts = [re.sub("<[^>]*>", "", answer) for answer, _ in shown if "empty" not in answer]
    assert texts[-1] == max(texts, key=len) != ""
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
    assert "going" in shown[-2][0]
    assert "going" not in shown[-1][0]
    assert "first token after" in shown[-1][1]
    assert "tokens/s" in shown[-1][1]
    emptied = list(page.ask("w", loaded, "What time?", 20, 0.7, 1, None))  # the box of the seed
    assert emptied[-1][0] == list(page.ask("w", loaded, "What time?", 20, 0.7, 1, 0))[-1][0] != answer_html("")
    for asked, expected in (
        (("", 20, 0, 1, 0), "no question"),
        (("Why?", WINDOW, 0, 1, 0), "the model&#x27;s window is 1,024"),
        (("Why?", 20, -1, 1, 0), "temperature -1 is below 0"),
        (("Why?", 20, 0, 1, 10**20), "seed 100000000000000000000 is not from 0"),
    ):
        [(answer, line)] = page.ask("w", loaded, *asked)
        assert "The answer appears here" in answer
        assert expected in line
        assert "refused" in line


def test_stop_ends_the_answer_of_its_own_window_only(session: LongSession) -> None:
    page = _Page(session)
    other = len(list(page.ask("other", None, "Why?", 20, 0, 1, 0)))
    coming = page.ask("w", None, "Why?", 20, 0, 1, 0)
    next(coming)
    page.stop("w")
    assert "; stopped" in re.sub("</span><span>", "; ", list(coming)[-1][1])
    assert len(list(page.ask("other", None, "Why?", 20, 0, 1, 0))) == other
    page.start("w")
    assert "stopped" not in list(page.ask("w", None, "Why?", 20, 0, 1, 0))[-1][1]


def test_what_a_model_writes_is_plain_text() -> None:
    assert answer_html("<img src=x onerror=alert(1)>") == '<div class="answer">&lt;img src=x onerror=alert(1)&gt;</div>'
    assert "<b>" not in title_html("tiny <b>model</b>", 9)


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


@pytest.fixture
def gate(session: LongSession) -> Iterator[threading.Event]:
    """While it is clear, the model waits before the 20th token of an answer."""
    free = threading.Event()
    said = itertools.count()
    hook = session._model.lm_head.register_forward_pre_hook(
        lambda module, args: None if next(said) < 20 else (free.wait(280), None)[1]
    )
    yield free
    free.set()
    hook.remove()


def upload(page: Any, path: Path, content: str, expected: str) -> str:
    """What the page says of a document that is put in the place of the one before."""
    path.write_text(content)
    if clear := page.query_selector('#file [aria-label="Clear"]'):
        clear.click()
        page.wait_for_selector("#document >> text=no document")
    page.set_input_files("#file input[type=file]", str(path))
    page.wait_for_selector(f"#document >> text={expected}")
    return str(page.inner_text("#document"))


def picture(page: Any, name: str) -> None:
    """Check that something is drawn on paper; kept where LONGLORA_SCREENSHOTS says, for a person to look at."""
    content = page.screenshot(full_page=True)
    if folder := os.environ.get("LONGLORA_SCREENSHOTS"):
        (Path(folder) / f"{name}.png").write_bytes(content)
    pixels = (numpy.asarray(imread(BytesIO(content)))[:, :, :3] * 255).round()
    assert numpy.median(pixels) > 230  # paper
    assert (pixels.mean(axis=2) < 90).mean() > 0.002  # ink


@pytest.mark.slow
def test_upload_ask_and_see_the_answer_come(address: str, browser: Any, gate: threading.Event, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(90_000)
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}"))
    page.goto(address)
    page.wait_for_selector("#ask")
    assert page.inner_text("#title h1") == "tiny <b>model</b>"
    # Side by side from the start, also while nothing fills the columns.
    assert page.locator("#question").bounding_box()["x"] > page.locator("#file").bounding_box()["x"] + 300
    picture(page, "empty")
    said = upload(page, tmp_path / "april.txt", DOCUMENT, "tokens of")
    assert said == "444 tokens of the model's window of 1,024"
    assert not page.is_visible("#stop")

    page.fill("#question textarea", "What time?")
    page.click("#ask")
    message = Message("user", "What time?", (DOCUMENT,))
    fresh = LongSession(askable_model(), askable_tokenizer())
    expected = shown_text("".join(fresh.ask([message], max_new_tokens=WINDOW // 8)))
    page.wait_for_selector(".answer.going")
    part = shown_text(page.inner_text(".answer.going"))
    assert 0 < len(part) < len(expected)
    assert expected.startswith(part)
    assert page.is_visible("#stop")
    assert page.is_disabled("#ask")
    picture(page, "answering")
    gate.set()
    page.wait_for_selector("#stop", state="hidden")
    assert shown_text(page.inner_text("#answer")) == expected
    numbers = page.inner_text("#numbers")
    assert "first token after" in numbers
    assert "answer 128 tokens at " in numbers
    assert "tokens/s" in numbers
    picture(page, "answer")

    upload(page, tmp_path / "long.txt", "x" * 2000, "too long by 1,104 tokens")
    assert page.inner_text("#answer") == "The answer appears here."
    page.click("#ask")
    page.wait_for_selector("#numbers .refused >> text=document 2,000 + question 10")
    assert "the model's window is 1,024" in page.inner_text("#numbers")
    picture(page, "refused")
    upload(page, tmp_path / HOSTILE, "short", "5 tokens of")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture(page, "phone")
    assert errors == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.slow
def test_stop_and_a_file_beyond_the_limit(address: str, browser: Any, gate: threading.Event, tmp_path: Path) -> None:
    page = browser.new_page()
    page.set_default_timeout(90_000)
    page.goto(address)
    page.fill("#question textarea", "What time?")
    page.click("#ask")
    page.wait_for_selector(".answer.going")
    page.click("#stop")
    page.wait_for_selector("#stop:disabled")
    gate.set()
    page.wait_for_selector("#stop", state="hidden")
    assert page.inner_text("#numbers").endswith("stopped")
    assert not page.is_disabled("#ask")
    (tmp_path / "huge.txt").write_bytes(b"a" * (MAX_FILE_BYTES + 1))
    page.set_input_files("#file input[type=file]", str(tmp_path / "huge.txt"))
    page.wait_for_selector("text=/maximum allowed size|exceeds/i")
    assert "no document" in page.inner_text("#document")


def shown_text(text: str) -> str:
    """As a browser gives a text back, whatever control characters were in it."""
    return "".join(letter for letter in text if letter.isprintable() and not letter.isspace())
