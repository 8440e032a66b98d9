"""Finished rows of one measured model, a line of JSON each, so that an interrupted evaluation goes on where it was.

The first line says which model the rows belong to. A row is found again by a key made of what was asked (tokens,
answer, settings), so a changed setting measures what it changes and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from longlora.artifacts import write_atomic

_SCHEMA = 2


def key_of(*parts: Any) -> str:
    """A key from JSON values that decide a row."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Samples:
    """The rows of `path`; those of another model, or that cannot be read, are dropped."""

    def __init__(self, path: Path, model: dict[str, Any]) -> None:
        self._rows: dict[str, Any] = {}
        head = json.dumps({"schema": _SCHEMA, **model}, sort_keys=True)
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        if lines and lines[0] == head:
            for line in lines[1:]:
                self._take(line)
        kept = [json.dumps({"key": key, "row": row}) for key, row in self._rows.items()]
        write_atomic(path, "".join(f"{line}\n" for line in [head, *kept]))
        self._file = path.open("a", encoding="utf-8")

    def _take(self, line: str) -> None:
        try:
            values = json.loads(line)
            self._rows[values["key"]] = values["row"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return  # the line that was being written when the process was killed

    def get(self, key: str) -> Any | None:
        """The row of `key`, if it was measured before."""
        return self._rows.get(key)

    def __getitem__(self, key: str) -> Any:
        return self._rows[key]

    def add(self, key: str, row: Any) -> None:
        """Keep a finished row; it is on the disk when this returns."""
        self._rows[key] = row
        self._file.write(json.dumps({"key": key, "row": row}, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Samples:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
