"""A report as GitHub-flavoured Markdown.

In: `Page`. Out: text with every table of the page. Every string is taken as untrusted and escaped here.
"""

from __future__ import annotations

import re

from longlora.evaluation.report.page import (
    Block,
    Bullets,
    Figures,
    Folded,
    Heading,
    Listing,
    Maps,
    Page,
    Paragraph,
    Verdicts,
)
from longlora.evaluation.report.tables import Table, printable
from longlora.evaluation.report.verdict import Verdict


def to_markdown(page: Page) -> str:
    """`page` as GitHub-flavoured Markdown with the same tables; figures are named, not shown."""
    parts = [f"# {_text(page.title)}", _text(page.subtitle)]
    for section in page.sections:
        parts += [f"## {_text(section.title)}", *map(_block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _text(text: str) -> str:
    """`text` on one line, with nothing in it that Markdown or HTML would act on."""
    text = " ".join(printable(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\`*|~]", r"\\\g<0>", text)
    # A link needs "](", and an interval such as [0.1, 0.9] should stay readable in the source.
    return text.replace("](", "]\\(").replace("![", "!\\[")


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            # At the beginning of a line these make a heading, a list, or the address of a link.
            return re.sub(r"^(\d*)([#+.)\[-])", r"\1\\\2", _text(text))
        case Heading(text):
            return f"### {_text(text)}"
        case Bullets(items):
            return "\n".join(f"- {_text(item)}" for item in items)
        case Verdicts(items):
            return "\n".join(_verdict(verdict) for verdict in items)
        case Figures(_, caption):
            return f"(Figure in report.html: {_text(caption)})"
        case Maps(tables, caption):
            return "\n\n".join([*(f"{_text(table.title)}:\n\n{_table(table)}" for table in tables), _text(caption)])
        case Folded(table):
            return f"{_text(table.title)}:\n\n{_table(table)}"
        case Listing(title, text):
            # A fence longer than any run of backticks inside cannot be closed by the text.
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return f"{_text(title)}:\n\n{fence}\n{printable(text).rstrip()}\n{fence}"
        case Table():
            return _table(block)


def _verdict(verdict: Verdict) -> str:
    numbers = "".join(f"\n  - {_text(line)}" for line in verdict.numbers)
    return f"- **{verdict.status}**: {_text(verdict.claim)}{numbers}"


def _table(table: Table) -> str:
    side = "---:" if table.numeric else "---"
    lines = [[_text(name) for name in table.columns], ["---", *[side] * (len(table.columns) - 1)]]
    for row in table.rows:
        label = f"{row.label} ({row.detail})" if row.detail else row.label
        lines.append([_text(label), *(_text(str(cell)) for cell in row.cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
