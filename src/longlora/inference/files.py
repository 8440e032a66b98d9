"""Files that a person asks about -> plain text: text of any kind, HTML and PDF; or one line that says why not."""

from __future__ import annotations

import codecs
import logging
import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from longlora.data.formats import unreadable
from longlora.errors import DataError, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bs4.element import PageElement, Tag
    from pypdf import PdfReader

MAX_FILE_BYTES = 32 * 2**20
"""Largest file, and the most characters of text that are taken out of one: far more than any window holds."""

_HTML_SUFFIXES = (".html", ".htm", ".xhtml")
_KNOWN = "give a text, Markdown, HTML or PDF file"
_UNSEEN = ("script", "style", "noscript", "template", "head", "svg", "iframe", "object")
_BLOCKS = re.compile(
    "address|article|aside|blockquote|br|caption|d[dlt]|div|fieldset|figcaption|figure|footer|form|h[1-6]|header|hr|li|"
    "main|nav|[ou]l|option|p|pre|section|summary|table|textarea|tr"
)


@dataclass(frozen=True)
class FileText:
    """What a file says."""

    name: str
    """Without its folder."""
    text: str
    """Not blank; line ends are ``\\n``."""
    note: str = ""
    """What a person should know, such as pages without text; else empty."""


def read_file(path: Path) -> FileText:
    """The text of a file.

    Raises:
        DataError: the file is missing, unreadable, larger than `MAX_FILE_BYTES`, empty or no text; a PDF is encrypted,
            damaged or holds pictures only; or a package is missing that reads the type.
    """
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder: give the files in it")
        with path.open("rb") as handle:
            content = handle.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: {_KNOWN}") from None
    except OSError as error:
        raise unreadable(path, error) from error
    return text_of(content, str(path))


def text_of(content: bytes, name: str) -> FileText:
    """The text of a file's bytes; its type is told by the end of `name` and by its first bytes.

    Raises:
        DataError: as `read_file`.
    """
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"{name} is larger than the limit of {MAX_FILE_BYTES // 2**20} MiB: give a part of it")
    if not content:
        raise DataError(f"{name} is empty: {_KNOWN}")
    note = ""
    if content.startswith(b"%PDF-") or name.lower().endswith(".pdf"):
        text, note = _pdf_text(content, name)
    elif name.lower().endswith(_HTML_SUFFIXES):
        text = _html_text(content, name)
    else:
        text = _plain_text(content, name)
    if len(text) > MAX_FILE_BYTES:
        raise DataError(f"{name} holds more than {MAX_FILE_BYTES:,} characters of text: give a part of it")
    if not text.strip():
        raise DataError(f"{name} holds no text: {_KNOWN}")
    return FileText(Path(name).name, text.replace("\r\n", "\n").replace("\r", "\n"), note)


def _plain_text(content: bytes, name: str) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in content:
        raise DataError(f"{name} is a binary file (byte 0x00 at {content.index(0):,}): {_KNOWN}")
    else:
        encoding = "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not {encoding.removesuffix('-sig').upper()} text (byte 0x{content[error.start]:02x} at "
            f"{error.start:,}): {_KNOWN}, or turn an older text into UTF-8 with iconv"
        ) from None


def _html_text(content: bytes, name: str) -> str:
    """What a reader of the page sees: a line for each block, without scripts and styles."""
    try:
        from bs4 import BeautifulSoup, UnicodeDammit
        from bs4.dammit import EncodingDetector
    except ImportError:
        raise DataError(f"{name} needs a package that reads HTML: pip install beautifulsoup4") from None
    if b"\0" in content and not content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name} is a binary file (byte 0x00 at {content.index(0):,}): {_KNOWN}")
    try:
        # Where a page names no encoding, one is guessed: of plain ASCII UTF-16 by some packages, so UTF-8 goes first.
        declared = EncodingDetector.find_declared_encoding(content, is_html=True)
        likely = [] if declared else ["utf-8"]
        markup = UnicodeDammit(content, user_encodings=likely, is_html=True).unicode_markup or ""
        text = _seen(BeautifulSoup(_closed(markup), "html.parser"))
    except RecursionError:
        raise DataError(f"{name} is nested too deep to be read as HTML: save it as text") from None
    # White space of the source means a blank, a block (\u2029) a new line, and of preformatted text everything counts.
    text = re.sub(r"[ \t\r\n\f]+", " ", text)
    text = (
        re.sub(r" ?\u2029[ \u2029]*", "\n", text).replace("\u2028", "\n").replace("\u00a0", " ").replace("\x1f", "\t")
    )
    return text.strip("\n ")


_NOT_SHOWN = re.compile(r"<!--|<(script|style)\b", re.IGNORECASE)

_ENDS = {
    "": re.compile("--(?=>)"),
    "script": re.compile("</script", re.IGNORECASE),
    "style": re.compile("</style", re.IGNORECASE),
}


def _closed(markup: str) -> str:
    """`markup` without comments, scripts and styles, and without an unfinished tag behind its last ``>``.

    Browsers show none of them. The parser looks for the end of each anew, to the end of the file: 40 kB of ``<a `` took
    it 15 s.
    """
    before, last, after = _shown(markup).rpartition(">")
    # Where no tag can end, "<" begins one only before a letter, "/", "!" or "?".
    return before + last + re.split(r"<(?=[a-zA-Z/!?])", after, maxsplit=1)[0]


def _shown(markup: str) -> str:
    """In linear time: each part's end is looked for behind its beginning; one without an end is the last."""
    parts, place = [], 0
    while (found := _NOT_SHOWN.search(markup, place)) is not None:
        parts.append(markup[place : found.start()])
        end = _ENDS[(found[1] or "").lower()].search(markup, found.end())
        close = markup.find(">", end.end()) if end else -1
        if close < 0:
            return "".join(parts)
        place = close + 1
    return "".join([*parts, markup[place:]])


def _seen(page: Tag) -> str:
    """The text of a page with marks: \\u2029 around blocks, \\u00a0 and \\u2028 for blanks and lines that count.

    One walk with a stack: the tree may be as deep as the file is long, because the parser closes no ``<p>`` by itself,
    and to put marks into the tree takes a time that grows with the square of its depth.
    """
    from bs4.element import CData, NavigableString, Tag

    pieces: list[str] = []
    # Children still to come, whether white space counts in them, whether a cell came already, and what ends them.
    stack: list[tuple[Iterator[PageElement], bool, list[bool], str]] = [(iter(page.contents), False, [False], "")]
    while stack:
        children, exact, cells, end = stack[-1]
        child = next(children, None)
        if child is None:
            stack.pop()
            pieces.append(end)
        elif type(child) in (NavigableString, CData):
            text = str(child)
            pieces.append(_exact(text) if exact else text)
        elif isinstance(child, Tag) and child.name not in _UNSEEN:
            mark = "\u2029" if _BLOCKS.fullmatch(child.name) else ""
            if child.name in ("td", "th"):
                mark = "\u00a0" if cells[0] else ""
                cells[0] = True
            pieces.append(mark)
            inside = exact or child.name in ("pre", "textarea")
            stack.append((iter(child.contents), inside, [False], mark if mark == "\u2029" else ""))
    return "".join(pieces)


def _exact(text: str) -> str:
    """Text in which white space counts, with marks in its place."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return lines.replace(" ", "\u00a0").replace("\n", "\u2028").replace("\t", "\x1f")


def _pdf_text(content: bytes, name: str) -> tuple[str, str]:
    """Text of all pages, and a note about those without."""
    try:
        from pypdf import PdfReader
    except ImportError:
        raise DataError(f"{name} needs a package that reads PDF: pip install pypdf") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of every oddity of a file
    try:
        reader = PdfReader(BytesIO(content))
        if reader.is_encrypted and not _opens(reader):
            raise DataError(f"{name} is encrypted: remove its password first, for example with qpdf --decrypt")
        pages: list[str] = []
        for page in reader.pages:
            pages.append(page.extract_text())
            if sum(map(len, pages)) > MAX_FILE_BYTES:
                break
    except DataError:
        raise
    except Exception as error:  # pypdf raises many kinds for damaged files
        reason = one_line(error)
        raise DataError(f"{name} cannot be read as PDF ({reason}): open and save it again, or give its text") from error
    blank = sum(not page.strip() for page in pages)
    if blank == len(pages):
        raise DataError(
            f"{name} holds no text on its {len(pages)} pages, which are pictures (scanned?): run OCR on it first, for "
            "example with ocrmypdf"
        )
    # Half a surrogate pair, as some fonts map to, is no text that a tokenizer takes.
    text = "\n\n".join(pages).encode("utf-8", "replace").decode("utf-8")
    return text, f"{name}: {blank} of {len(pages)} pages hold no text" if blank else ""


def _opens(reader: PdfReader) -> bool:
    """Whether an encrypted file opens without a password: many are locked against printing only."""
    from pypdf.errors import DependencyError

    try:
        return bool(reader.decrypt(""))
    except DependencyError:  # AES, and no package for it
        return False
