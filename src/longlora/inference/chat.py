"""A conversation at the terminal about documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from longlora.errors import LongLoraError
from longlora.inference.files import read_file
from longlora.inference.prompt import Message
from longlora.inference.session import LongSession, Sampling
from longlora.inference.terminal import printable

HELP = "/file PATH adds a document, /clear forgets everything, /exit ends; Ctrl-C stops an answer, twice it ends"


class Chat:
    """Turns of one conversation, kept as long as they fit into the window.

    Args:
        ask_person: shows a prompt and returns a line, as `input` does.
    """

    def __init__(
        self,
        session: LongSession,
        console: Console,
        ask_person: Callable[[str], str],
        *,
        max_new_tokens: int,
        sampling: Sampling,
    ) -> None:
        self._session, self._out, self._ask_person = session, console, ask_person
        self._max_new_tokens, self._sampling = max_new_tokens, sampling
        self._turns: list[Message] = []
        self._documents: list[str] = []
        """Added, and not part of a question yet."""

    def run(self, files: Sequence[Path] = ()) -> None:
        """Talk until the person ends it.

        Raises:
            DataError: one of `files` cannot be read.
        """
        for path in files:
            self._add(path)
        self._say(HELP)
        interrupted = False
        while True:
            try:
                line = self._ask_person("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                self._say("\nCtrl-C again or /exit ends")
                continue
            if line in ("/exit", "/quit"):
                return
            interrupted = self._take(line)

    def _take(self, line: str) -> bool:
        """Do what a line says; whether the person interrupted that."""
        command, _, rest = line.partition(" ")
        try:
            if command == "/clear":
                self._turns, self._documents = [], []
                self._say("forgotten: documents and turns")
            elif command == "/file":
                self._add(Path(rest.strip()).expanduser())
            elif line.startswith("/"):
                self._say(HELP)
            elif line:
                return self._answer(line)
        except LongLoraError as error:
            self._say(str(error))
        return False

    def _add(self, path: Path) -> None:
        file = read_file(path)
        self._documents.append(file.text)
        if file.note:
            self._say(file.note)
        tokens = self._session.count(file.text)
        self._say(f"{file.name}: {tokens:,} tokens of the model's window of {self._session.window:,}")

    def _answer(self, question: str) -> bool:
        asked = [*self._turns, Message("user", question, tuple(self._documents))]
        answer = self._session.ask(asked, max_new_tokens=self._max_new_tokens, sampling=self._sampling)
        interrupted = False
        try:
            for piece in answer:
                self._out.print(printable(piece), end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            interrupted = True
        self._out.print()
        self._say(answer.numbers.line())
        if answer.text.strip() or not interrupted:
            self._turns, self._documents = [*asked, Message("assistant", answer.text)], []
        return interrupted

    def _say(self, line: str) -> None:
        self._out.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
