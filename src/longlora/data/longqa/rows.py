"""Files of JSON lines that grow row by row and survive a kill: each row is on the disk before the next is made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from longlora.artifacts import write_atomic
from longlora.errors import DataError

# Line ends for some readers of JSON lines, plain letters for JSON.
_LINE_ENDS = str.maketrans({mark: f"\\u{ord(mark):04x}" for mark in "\u0085\u2028\u2029"})


class Rows:
    """One file; a last line that was cut off by a kill is dropped when it is opened.

    Raises:
        DataError: another line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        whole, _, rest = content.rpartition(b"\n")
        if rest or not content:
            write_atomic(path, whole + b"\n" if whole else b"")
        self._file = path.open("a", encoding="utf-8")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                try:
                    row = json.loads(line)
                    row["id"]
                except (ValueError, KeyError, TypeError):
                    raise DataError(
                        f"{self.path}:{number} is damaged: remove this line, or start anew with --replace"
                    ) from None
                yield row

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it is on the disk when this returns."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).translate(_LINE_ENDS)
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
