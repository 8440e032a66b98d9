"""Instructions to a token shard whose mask says what is to be learned: answers and their end tokens.

In: sources of `instruct_records.py`, read as conversations by `instruct_examples.py`, written with a template by
`instruct_template.py` and shortened to the context by `instruct_tokens.py`. Out: a shard, and a report of what was
shortened or left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from longlora.config import InstructConfig
from longlora.data.instruct_examples import Example, read_examples
from longlora.data.instruct_template import ends_answers, joint_of, set_chat_template, with_system
from longlora.data.instruct_tokens import Encoder
from longlora.data.shards import TokenRow, TokenShard, named, write_rows
from longlora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES_SHOWN = 3
_ENDLESS = (
    "; WARNING: the template writes no control token behind an answer, so the model will not learn to end one: add "
    "{{ eos_token }} there"
)


@dataclass
class InstructReport:
    """Counts the examples of one shard and names those left out or shortened."""

    examples: int = 0
    """Examples that were read, before weights."""
    shortened: list[str] = field(default_factory=list)
    """Names of examples whose document lost tokens."""
    removed_tokens: int = 0
    """Tokens they lost together."""
    too_long: list[str] = field(default_factory=list)
    """Longer than the context even without their documents."""
    empty: list[str] = field(default_factory=list)
    """With an answer that is empty."""
    undecodable: list[str] = field(default_factory=list)
    """With text that is not valid Unicode."""
    endless: bool = False
    """Whether the template writes no control token behind an answer."""
    control_tokens: list[str] = field(default_factory=list)
    """With text that the tokenizer would read as control tokens."""

    def summary(self, context_length: int) -> str:
        """One line, for example ``read 12 examples; left out: 1 with an empty answer (a)``."""
        line = f"read {self.examples:,} example{'' if self.examples == 1 else 's'}"
        if self.shortened:
            line += (
                f"; shortened the documents of {len(self.shortened):,} by {self.removed_tokens:,} tokens "
                f"({_first(self.shortened)})"
            )
        left_out = ", ".join(
            f"{len(names):,} {why} ({_first(names)})"
            for names, why in (
                (self.too_long, f"longer than {context_length:,} tokens without their documents"),
                (self.empty, "with an empty answer"),
                (self.undecodable, "with invalid Unicode"),
                (self.control_tokens, "with control tokens in their text"),
            )
            if names
        )
        line += f"; left out: {left_out}" if left_out else ""
        return line + (_ENDLESS if self.endless else "")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


def check_sources(sources: Sequence[str], settings: InstructConfig) -> None:
    """Raise `DataError` for a local source that does not exist, before anything is read."""
    for source in sources:
        read_examples(source, settings.system, joint_of(settings.template))


def write_instruct_shard(
    folder: Path,
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: InstructConfig,
    context_length: int,
    tokenizer_hash: str,
    weights: Sequence[float] = (),
    seed: int = 0,
    report: InstructReport,
) -> TokenShard:
    """Tokenize the examples of `sources` into a new shard at `folder`; nothing is left unless all of it was written.

    The chat template of `settings` is set on `tokenizer` and kept, with its system message, in the shard.

    Args:
        context_length: tokens of the longest example.
        weights: how often the examples of each source are used; empty means once.
        seed: draws the examples where a weight is no whole number.
        report: is filled while examples are read.

    Raises:
        DataError: a source or the template cannot be used, no example is left, or the disk refused.
        RunFolderError: `folder` exists.
    """
    template = set_chat_template(tokenizer, settings.template)
    report.endless = not ends_answers(tokenizer)
    encoder = Encoder(tokenizer, context_length, settings.shorten)
    return write_rows(
        folder,
        _rows(sources, encoder, settings, weights or [1.0] * len(sources), seed, report),
        tokenizer_hash=tokenizer_hash,
        nothing_left=lambda: f"no example is left for {folder}, {report.summary(context_length)}: give other examples",
        facts=lambda: {
            "kind": "instruct",
            "chat_template": with_system(template, settings.system),
            "context_length": context_length,
            "shortened": named(report.shortened),
            "removed_tokens": report.removed_tokens,
            "too_long": named(report.too_long),
            "empty": named(report.empty),
            "undecodable": named(report.undecodable),
            "control_tokens": named(report.control_tokens),
        },
    )


def _rows(
    sources: Sequence[str],
    encoder: Encoder,
    settings: InstructConfig,
    weights: Sequence[float],
    seed: int,
    report: InstructReport,
) -> Iterator[TokenRow]:
    for number, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        draw = random.Random(f"{seed}:{number}")
        for example in read_examples(source, settings.system, joint_of(settings.template)):
            report.examples += 1
            # Drawn for every example, so that leaving one out moves no other.
            times = int(weight) + (draw.random() < weight % 1)
            row = _row(example, encoder, report) if times else None
            if row is None:
                continue
            yield row
            yield from (TokenRow(f"{row.name}#{copy}", row.tokens, row.mask) for copy in range(2, times + 1))


def _row(example: Example, encoder: Encoder, report: InstructReport) -> TokenRow | None:
    """The tokens of `example`, or None if it is left out."""
    if why := encoder.unusable(example):
        getattr(report, why).append(example.name)
        return None
    encoded = encoder.encode(example)
    if encoded is None:
        report.too_long.append(example.name)
        return None
    if not any(encoded.mask):
        raise DataError(f"{example.place}: the template writes nothing of its answers")
    if encoded.removed:
        report.shortened.append(example.name)
        report.removed_tokens += encoded.removed
    return TokenRow(example.name, encoded.tokens, encoded.mask)
