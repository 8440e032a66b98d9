"""The folder of a set: its files, whether a restarted command may go on in it, and what was made so far."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from longlora.artifacts import read_json, write_json
from longlora.data.longqa.rows import Rows
from longlora.data.longqa.tasks import Draft
from longlora.errors import DataError
from longlora.storage import exclusive

SIDES = ("train", "heldout")
CARD = "README.md"
_SETTINGS = "settings.json"
_DROPPED = "dropped.jsonl"
_LOCK = ".lock"


class Output:
    """An open folder with ``train.jsonl``, ``heldout.jsonl`` and ``dropped.jsonl`` (what came to nothing, and why)."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, replace: bool) -> None:
        """Open a new folder, or the one that a command with the same settings began, and keep others out of it.

        Raises:
            DataError: the folder has other settings and `replace` is false, or files that are not of a set.
            RunFolderError: another process has it open.
        """
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise DataError(f"--output {folder} is a file: name a folder")
        with ExitStack() as opened:
            opened.enter_context(exclusive(folder / _LOCK, f"--output {folder}", "longlora data longqa"))
            _prepare(folder, settings, replace=replace)
            self.rows = {side: opened.enter_context(Rows(folder / f"{side}.jsonl")) for side in SIDES}
            self.dropped = opened.enter_context(Rows(folder / _DROPPED))
            self._read()
            self._opened = opened.pop_all()

    def _read(self) -> None:
        """What earlier commands made."""
        self.done: set[str] = {row["id"] for row in self.dropped}
        self.kept = 0
        self._asked: set[str] = set()
        for side in SIDES:
            for row in self.rows[side]:
                self.done.add(row["id"])
                self.kept += 1
                content, evidence = row["messages"][0]["content"], row["evidence"]
                self._asked.add(_mark(content[row["document_end"] :], content[evidence["start"] : evidence["end"]]))

    def is_new(self, text: str, draft: Draft) -> bool:
        """Whether no row asks this with this evidence."""
        return _mark(draft.question, text[draft.start : draft.end]) not in self._asked

    def keep(self, side: str, row: dict[str, Any], text: str, draft: Draft) -> None:
        """Append a row; it is on the disk when this returns."""
        self.rows[side].add(row)
        self.done.add(row["id"])
        self.kept += 1
        self._asked.add(_mark(draft.question, text[draft.start : draft.end]))

    def drop(self, name: str, reason: str) -> None:
        """Note that no row came of `name`, so that a restarted command does not try again."""
        self.dropped.add({"id": name, "reason": reason})
        self.done.add(name)

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()


def _mark(question: str, evidence: str) -> str:
    plain = [" ".join(text.split()) for text in (question, evidence)]
    return hashlib.sha256("\n".join(plain).encode()).hexdigest()


def _prepare(folder: Path, settings: Mapping[str, Any], *, replace: bool) -> None:
    path = folder / _SETTINGS
    if path.exists() and replace:
        for name in (CARD, *(f"{side}.jsonl" for side in SIDES), _DROPPED, _SETTINGS):
            (folder / name).unlink(missing_ok=True)
    if path.exists():
        before = read_json(path, "start anew with --replace")
        if before != settings:
            raise DataError(
                f"--output {folder} was begun with other settings ({_difference(before, settings)}): give those, "
                "another folder, or --replace to start anew"
            )
        return
    if any(entry.name != _LOCK for entry in folder.iterdir()):
        raise DataError(f"--output {folder} holds other files already: name a new folder")
    write_json(path, settings)


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    if not isinstance(before, dict):
        return "its settings file is damaged"
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    shown = [
        f"{name} {before.get(name)} then, {now.get(name)} now" if name != "documents" else "other documents"
        for name in names
    ]
    return "; ".join(shown)
