"""`ask`, `chat`, `serve` and `demo` as a person meets them."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Result
from inference_cases import WINDOW, save_askable, save_askable_adapter
from transformers.utils.import_utils import is_serve_available


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_askable(tmp_path_factory.mktemp("model") / "merged")


def typed(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def test_ask_prints_the_answer_and_its_numbers_apart(
    longlora: Callable[..., Result], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.txt").write_text("It was April. ")
    Path("b.html").write_text("<p>The clocks were striking <b>thirteen</b>.")
    result = longlora("ask", str(model), "a.txt", "b.html", "What time?", "--max-new-tokens", "9")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    numbers = result.stderr.splitlines()[-1]
    prompt = len("user\nIt was April. \n\nThe clocks were striking thirteen.\n\nWhat time?\nassistant\n") + 3
    assert numbers.startswith(f"prompt {prompt} of 1,024 tokens; first token after ")
    assert "answer 9 tokens at " in numbers
    typed(monkeypatch, b"It was April. \n\nThe clocks were striking thirteen.")
    piped = longlora("ask", str(model), "-", "What time?", "--max-new-tokens", "9", "--chunk-tokens", "5")
    assert piped.stdout == result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("a.txt",), "the last argument is the question, and a.txt is a file"),
        (("Why?",), "no file before the question 'Why?'"),
        (("a.txt", " "), "the question is empty"),
        (("none.txt", "Why?"), "none.txt does not exist"),
        (("a.bin", "Why?"), "a.bin is a binary file (byte 0x00 at 1)"),
        (
            ("long.txt", "Why?"),
            "document 2,000 + question 4 + template 21 + answer 512 = 2,537 tokens, the model's window",
        ),
        (("none.txt", "Why? " * 1000), "none.txt does not exist"),  # a question longer than any file's name
        (("a.txt", "Why?", "--temperature", "-1"), "temperature -1 is below 0"),
        (("a.txt", "Why?", "--max-new-tokens", "0"), "max_new_tokens 0 is below 1"),
        (("a.txt", "Why?", "--chunk-tokens", "0"), "chunk_tokens 0 is below 1"),
        (("a.txt", "Why?", "--chat-template", "none"), "chat template none cannot be read"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(
    longlora: Callable[..., Result], model: Path, arguments: tuple[str, ...], expected: str
) -> None:
    Path("a.txt").write_text("It was April.")
    Path("a.bin").write_bytes(b"a\0")
    Path("long.txt").write_text("x" * 2000)
    result = longlora("ask", str(model), *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stdout == ""
    # In this process transformers was imported before its bar of loaded weights could be switched off.
    *bars, line = result.stderr.splitlines()
    assert line.startswith(f"longlora: {expected}")
    assert all("Loading weights" in bar for bar in bars if bar)


def test_chat_reads_lines_until_the_end(
    longlora: Callable[..., Result], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.txt").write_text("It was April. ")
    typed(monkeypatch, b"What month?\n/exit\n")
    result = longlora("chat", str(model), "a.txt", "--max-new-tokens", "4")
    assert result.returncode == 0, result.stderr
    assert "a.txt: 14 tokens of the model's window of 1,024" in result.stdout
    assert "first token after" in result.stdout


def test_serve_refuses_what_it_cannot_serve(longlora: Callable[..., Result], model: Path) -> None:
    save_askable_adapter(model, Path("run/adapter"), 2048)
    Path("run/recipe.yaml").write_text("")
    adapter = longlora("serve", "run")
    assert adapter.returncode == 2
    assert adapter.stderr.startswith("longlora: run/adapter is an adapter, and servers load ordinary models: run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for verb, is_installed in (("serve", is_serve_available()), ("demo", _has("gradio"))):
            if not is_installed:
                continue
            busy = longlora(verb, str(model), "--port", port)
            assert busy.returncode == 2
            assert busy.stderr.startswith(f"longlora: cannot listen on 127.0.0.1 port {port} (")


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_a_seed_out_of_range_is_refused_before_the_model_is_loaded(longlora: Callable[..., Result], seed: str) -> None:
    Path("a.txt").write_text("It was April.")
    result = longlora("ask", "./nowhere", "a.txt", "Why?", "--seed", seed)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"longlora: seed {seed} is not from 0 to 2**63 - 1: 0 is usual"


def test_missing_packages_and_open_addresses_are_said(
    longlora: Callable[..., Result], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    result = longlora("serve", str(model), "--host", "0.0.0.0")
    assert result.returncode == 2
    warning, start, window, refusal = result.stderr.splitlines()
    assert warning.startswith("warning: the server listens on 0.0.0.0 without a password")
    assert start == f"serving on http://0.0.0.0:8000/v1 with model={model}; Ctrl-C ends"
    assert window.startswith(f"its window is {WINDOW:,} tokens")
    assert refusal == "longlora: the server needs more packages: pip install 'longlora[serve]'"
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert longlora("demo", str(model)).stderr == "longlora: the page needs gradio: pip install 'longlora[demo]'\n"


@pytest.mark.slow
def test_the_server_answers_over_http(model: Path) -> None:
    pytest.importorskip("fastapi")
    openai = pytest.importorskip("openai")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "longlora", "serve", str(model), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        body = {"model": str(model), "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 5}
        reply = _post(f"http://127.0.0.1:{port}/v1/chat/completions", body, server)
        assert reply["usage"]["completion_tokens"] == 5
        assert reply["choices"][0]["message"]["role"] == "assistant"
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
        chunks = list(client.chat.completions.create(**body, stream=True))
        pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
        # Half a character at the end is held back by the stream.
        whole = reply["choices"][0]["message"]["content"].rstrip("\ufffd")
        assert pieces
        assert len(chunks) > 2  # the tiny model's bytes may make no more than one text
        assert "".join(pieces).rstrip("\ufffd") == whole
        assert chunks[-1].usage.completion_tokens == 5
        # docs/use.md says so: the server refuses nothing, and reads on beyond the window.
        long = body | {"messages": [{"role": "user", "content": "x" * 2000}]}
        assert client.chat.completions.create(**long).usage.prompt_tokens > 2000 > WINDOW
    finally:
        server.send_signal(2)
        _, errors = server.communicate(timeout=60)
    assert server.returncode == 0, errors
    assert f"serving on http://127.0.0.1:{port}/v1 with model={model}; Ctrl-C ends" in errors
    assert f"its window is {WINDOW:,} tokens, and the server does not refuse what is longer" in errors
    assert "Traceback" not in errors


def _post(url: str, body: dict[str, object], server: subprocess.Popen[str]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    while server.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return dict(json.load(reply))
        except ConnectionError:
            time.sleep(0.5)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.5)
    raise AssertionError("the server ended")


def _has(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True
