"""A report as one self-contained HTML page.

In: `Page`. Out: text. Every string is taken as untrusted and escaped here; only the SVG of `Figures` goes in as it is.
"""

from __future__ import annotations

import re
from html import escape

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
from longlora.evaluation.report.style import STYLE, shade_colours
from longlora.evaluation.report.tables import BEYOND, Cell, Row, Table, printable
from longlora.evaluation.report.verdict import Verdict


def to_html(page: Page) -> str:
    """`page` as one HTML file without scripts or external resources, for light and dark mode."""
    sections = "\n".join(
        f"<section>\n<h2>{_text(section.title)}</h2>\n" + "\n".join(map(_block, section.blocks)) + "\n</section>"
        for section in page.sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{_text(page.title)}</h1>\n<p class="subtitle">{_text(page.subtitle)}</p>\n</header>\n'
        f"<main>\n{sections}\n</main>\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return escape(printable(text))


def _breakable(name: str) -> str:
    """A name that may go on in the next line where a reader would part it."""
    return re.sub(r"([_/-])(?=\w)", r"\1<wbr>", _text(name))


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{_text(text)}</p>"
        case Heading(text):
            return f"<h3>{_text(text)}</h3>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_text(item)}</li>" for item in items) + "\n</ul>"
        case Verdicts(items):
            return '<ul class="verdicts">\n' + "\n".join(map(_verdict, items)) + "\n</ul>"
        case Figures(svgs, caption):
            return f'<div class="figures">\n{"".join(svgs)}</div>\n<p class="caption">{_text(caption)}</p>'
        case Maps(tables, caption):
            return f'<div class="maps">\n{"".join(map(_map, tables))}</div>\n<p class="caption">{_text(caption)}</p>'
        case Folded(table):
            return f"<details>\n<summary>{_text(table.title)}</summary>\n{_table(table)}\n</details>"
        case Listing(title, text):
            return f"<details>\n<summary>{_text(title)}</summary>\n<pre>{_text(text)}</pre>\n</details>"
        case Table():
            return _table(block)


def _verdict(verdict: Verdict) -> str:
    kind = {"PASS": "pass", "FAIL": "fail"}.get(verdict.status, "open")
    numbers = "".join(f'<span class="detail">{_text(line)}</span>' for line in verdict.numbers)
    return f'<li><span class="status {kind}">{verdict.status}</span><div>{_text(verdict.claim)}{numbers}</div></li>'


def _map(table: Table) -> str:
    return f"<figure>\n<figcaption>{_text(table.title)}</figcaption>\n{_table(table, shaded=True)}\n</figure>\n"


def _table(table: Table, shaded: bool = False) -> str:
    width = len(table.columns) - 1
    kinds = ["numeric" if table.numeric else "facts"]
    if table.numeric and not shaded:
        kinds.append("stacked")
    name = f' aria-label="{_text(table.title)}"' if table.title else ""
    columns = "".join(f'<th scope="col">{_breakable(column)}</th>' for column in table.columns)
    lines = [f'<div class="scroll" style="--columns: {width}"><table class="{" ".join(kinds)}"{name}>']
    lines.append(f"<thead><tr>{columns}</tr></thead>\n<tbody>")
    for index, row in enumerate(table.rows):
        following = table.rows[index + 1].group if index + 1 < len(table.rows) else ""
        lines.append(_row(row, joined=bool(row.group) and row.group == following, shaded=shaded))
    return "\n".join([*lines, "</tbody></table></div>"])


def _row(row: Row, joined: bool, shaded: bool) -> str:
    kind = ' class="joined"' if joined else ""
    cells = "".join(f"<td{_shade(cell) if shaded else ''}>{_cell(cell)}</td>" for cell in row.cells)
    return f'<tr{kind}><th scope="row">{_cell(Cell(row.label, row.detail))}</th>{cells}</tr>'


def _shade(cell: Cell) -> str:
    """Attributes of a coloured cell; hatched where it was measured beyond what the model's RoPE covers."""
    if cell.shade is None:
        return ""
    background, ink = shade_colours(cell.shade)
    hatched = ' class="hatched"' if cell.mark == BEYOND else ""
    return f'{hatched} style="background-color: {background}; color: {ink}"'


def _cell(cell: Cell) -> str:
    mark = f"<sup>{_text(cell.mark)}</sup>" if cell.mark else ""
    below = [cell.detail] if cell.detail else []
    below += [str(item) for item in cell.below]
    return _text(cell.text) + mark + "".join(f'<span class="detail">{_text(line)}</span>' for line in below)
