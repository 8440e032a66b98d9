"""An endpoint that fails, lies or talks nonsense costs no row that was made before, and never sees its key written."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from longlora.data.documents import Document
from longlora.data.longqa.build import LongQASettings, build_longqa
from longlora.data.longqa.card import Facts
from longlora.data.longqa.endpoint import Endpoint
from longlora.data.longqa.text import quarter_of_characters
from longlora.errors import DataError

KEY = "sk-secret-123"
TEXT = " ".join(f"The keeper of house {number} hid {number * 7} coins under the stove." for number in range(200))
DOCUMENTS = [Document("north", TEXT), Document("south", TEXT.replace("keeper", "owner").replace("stove", "stair case"))]
SETTINGS = LongQASettings(lengths=(600,), per_document=3, heldout_share=0.5)

Answer = Callable[[str, int], tuple[int, Any]]
"""Prompt and number of the request to status and body (a string is the content of a completion)."""


class Server(HTTPServer):
    answer: Answer
    seen: list[dict[str, Any]]
    url: str


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append({"path": self.path, "headers": dict(self.headers), "body": body})
        status, reply = self.server.answer(body["messages"][0]["content"], len(self.server.seen))
        if isinstance(reply, str):
            reply = {"choices": [{"message": {"content": reply}}]}
        content = json.dumps(reply).encode()
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "http://127.0.0.1:9/stolen")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OUR_KEY", KEY)
    server = Server(("127.0.0.1", 0), Handler)
    server.seen, server.answer, server.url = [], good, f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def good(prompt: str, number: int) -> tuple[int, Any]:
    quote = prompt.split("TEXT:\n")[1].split(". ")[number] + "."
    values = {"question": f"How many coins? {number}", "answer": quote.split()[6], "evidence": quote}
    return 200, f"Here it is:\n```json\n{json.dumps(values)}\n```"


def build(folder: Path, server: Server, waits: list[float] | None = None, key: str | None = "OUR_KEY") -> Facts:
    wait = (lambda seconds: None) if waits is None else waits.append
    maker = Endpoint(server.url, "m", key, wait=wait)
    return build_longqa(DOCUMENTS, folder, SETTINGS, maker, quarter_of_characters, command="longlora x")


def rows(folder: Path) -> list[dict[str, Any]]:
    paths = (folder / "train.jsonl", folder / "heldout.jsonl")
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_carry_the_place_of_the_quote_and_the_key_is_nowhere(tmp_path: Path, server: Server) -> None:
    facts = build(tmp_path, server)
    found = rows(tmp_path)
    assert len(found) == len(server.seen) == 6
    assert server.seen[0]["path"] == "/v1/chat/completions"
    assert server.seen[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert server.seen[0]["body"]["model"] == "m"
    for row in found:
        content, evidence = row["messages"][0]["content"], row["evidence"]
        assert row["task"] == "endpoint"
        assert content[row["document_end"] :].startswith("\n\nHow many coins?")
        assert row["answer"] == content[evidence["start"] : evidence["end"]].split()[6]
    assert not facts.dropped
    assert "written by the model" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert all(KEY not in path.read_text(encoding="utf-8") for path in tmp_path.iterdir())


def test_without_a_key_none_is_sent(tmp_path: Path, server: Server) -> None:
    build(tmp_path, server, key=None)
    assert "Authorization" not in server.seen[0]["headers"]


def test_useless_replies_are_dropped_and_counted(tmp_path: Path, server: Server) -> None:
    bad = {
        1: "no JSON at all",
        2: json.dumps({"question": "q", "answer": "a", "evidence": "This was never said."}),
        3: json.dumps({"question": "q", "answer": " ", "evidence": "The keeper"}),
        4: json.dumps({"question": "q", "answer": "a", "evidence": "coins under the"}),
        5: json.dumps(["question"]),
    }
    server.answer = lambda prompt, number: (200, bad[number]) if number in bad else good(prompt, number)
    facts = build(tmp_path, server)
    assert facts.dropped == {
        "reply is not the JSON asked for": 2,
        "quote is not in the text": 1,
        "question, answer or evidence is empty": 1,
        "quote stands in the text more than once": 1,
    }
    assert len(rows(tmp_path)) == 1
    build(tmp_path, server)
    assert len(server.seen) == 6  # what was dropped is not asked again


def test_retries_wait_longer_each_time(tmp_path: Path, server: Server) -> None:
    waits: list[float] = []
    server.answer = lambda prompt, number: (503, {}) if number <= 3 else good(prompt, number)
    build(tmp_path, server, waits)
    assert waits == [1, 2, 4]
    assert len(rows(tmp_path)) == 6


def test_a_failure_midway_keeps_what_is_there_and_goes_on(tmp_path: Path, server: Server) -> None:
    server.answer = lambda prompt, number: (500, {"error": "down"}) if number > 4 else good(prompt, number)
    with pytest.raises(DataError, match=r"failed 5 times \(HTTP 500.*4 rows are kept in .* the same command goes on"):
        build(tmp_path, server)
    kept = rows(tmp_path)
    assert len(kept) == 4
    assert not (tmp_path / "README.md").exists()
    server.answer = good
    build(tmp_path, server)
    assert len(rows(tmp_path)) == 6
    assert [row for row in rows(tmp_path) if row["id"] in {each["id"] for each in kept}] == kept


def test_a_refusal_is_not_retried_and_does_not_print_the_key(tmp_path: Path, server: Server) -> None:
    server.answer = lambda prompt, number: (401, {"error": f"wrong key {KEY}"})
    with pytest.raises(DataError, match=r"refused \(HTTP 401") as caught:
        build(tmp_path, server)
    assert KEY not in str(caught.value)
    assert "***" in str(caught.value)
    assert len(server.seen) == 1


def test_redirects_are_not_followed(tmp_path: Path, server: Server) -> None:
    server.answer = lambda prompt, number: (302, {})
    with pytest.raises(DataError, match=r"refused \(HTTP 302"):
        build(tmp_path, server)


def test_something_else_than_a_completion(tmp_path: Path, server: Server) -> None:
    server.answer = lambda prompt, number: (200, {"hello": 1})
    with pytest.raises(DataError, match="gave no chat completion"):
        build(tmp_path, server)


def test_nobody_listens(tmp_path: Path, server: Server) -> None:
    server.url = "http://127.0.0.1:9/v1"
    with pytest.raises(DataError, match=r"failed 5 times .*0 rows are kept"):
        build(tmp_path, server)


def test_a_model_that_never_follows_is_given_up(tmp_path: Path, server: Server) -> None:
    server.answer = lambda prompt, number: (200, "I would rather not.")
    many = LongQASettings(lengths=(600,), per_document=30, heldout_share=0)
    with pytest.raises(DataError, match="20 replies of m in a row were no use"):
        build_longqa(DOCUMENTS, tmp_path, many, Endpoint(server.url, "m"), quarter_of_characters, command="x")
    assert len(server.seen) == 20


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("localhost:8000", None, "is no http or https address"),
        ("file:///etc/passwd", None, "is no http or https address"),
        ("http://user:pw@host/v1", None, "holds a user, password or query"),
        ("http://host/v1?key=1", None, "holds a user, password or query"),
        ("http://127.0.0.1:9/vé", None, "vé' is empty, or holds a space or a letter that is not ASCII"),
        ("http://host/v 1", None, "holds a space"),
        ("http://host/v1\n", None, "holds a space"),
        ("http://user:pw@host/v 1", None, r"'http://\*\*\*@host/v 1' is empty, or holds a space"),
        ("http://[::1/v1", None, r"is no address \(Invalid IPv6 URL\): give one like"),
        ("http://host:80a/v1", None, r"is no address \(Port could not be cast"),
        ("http://host:99999/v1", None, r"is no address \(Port out of range"),
        ("http://host/v1", "NOT_SET_ANYWHERE", "NOT_SET_ANYWHERE of --key-env is not set"),
    ],
)
def test_addresses_and_keys_that_cannot_be_used(url: str, key: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Endpoint(url, "m", key)
    assert "pw" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [f"{KEY}\r", f"{KEY}\n", f"{KEY}é", f"{KEY}\u2028", f"{KEY}\udce9"])
def test_a_key_that_fits_into_no_header_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OUR_KEY", key)
    with pytest.raises(DataError, match="environment variable OUR_KEY of --key-env holds a line end") as caught:
        Endpoint("http://host/v1", "m", "OUR_KEY")
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("OUR_KEY", KEY)
    Endpoint("http://[::1]:8000/v1", "m", "OUR_KEY")
