"""Questions from any OpenAI-compatible endpoint, with the standard library.

The key is read from an environment variable for each request and goes into its header, nowhere else; redirects are not
followed, because the header would go with them.
"""

from __future__ import annotations

import email.message
import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from longlora.data.longqa.tasks import Draft
from longlora.data.longqa.text import Window
from longlora.errors import DataError

TASK = "endpoint"
_TRIES = 5
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_TIMEOUT = 300.0
_WORTH_A_RETRY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LARGEST_REPLY = 4_000_000
_REASON = 160
_BAD_IN_A_ROW = 20
_GRAPHIC = re.compile("[!-~]+")
_USER = re.compile("//[^/]*@")
_INSTRUCTION = (
    "Write one question about the text below that can be answered from the text alone and has exactly one right "
    "answer, which is short. Reply with one JSON object and nothing else, with three strings: "
    '"question"; "answer"; and "evidence", a quotation of one to three sentences copied word for word from the text '
    "that proves the answer. Ask about something said around {share:.0%} of the way through the text. Do not write "
    '"according to the text" or mention these instructions.\n\nTEXT:\n{text}'
)


class EndpointError(DataError):
    """The endpoint did not answer, or said no; what was written before is kept."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        return None


@dataclass
class Endpoint:
    """An endpoint as a maker of questions: one request for each."""

    url: str
    """Its base, such as ``http://localhost:8000/v1``."""
    model: str
    key_env: str | None = None
    wait: Callable[[float], None] = time.sleep
    attempts: int = 1
    _bad: int = 0

    def __post_init__(self) -> None:
        # Here, because what the libraries say of these later is no OSError, or holds the key.
        _check_address(self.url)
        if self.key_env:
            _check_key(self.key_env)

    def settings(self) -> dict[str, Any]:
        """What decides the questions, for the settings file and the card."""
        return {"endpoint": self.url, "endpoint_model": self.model}

    def draft(self, window: Window, generator: random.Random, index: int, attempt: int) -> Draft | str:
        """A question about `window`, or why the reply is no use.

        Raises:
            EndpointError: no reply after retries, a refusal, or no usable reply many times in a row.
        """
        share = generator.random()
        prompt = _INSTRUCTION.format(share=share, text=window.text)
        found = _read(self._ask(prompt), window)
        self._bad = self._bad + 1 if isinstance(found, str) else 0
        if self._bad >= _BAD_IN_A_ROW:
            raise EndpointError(
                f"{self._bad} replies of {self.model} in a row were no use (the last: {found}): choose another model"
            )
        return found

    def _ask(self, prompt: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        reason = ""
        for number in range(_TRIES):
            after = None
            try:
                return self._send(body)
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"HTTP {error.code} {error.reason}: {self._clean(error.read(2000))}"
                if error.code not in _WORTH_A_RETRY:
                    raise EndpointError(
                        f"endpoint {self.url} refused ({reason}): check address, model and key"
                    ) from None
                after = error.headers
            except (OSError, http.client.HTTPException) as error:  # refused, reset, cut off, timed out
                reason = self._clean(str(getattr(error, "reason", None) or error or type(error).__name__).encode())
            if number + 1 < _TRIES:
                self.wait(_pause(number, after))
        raise EndpointError(f"endpoint {self.url} failed {_TRIES} times ({reason}): check that it runs")

    def _send(self, body: dict[str, Any]) -> str:
        path = self.url.rstrip("/")
        address = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        headers = {"Content-Type": "application/json", "User-Agent": "longlora"}
        if self.key_env:
            headers["Authorization"] = f"Bearer {os.environ.get(self.key_env, '')}"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=_TIMEOUT) as reply:
            content = reply.read(_LARGEST_REPLY)
        try:
            return completion(content)
        except EndpointError:
            raise EndpointError(
                f"endpoint {self.url} gave no chat completion ({self._clean(content[:200])!r}): give its base address, "
                "which often ends in /v1"
            ) from None

    def _clean(self, text: bytes) -> str:
        """The beginning of what a server said, on one line, without the key."""
        plain = " ".join(text.decode(errors="replace").split())
        key = os.environ.get(self.key_env, "") if self.key_env else ""
        return (plain.replace(key, "***") if key else plain)[:_REASON]


def _check_address(url: str) -> None:
    """`DataError` unless requests can be sent to `url`; a password in it is not shown."""
    shown = f"--endpoint {_USER.sub('//***@', url)!r}"
    if not _GRAPHIC.fullmatch(url):
        raise DataError(f"{shown} is empty, or holds a space or a letter that is not ASCII: write these like %20")
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # raises
    except ValueError as error:
        raise DataError(f"{shown} is no address ({error}): give one like http://localhost:8000/v1") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DataError(f"{shown} is no http or https address: give one like http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise DataError("--endpoint holds a user, password or query: name an environment variable by --key-env")


def _check_key(name: str) -> None:
    """`DataError`, without the key, unless environment variable `name` has one that fits into a header."""
    key = os.environ.get(name)
    if not key:
        raise DataError(f"environment variable {name} of --key-env is not set or empty: export it")
    if not (key.isascii() and key.isprintable()):
        raise DataError(
            f"environment variable {name} of --key-env holds a line end, another control character or a letter that is "
            "not ASCII: export the key alone (a file with Windows line ends leaves \\r behind it)"
        )


def completion(content: bytes) -> str:
    """The text of a chat completion; `EndpointError` where the body of a reply is none."""
    try:
        return str(json.loads(content)["choices"][0]["message"]["content"] or "")
    except (ValueError, LookupError, TypeError, RecursionError):
        raise EndpointError("no chat completion") from None


def _pause(number: int, headers: email.message.Message | None) -> float:
    """Seconds before the next try: what the server asks for, else twice as long each time."""
    asked = headers.get("Retry-After", "") if headers else ""
    return min(float(asked) if asked.isdecimal() else _FIRST_WAIT * 2**number, _LONGEST_WAIT)


def _read(reply: str, window: Window) -> Draft | str:
    """The draft in a reply, or why there is none; text around the JSON object is passed over."""
    reply = reply.rpartition("</think>")[2]
    try:
        values = json.loads(reply[reply.index("{") : reply.rindex("}") + 1])
        question, answer, quote = (values[name].strip() for name in ("question", "answer", "evidence"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "reply is not the JSON asked for"
    if not (question and answer and quote):
        return "question, answer or evidence is empty"
    places = window.find(quote)
    if not places:
        return "quote is not in the text"
    if len(places) > 1:
        return "quote stands in the text more than once"
    return Draft(TASK, question, answer, *places[0])
