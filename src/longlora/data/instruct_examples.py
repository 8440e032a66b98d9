"""Records of any known format as conversations: who says what, and which part of it may be shortened.

The formats, told by the names of their fields:

* chat: ``messages`` (or ``conversations``) of ``role`` and ``content`` (or ``from`` and ``value``): also LongAlign
* instruction: ``instruction``, ``output`` (or ``response``) and perhaps ``input`` (or ``context``): Alpaca, LongAlpaca,
  LongQA, Dolly
* prompt: ``prompt`` and ``completion`` (or ``response``), texts or lists of messages
* question: ``question`` and ``answer``, with ``document`` or ``context``

The document, which alone may be shortened, is a field of its own (``input``, ``document``, ``context``) where there is
one, or ends at ``document_end`` of the first message of the user. Otherwise `split_document` looks for it in each
message of the user.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from longlora.data.instruct_records import Record, record_readers
from longlora.errors import DataError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
_FORMATS = {
    "chat": (("messages", "conversations", "conversation"),),
    "instruction": (("instruction",), ("output", "response")),
    "prompt": (("prompt",), ("completion", "response")),
    "question": (("question",), ("answer", "output")),
}
_KNOWN = "messages; instruction and output; prompt and completion; question and answer"
# How LongAlpaca's prompts mark the material (paper, appendix B): "The paper begins. ... Now the paper ends. QUESTION".
_BEGINS = re.compile(r"\b[Tt]he [\w ,'-]{1,60} begins?\b[.:]?")
_ENDS = re.compile(r"\bNow the [\w ,'-]{1,60} ends?\b")
_BLANK_LINE = re.compile(r"\n[ \t]*(?:\r?\n[ \t]*)+")
_LEAD_CHARACTERS = 1000


@dataclass(frozen=True)
class Message:
    """One turn. `document` may be shortened; `before` and `after` it never are."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    before: str = ""
    document: str = ""
    after: str = ""

    @property
    def content(self) -> str:
        """The whole text of the turn."""
        return self.before + self.document + self.after


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the assistant."""

    name: str
    place: str
    messages: tuple[Message, ...]
    values: Mapping[str, Any] = field(default_factory=dict)
    """The record as it stands in its file."""

    def with_document(self, index: int, document: str) -> Example:
        """The same with another document in message `index`."""
        message = replace(self.messages[index], document=document)
        return replace(self, messages=(*self.messages[:index], message, *self.messages[index + 1 :]))


def read_examples(source: str, system: str | None, joint: str) -> Iterator[Example]:
    """The examples of one source, in order; local paths are checked before this returns.

    Messages of the user behind the last answer are dropped.

    Args:
        source: see `record_readers`.
        system: system message where a conversation has none.
        joint: between ``instruction`` and ``input``.

    Raises:
        DataError: the source cannot be read, or a record is of no known format or of another one than the first of its
            file, has no turn of the assistant or a role that is not known. The message names file and line.
    """
    return (
        _with_system(example, system)
        for reader in record_readers(source)
        for example in _examples_of_file(reader(), joint)
    )


def split_document(text: str) -> tuple[str, str, str]:
    """A prompt that holds both, cut into what is before the document, the document, and the question after it.

    1. LongAlpaca's own words: the document ends before the last ``Now the ... ends`` and begins behind the first
       ``The ... begins`` near the top.
    2. Otherwise the last paragraph (after the last blank line) is the question, and the first one, where there are
       three and it has at most 1000 characters, belongs to the task.
    3. A text of one paragraph has no document: it is never shortened.
    """
    if ends := list(_ENDS.finditer(text)):
        stop = ends[-1].start()
        begin = _BEGINS.search(text, 0, min(stop, _LEAD_CHARACTERS))
        start = begin.end() if begin else 0
        return text[:start], text[start:stop], text[stop:]
    body = len(text.rstrip())
    blanks = [blank for blank in _BLANK_LINE.finditer(text, 0, body) if blank.start() > 0]
    if not blanks:
        return text, "", ""
    start, stop = 0, blanks[-1].start()
    if len(blanks) > 1 and blanks[0].start() <= _LEAD_CHARACTERS:
        start = blanks[0].end()
    return text[:start], text[start:stop], text[stop:]


def _with_system(example: Example, system: str | None) -> Example:
    if system is None or example.messages[0].role == "system":
        return example
    return replace(example, messages=(Message("system", before=system), *example.messages))


def _examples_of_file(records: Iterator[Record], joint: str) -> Iterator[Example]:
    first: tuple[str, str] | None = None
    for record in records:
        kind = _format(record)
        if first is None:
            first = kind, record.place
        if kind != first[0]:
            raise DataError(
                f"{record.place} is of format {kind!r} and {first[1]} of format {first[0]!r}: give each format a file "
                "of its own"
            )
        messages = _messages(record, kind, joint)
        while messages and messages[-1].role != "assistant":
            messages.pop()
        if not messages:
            raise DataError(f"{record.place} has no turn of the assistant, so nothing to learn: remove it")
        yield Example(record.name, record.place, tuple(messages), record.values)


def _format(record: Record) -> str:
    for kind, needed in _FORMATS.items():
        if all(any(name in record.values for name in names) for names in needed):
            return kind
    has = ", ".join(map(str, record.values)) or "none"
    raise DataError(f"{record.place} is of no known format, its fields are {has}: known are {_KNOWN}")


def _messages(record: Record, kind: str, joint: str) -> list[Message]:
    if kind == "chat":
        turns = _value(record, *_FORMATS["chat"][0])
        if not isinstance(turns, list):
            raise DataError(f"{record.place}: messages is {type(turns).__name__}, not a list of turns")
        made = [_turn(turn, number, record.place) for number, turn in enumerate(turns)]
        return _with_known_document(made, record.values.get("document_end"))
    question, answer = (_value(record, *names) for names in _FORMATS[kind])
    if kind == "prompt" and (isinstance(question, list) or isinstance(answer, list)):
        both = [*_as_turns(question, "user"), *_as_turns(answer, "assistant")]
        return [_turn(turn, number, record.place) for number, turn in enumerate(both)]
    question, answer = _text(question, record, "the question"), _text(answer, record, "the answer")
    names = ("input" if kind == "instruction" else "document", "context")
    document = next(filter(None, (_text(record.values.get(name) or "", record, name) for name in names)), "")
    return [_asked(question, document, kind, joint), Message("assistant", before=answer)]


def _with_known_document(messages: list[Message], end: Any) -> list[Message]:
    """`messages`, the first of the user cut where its row says that its document ends (``longlora data longqa``)."""
    first = next((index for index, message in enumerate(messages) if message.role == "user"), None)
    if first is None or type(end) is not int or not 0 < end <= len(text := messages[first].content):
        return messages
    return [*messages[:first], Message("user", document=text[:end], after=text[end:]), *messages[first + 1 :]]


def _asked(question: str, document: str, kind: str, joint: str) -> Message:
    if not document:
        return Message("user", *split_document(question))
    if kind == "instruction":  # Alpaca's order
        return Message("user", before=question + joint, document=document)
    return Message("user", document=document, after=f"\n\n{question}")


def _as_turns(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _turn(turn: Any, number: int, place: str) -> Message:
    place = f"{place}, turn {number + 1}"
    if not isinstance(turn, dict):
        raise DataError(f"{place} is {type(turn).__name__}, not an object with role and content")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(str(name).lower())
    if role is None:
        raise DataError(f"{place} has role {name!r}: known are {', '.join(ROLES)}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if content is not None and not isinstance(content, str):
        raise DataError(f"{place} has content that is {type(content).__name__}, not text: longlora reads text only")
    content = content or ""
    if role != "user":
        return Message(role, before=content)
    if isinstance(turn.get("document"), str) and turn["document"]:
        return Message(role, document=turn["document"], after=f"\n\n{content}")
    return Message(role, *split_document(content))


def _value(record: Record, *names: str) -> Any:
    return next(record.values[name] for name in names if name in record.values)


def _text(value: Any, record: Record, what: str) -> str:
    if value is not None and not isinstance(value, str):
        raise DataError(f"{record.place}: {what} is {type(value).__name__}, not text")
    return value or ""
