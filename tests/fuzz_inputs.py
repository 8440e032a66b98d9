"""What readers under the fuzzer are made of: a reader of one file, and good inputs to begin with."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Reader(Protocol):
    """`seeds` are good inputs; `read` writes one and reads it back."""

    seeds: list[bytes]

    def read(self, data: bytes) -> None: ...


class OfFile:
    """A reader of one file."""

    def __init__(self, path: Path, seeds: list[bytes], read: Callable[[Path], object]) -> None:
        self.seeds, self._path, self._read = seeds, path, read

    def read(self, data: bytes) -> None:
        self._path.write_bytes(data)
        self._read(self._path)


def consume(iterator: Any) -> None:
    deque(iterator, maxlen=0)


def lines(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def small_pdf() -> bytes:
    """One page with one line of text."""
    content = b"BT /F1 24 Tf 72 700 Td (the sea was calm) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
