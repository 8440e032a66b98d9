"""The page and the server: this machine alone, nothing shared, uploads limited, no code of others."""

from __future__ import annotations

import inspect
import socket
from typing import Any

import pytest

from longlora.cli import use
from longlora.errors import DataError
from longlora.inference import demo
from longlora.inference.address import LOOPBACK, is_loopback, require_free, warning
from longlora.inference.files import MAX_FILE_BYTES


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def test_both_listen_on_loopback_unless_a_person_says_otherwise() -> None:
    assert is_loopback(LOOPBACK)
    for command in (use.serve, use.demo):
        assert inspect.signature(command).parameters["host"].default == LOOPBACK
    assert warning(LOOPBACK, "the page") is warning("::1", "the page") is warning("localhost", "the page") is None
    for host in ("0.0.0.0", "::", "192.168.1.5", "localhost.example.com"):
        assert "without a password" in (warning(host, "the page") or "")


def test_the_page_shares_nothing_and_limits_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    given: dict[str, Any] = {}

    class Blocks:
        def launch(self, **options: Any) -> None:
            given.update(options)

    demo.launch_demo(Blocks(), LOOPBACK, free_port())  # type: ignore[arg-type]
    assert given["server_name"] == LOOPBACK
    assert given["share"] is False
    assert given["allowed_paths"] == []
    assert given["max_file_size"] == MAX_FILE_BYTES <= 64 * 2**20
    assert given["enable_monitoring"] is given["mcp_server"] is False


def test_the_server_runs_no_code_of_others_and_answers_no_other_page(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("uvicorn")
    from transformers.cli import serve as library
    from transformers.utils import import_utils

    from longlora.inference.serve import serve

    given: dict[str, Any] = {}
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    monkeypatch.setattr(library, "Serve", lambda **options: given.update(options))
    serve("folder", LOOPBACK, free_port())
    assert given["host"] == LOOPBACK
    assert given["trust_remote_code"] is False
    assert given["enable_cors"] is False


def test_a_taken_port_is_said_before_a_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        with pytest.raises(DataError, match=r"cannot listen on 127.0.0.1 port \d+"):
            require_free(LOOPBACK, taken.getsockname()[1])
