"""Build a set: documents to rows of questions and answers, deterministic by seed, and resumable after every row.

A row is one line of ``train.jsonl`` or ``heldout.jsonl``::

    {"id": "emma:4096:7", "document": "emma", "task": "find_sentence", "length": 4096, "tokens": 3790,
     "messages": [{"role": "user", "content": DOCUMENT + "\\n\\n" + QUESTION},
                  {"role": "assistant", "content": ANSWER}],
     "document_end": 15012, "answer": ANSWER,
     "evidence": {"start": 7100, "end": 7190, "position": 0.4759}, "window": {"start": 90210, "end": 105222}}

`document_end` is how many characters of the user's content are document: whoever shortens an example to fit shortens
these, never what is behind. Evidence is in characters of the user's content, `position` its middle as a part of the
document (0 to 1); `window` is in characters of the whole document. `tokens` counts the content and the answer without a
chat template, which has room within `length`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from longlora.artifacts import write_atomic
from longlora.data.documents import Document
from longlora.data.longqa.card import Facts, card
from longlora.data.longqa.endpoint import EndpointError
from longlora.data.longqa.output import CARD, Output
from longlora.data.longqa.split import fingerprint, held_out, related_groups, without_copies
from longlora.data.longqa.tasks import Draft
from longlora.data.longqa.text import Text, TokenCounter, Window
from longlora.errors import DataError

_SCHEMA = 1
_QUESTION_TOKENS = 400
_TEMPLATE_TOKENS = 48
_SHORTEST = 128


class Maker(Protocol):
    """What makes questions: the offline tasks, or an endpoint."""

    @property
    def attempts(self) -> int:
        """Windows to try before a row is given up."""

    def settings(self) -> dict[str, Any]:
        """What decides the questions."""

    def draft(self, window: Window, generator: random.Random, index: int, attempt: int) -> Draft | str:
        """A question, or why there is none."""


@dataclass(frozen=True)
class LongQASettings:
    """What decides a set, beside its documents and its maker."""

    lengths: tuple[int, ...] = (4096,)
    """Tokens of an example."""
    per_document: int = 50
    """Examples of each document at each length, at most."""
    seed: int = 0
    heldout_share: float = 0.2
    heldout_names: tuple[str, ...] = ()
    """Documents to hold out, instead of a share."""
    tokens_by: str = "characters / 4"
    """What counts the tokens."""

    def check(self) -> None:
        """`DataError` for a value out of range."""
        short = [length for length in self.lengths if length < _SHORTEST]
        if not self.lengths or short:
            raise DataError(
                f"--tokens {short[0] if short else 'is empty'}: give lengths of at least {_SHORTEST} tokens"
            )
        if self.per_document < 1:
            raise DataError(f"--per-document {self.per_document}: give at least 1")
        if not 0 <= self.heldout_share < 1:
            raise DataError(f"--heldout {self.heldout_share}: give a share from 0 to below 1, or names of documents")


def build_longqa(
    documents: Sequence[Document],
    folder: Path,
    settings: LongQASettings,
    maker: Maker,
    count: TokenCounter,
    *,
    command: str,
    replace: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Facts:
    """Write ``train.jsonl``, ``heldout.jsonl``, ``dropped.jsonl``, ``settings.json`` and ``README.md`` to `folder`.

    A folder that the same settings began is gone on with. Documents that share text are on the same side.

    Args:
        count: token counts of texts; `settings.tokens_by` names it.
        command: the command line, for the card.
        replace: start anew where other settings made the folder.
        say: called with a line for each document.

    Raises:
        DataError: settings, documents or folder cannot be used, or the endpoint failed; rows made before are kept.
    """
    settings.check()
    kept, copies = without_copies(_with_text(documents))
    fingerprints = {document.name: fingerprint(document.text) for document in kept}
    texts = [Text(document, count) for document in kept]
    usable = [text for text in texts if any(_serves(text, length) for length in settings.lengths)]
    if not usable:
        longest = max(text.tokens for text in texts)
        raise DataError(
            f"no document has half of --tokens {min(settings.lengths)} and a sentence to ask about, the longest has "
            f"{longest} tokens: give longer documents or a smaller --tokens"
        )
    names = {text.name for text in usable}
    # Without those that are too short: holding out nothing but these would leave nothing to evaluate on.
    groups = [used for group in related_groups(kept) if (used := [name for name in group if name in names])]
    held = held_out(groups, settings.heldout_share, settings.heldout_names, settings.seed)
    sides = {text.name: "heldout" if text.name in held else "train" for text in usable}
    too_short = {text.name: text.tokens for text in texts if text.name not in sides}
    with Output(folder, _identity(settings, maker, fingerprints), replace=replace) as output:
        if output.done:
            say(f"going on: {output.kept} rows are there already")
        try:
            for text in usable:
                made = _of_document(text, sides[text.name], settings, maker, count, output)
                say(f"{text.name}: {sides[text.name]}, {made} new rows")
        except EndpointError as error:
            raise DataError(
                f"{error}; {output.kept} rows are kept in {folder}, the same command goes on from there"
            ) from None
        facts = Facts.of(output, sides, too_short, copies)
    content = card(facts, _shown(settings, maker), command)
    write_atomic(folder / CARD, content)
    return facts


def _with_text(documents: Sequence[Document]) -> list[Document]:
    if not documents:
        raise DataError("there is no document with text to ask about: give text files")
    for document in documents:
        if "\0" in document.text:
            raise DataError(f"{document.name} is binary, it holds zero bytes: give text, or leave it out")
    return list(documents)


def _serves(text: Text, length: int) -> bool:
    """Whether examples of `length` can be made: half of it at least, and a sentence to ask about."""
    return 2 * text.tokens >= _window_tokens(length) and any(each.is_plain for each in text.sentences)


def _window_tokens(length: int) -> int:
    return length - min(_QUESTION_TOKENS, length // 4)


def _of_document(
    text: Text, side: str, settings: LongQASettings, maker: Maker, count: TokenCounter, output: Output
) -> int:
    """Make what is missing of one document; how many rows were kept."""
    before = output.kept
    for length in settings.lengths:
        for index in range(settings.per_document if _serves(text, length) else 0):
            name = f"{text.name}:{length}:{index}"
            if name in output.done:
                continue
            # A generator of its own, so that a row does not depend on which were made in this run.
            generator = random.Random(f"{settings.seed}:{name}")
            reason = "no question found"
            for attempt in range(maker.attempts):
                window = text.window(_window_tokens(length), generator)
                draft = maker.draft(window, generator, index, attempt) if window else "no sentence is short enough"
                if isinstance(draft, str):
                    reason = draft
                    continue
                assert window is not None
                row = _row(name, text.name, length, window, draft, count)
                if row["tokens"] > length - min(_TEMPLATE_TOKENS, length // 8):
                    reason = "question is too long"
                elif not output.is_new(window.text, draft):
                    reason = "asked before"
                else:
                    output.keep(side, row, window.text, draft)
                    break
            else:
                output.drop(name, reason)
    return output.kept - before


def _row(name: str, document: str, length: int, window: Window, draft: Draft, count: TokenCounter) -> dict[str, Any]:
    content = f"{window.text}\n\n{draft.question}"
    middle = (draft.start + draft.end) / 2
    return {
        "id": name,
        "document": document,
        "task": draft.task,
        "length": length,
        "tokens": sum(count([content, draft.answer])),
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": draft.answer}],
        "document_end": len(window.text),
        "answer": draft.answer,
        "evidence": {"start": draft.start, "end": draft.end, "position": round(middle / len(window.text), 4)},
        "window": {"start": window.start, "end": window.start + len(window.text)},
    }


def _identity(settings: LongQASettings, maker: Maker, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What has to be the same for a restarted command to go on."""
    return {"schema": _SCHEMA, **_shown(settings, maker), "documents": dict(fingerprints)}


def _shown(settings: LongQASettings, maker: Maker) -> dict[str, Any]:
    return {
        "tokens": list(settings.lengths),
        "tokens_by": settings.tokens_by,
        "per_document": settings.per_document,
        "seed": settings.seed,
        "heldout": list(settings.heldout_names) or settings.heldout_share,
        **maker.settings(),
    }
