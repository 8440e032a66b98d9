"""The dataset card: what is in a set, how it was made, and what its maker has to add."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from longlora.data.longqa.endpoint import TASK as FROM_ENDPOINT
from longlora.data.longqa.output import SIDES, Output

_FIFTHS = 5


@dataclass
class Side:
    """Counts of one file."""

    tasks: Counter[str] = field(default_factory=Counter)
    lengths: dict[int, list[int]] = field(default_factory=dict)
    """Tokens of its examples, by the length asked for."""
    documents: Counter[str] = field(default_factory=Counter)
    fifths: Counter[int] = field(default_factory=Counter)
    """Where the evidence stands: fifths of the document, from 0."""

    @property
    def rows(self) -> int:
        return self.tasks.total()

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row."""
        self.tasks[row["task"]] += 1
        self.documents[row["document"]] += 1
        self.lengths.setdefault(row["length"], []).append(row["tokens"])
        self.fifths[min(int(row["evidence"]["position"] * _FIFTHS), _FIFTHS - 1)] += 1


@dataclass(frozen=True)
class Facts:
    """What a set holds."""

    sides: Mapping[str, Side]
    side_of: Mapping[str, str]
    """Side of each document that was used."""
    dropped: Counter[str]
    """Examples that came to nothing, by reason."""
    too_short: Mapping[str, int]
    """Tokens of each document that was left out."""
    copies: Sequence[tuple[str, str]]
    """Documents left out, each with the one it is a copy of."""

    @classmethod
    def of(
        cls,
        output: Output,
        side_of: Mapping[str, str],
        too_short: Mapping[str, int],
        copies: Sequence[tuple[str, str]],
    ) -> Facts:
        """Counted from the files."""
        sides = {side: Side() for side in SIDES}
        for side, counts in sides.items():
            for row in output.rows[side]:
                counts.add(row)
        return cls(sides, side_of, Counter(row["reason"] for row in output.dropped), too_short, copies)

    def summary(self) -> str:
        """One line, for the command line."""
        parts = [
            f"{side} {counts.rows} rows of {len(counts.documents)} documents" for side, counts in self.sides.items()
        ]
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.dropped.items()))
        return "; ".join(parts) + (f"; dropped {self.dropped.total()} ({reasons})" if reasons else "")


def card(facts: Facts, settings: Mapping[str, Any], command: str) -> str:
    """README.md with the metadata that dataset hubs read."""
    asked = FROM_ENDPOINT in {task for side in facts.sides.values() for task in side.tasks}
    return "\n".join(
        [
            *_front_matter(facts),
            "# Long question answering\n",
            "Questions about parts of the documents below, each with its answer and the place of its evidence. "
            + (_ASKED if asked else _EXTRACTED),
            "\n## Licence\n",
            "TO BE FILLED IN: the rows quote the documents at length, so the licences of the documents apply.",
            "\n## Rows\n",
            *_table(["task", *SIDES], _task_rows(facts)),
            "\n## Lengths\n",
            f"Tokens are counted by {settings['tokens_by']}: document, question and answer, without a chat template.\n",
            *_table(["asked for", "file", "rows", "least", "median", "most"], _length_rows(facts)),
            "\n## Where the evidence stands\n",
            "Rows by fifth of the document, by the middle of the evidence.\n",
            *_table(["file", *(f"{20 * part} to {20 * part + 20} %" for part in range(_FIFTHS))], _fifth_rows(facts)),
            "\n## Documents\n",
            "Each document is on one side; so are documents that share text.\n",
            *_table(["document", "file", "rows"], _document_rows(facts)),
            *_left_out(facts),
            "\n## How it was made\n",
            *(f"- {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()),
            f"\n```\n{command}\n```\n",
        ]
    )


_EXTRACTED = (
    "Questions and answers were extracted from the documents by rules, without a model. The whole text that is shown "
    "was searched, so that each question has exactly one right answer. The same command makes the same rows."
)
_ASKED = (
    "Questions and answers were written by the model named below; a row was kept only if the quotation that proves it "
    "stands in the text, once, word for word. Whether the answer is right was not checked. The parts of the documents "
    "are decided by the seed, the replies are the model's."
)


def _front_matter(facts: Facts) -> list[str]:
    files = [
        line
        for side, counts in facts.sides.items()
        if counts.rows
        for line in (f"  - split: {side}", f"    path: {side}.jsonl")
    ]
    head = ["---", "license: unknown", "task_categories:", "- question-answering", "tags:", "- long-context"]
    return [*head, *(["configs:", "- config_name: default", "  data_files:"] if files else []), *files, "---\n"]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [[_cell(value) for value in row] for row in (head, ["---"] * len(head), *rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _task_rows(facts: Facts) -> list[list[Any]]:
    tasks = sorted({task for side in facts.sides.values() for task in side.tasks})
    rows = [[task, *(side.tasks[task] for side in facts.sides.values())] for task in tasks]
    return [*rows, ["all", *(side.rows for side in facts.sides.values())]]


def _length_rows(facts: Facts) -> list[list[Any]]:
    return [
        [length, name, len(tokens), min(tokens), int(median(tokens)), max(tokens)]
        for name, side in facts.sides.items()
        for length, tokens in sorted(side.lengths.items())
    ]


def _fifth_rows(facts: Facts) -> list[list[Any]]:
    return [[name, *(side.fifths[part] for part in range(_FIFTHS))] for name, side in facts.sides.items() if side.rows]


def _document_rows(facts: Facts) -> list[list[Any]]:
    return [[name, side, facts.sides[side].documents[name]] for name, side in facts.side_of.items()]


def _left_out(facts: Facts) -> list[str]:
    lines = [f"- left out, too short: {name} ({tokens} tokens)" for name, tokens in facts.too_short.items()]
    lines += [f"- left out: {name}, a copy of {original}" for name, original in facts.copies]
    lines += [f"- dropped examples: {count}, {reason}" for reason, count in sorted(facts.dropped.items())]
    return ["", *lines] if lines else []
