"""A report as blocks of plain text, tables and figures. `render.py` and `markdown.py` show them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from longlora.evaluation.report.tables import Table
from longlora.evaluation.report.verdict import Verdict


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of text."""

    text: str


@dataclass(frozen=True)
class Heading:
    """A heading below that of a section."""

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
    """SVG elements made by `plots` and `curves`, side by side where there is room. Markdown shows the caption only."""

    svgs: tuple[str, ...]
    caption: str


@dataclass(frozen=True)
class Maps:
    """Tables whose cells are coloured by their shade, side by side where there is room."""

    tables: tuple[Table, ...]
    caption: str


@dataclass(frozen=True)
class Folded:
    """A table that is folded under its title."""

    table: Table


@dataclass(frozen=True)
class Listing:
    """Verbatim text, folded under `title`."""

    title: str
    text: str


Block = Paragraph | Heading | Bullets | Verdicts | Figures | Maps | Folded | Listing | Table


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]

    def tables(self) -> Iterator[Table]:
        """Every table of the section, in order."""
        for block in self.blocks:
            match block:
                case Table():
                    yield block
                case Folded(table):
                    yield table
                case Maps(tables):
                    yield from tables
                case _:
                    pass


@dataclass(frozen=True)
class Page:
    """The whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
