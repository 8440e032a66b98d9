"""A report as blocks, rendered to one self-contained HTML page or to Markdown.

In: `Page`. Out: text. Every string is taken as untrusted and escaped here; only the SVG of `Figures` goes in as it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape

from longlora.evaluation.summary import Cell, Table
from longlora.evaluation.verdict import Verdict


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Verdicts:
    """Claims with PASS, FAIL or not measured, and their numbers."""

    items: tuple[Verdict, ...]


@dataclass(frozen=True)
class Figures:
    """SVG elements made by `plots`, side by side where there is room. Markdown shows the caption only."""

    svgs: tuple[str, ...]
    caption: str


@dataclass(frozen=True)
class Listing:
    """Verbatim text, folded under `title`."""

    title: str
    text: str


Block = Paragraph | Bullets | Verdicts | Figures | Listing | Table


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --quiet: #5c6570; --rule: #d9dde2; --paper: #ffffff; --tint: #f5f6f8;
  --pass: #0b6b3a; --fail: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --quiet: #9aa4af; --rule: #353b43; --paper: #15181c;
  --tint: #1d2126; --pass: #5fcf94; --fail: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.5rem; line-height: 1.25; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; font-weight: 600; margin: 2.75rem 0 .6rem; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.subtitle, .caption { color: var(--quiet); }
.caption { font-size: .875rem; }
ul { padding-left: 1.2rem; max-width: 46rem; }
li { margin: .25rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .75rem 0 1.25rem; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; vertical-align: top; text-align: left; border-bottom: 1px solid var(--rule); }
th:first-child { padding-left: 0; }
thead th { color: var(--quiet); font-weight: 500; font-size: .875rem; white-space: nowrap; }
tbody th { font-weight: 400; overflow-wrap: anywhere; }
tr.joined > * { border-bottom: 0; padding-bottom: 0; }
.numeric th + th, .numeric td { text-align: right; white-space: nowrap; }
.numeric th:last-child, .numeric td:last-child { padding-right: 0; }
.detail { display: block; color: var(--quiet); font-size: .8125rem; }
.facts tbody th { color: var(--quiet); white-space: nowrap; }
.facts td { overflow-wrap: anywhere; min-width: 8rem; }
.verdicts { list-style: none; padding: 0; max-width: none; }
.verdicts > li { display: grid; grid-template-columns: 8.25rem 1fr; padding: .6rem 0; margin: 0;
  border-bottom: 1px solid var(--rule); }
.verdicts .detail { font-size: .875rem; }
.status { font-weight: 600; font-size: .875rem; line-height: 1.7; color: var(--quiet); }
.pass { color: var(--pass); }
.fail { color: var(--fail); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: .75rem 0; }
.figures svg { height: auto; min-width: 0; }
details { border: 1px solid var(--rule); border-radius: 6px; }
summary { padding: .5rem .85rem; cursor: pointer; }
pre { margin: 0; padding: .85rem; overflow-x: auto; background: var(--tint); border-top: 1px solid var(--rule);
  font: .8125rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (max-width: 34rem) {
  body { padding: 1.25rem 1rem 3rem; }
  th, td { padding: .4rem .5rem; }
  table { font-size: .875rem; }
  .verdicts > li { grid-template-columns: 1fr; }
  .numeric tbody th { min-width: 8rem; }
  /* The label on a line of its own leaves the width to the numbers. */
  .narrow tr { display: grid; grid-template-columns: repeat(3, 1fr); border-bottom: 1px solid var(--rule); }
  .narrow tr > * { border-bottom: 0; padding-inline: 0; }
  .narrow tr > :first-child { grid-column: 1 / -1; padding-bottom: 0; }
  .narrow tr.joined { border-bottom: 0; }
}
"""


def to_html(page: Page) -> str:
    """`page` as one HTML file without scripts or external resources, for light and dark mode."""
    sections = "\n".join(
        f"<section>\n<h2>{_html(section.title)}</h2>\n" + "\n".join(map(_block_html, section.blocks)) + "\n</section>"
        for section in page.sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_html(page.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{_html(page.title)}</h1>\n<p class="subtitle">{_html(page.subtitle)}</p>\n</header>\n'
        f"<main>\n{sections}\n</main>\n</body>\n</html>\n"
    )


def _html(text: str) -> str:
    return escape(_printable(text))


def _printable(text: str) -> str:
    """Without control characters and lone surrogates, which neither HTML nor UTF-8 can hold."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def _block_html(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{_html(text)}</p>"
        case Bullets(items):
            return _list_html(items)
        case Verdicts(items):
            return '<ul class="verdicts">\n' + "\n".join(map(_verdict_html, items)) + "\n</ul>"
        case Figures(svgs, caption):
            return f'<div class="figures">\n{"".join(svgs)}</div>\n<p class="caption">{_html(caption)}</p>'
        case Listing(title, text):
            return f"<details>\n<summary>{_html(title)}</summary>\n<pre>{_html(text)}</pre>\n</details>"
        case Table():
            return _table_html(block)


def _list_html(items: tuple[str, ...]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{_html(item)}</li>" for item in items) + "\n</ul>"


def _verdict_html(verdict: Verdict) -> str:
    kind = {"PASS": "pass", "FAIL": "fail"}.get(verdict.status, "open")
    numbers = "".join(f'<span class="detail">{_html(line)}</span>' for line in verdict.numbers)
    return f'<li><span class="status {kind}">{verdict.status}</span><div>{_html(verdict.claim)}{numbers}</div></li>'


def _table_html(table: Table) -> str:
    columns = "".join(f'<th scope="col">{_html(name)}</th>' for name in table.columns)
    kinds = ["numeric" if table.numeric else "facts"] + ["narrow"] * (table.numeric and len(table.columns) == 4)
    lines = [f'<div class="scroll"><table class="{" ".join(kinds)}">']
    lines.append(f"<thead><tr>{columns}</tr></thead>\n<tbody>")
    for index, row in enumerate(table.rows):
        following = table.rows[index + 1].group if index + 1 < len(table.rows) else ""
        kind = ' class="joined"' if row.group and row.group == following else ""
        cells = "".join(f"<td>{_cell_html(cell)}</td>" for cell in row.cells)
        lines.append(f'<tr{kind}><th scope="row">{_cell_html(Cell(row.label, row.detail))}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def _cell_html(cell: Cell) -> str:
    detail = f'<span class="detail">{_html(cell.detail)}</span>' if cell.detail else ""
    return _html(cell.text) + detail


def to_markdown(page: Page) -> str:
    """`page` as GitHub-flavoured Markdown with the same tables; figures are named, not shown."""
    parts = [f"# {_markdown(page.title)}", _markdown(page.subtitle)]
    for section in page.sections:
        parts += [f"## {_markdown(section.title)}", *map(_block_markdown, section.blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(text: str) -> str:
    """`text` on one line, with nothing in it that Markdown or HTML would act on."""
    text = " ".join(_printable(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\`*|~]", r"\\\g<0>", text)
    # A link needs "](", and an interval such as [0.1, 0.9] should stay readable in the source.
    return text.replace("](", "]\\(").replace("![", "!\\[")


def _block_markdown(block: Block) -> str:
    match block:
        case Paragraph(text):
            return _markdown(text)
        case Bullets(items):
            return "\n".join(f"- {_markdown(item)}" for item in items)
        case Verdicts(items):
            return "\n".join(_verdict_markdown(verdict) for verdict in items)
        case Figures(_, caption):
            return f"(Figure in report.html: {_markdown(caption)})"
        case Listing(title, text):
            # A fence longer than any run of backticks inside cannot be closed by the text.
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
            return f"{_markdown(title)}:\n\n{fence}\n{_printable(text).rstrip()}\n{fence}"
        case Table():
            return _table_markdown(block)


def _verdict_markdown(verdict: Verdict) -> str:
    numbers = "".join(f"\n  - {_markdown(line)}" for line in verdict.numbers)
    return f"- **{verdict.status}**: {_markdown(verdict.claim)}{numbers}"


def _table_markdown(table: Table) -> str:
    side = "---:" if table.numeric else "---"
    lines = [[_markdown(name) for name in table.columns], ["---", *[side] * (len(table.columns) - 1)]]
    for row in table.rows:
        label = f"{row.label} ({row.detail})" if row.detail else row.label
        lines.append([_markdown(label), *(_markdown(str(cell)) for cell in row.cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
