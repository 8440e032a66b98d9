"""Files to text: what a reader would see, and one line for everything that is no text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from longlora.errors import DataError
from longlora.inference import files
from longlora.inference.files import read_file, text_of


def pdf(*pages: str, password: str | None = None) -> bytes:
    """A PDF with a line of text on each page; without text a page is blank."""
    writer = PdfWriter()
    values = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    font = DictionaryObject({NameObject(key): NameObject(value) for key, value in values.items()})
    for text in pages:
        page = writer.add_blank_page(300, 200)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
        )
        if text:
            stream = DecodedStreamObject()
            stream.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode("ascii"))
            page[NameObject("/Contents")] = writer._add_object(stream)
    if password is not None:
        writer.encrypt(password, owner_password="owner", algorithm="RC4-128")
    made = BytesIO()
    writer.write(made)
    return made.getvalue()


def test_text_keeps_everything_but_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes(b"\xef\xbb\xbf# caf\xc3\xa9\r\n\r\n  one\rtwo")
    found = read_file(path)
    assert (found.name, found.text, found.note) == ("a.md", "# café\n\n  one\ntwo", "")
    assert text_of("π\r\n".encode("utf-16"), "w.txt").text == "π\n"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ('before <script>var s = "<!--";</script><p>after', "before\nafter"),
        ("<!-- <script> --><p>seen<!-- more", "seen"),
        ("<p>if a < b then stop", "if a < b then stop"),
        ("<p>an unfinished <a href", "an unfinished"),
        ("<p>\u0130<STYLE>p{}</Style >x", "\u0130x"),
        ("<pre>a\tb\r\n\tc</pre>", "a\tb\n\tc"),
    ],
)
def test_html_that_is_easily_read_wrong(page: str, text: str) -> None:
    assert text_of(page.encode(), "p.html").text == text


def test_html_is_what_a_reader_sees() -> None:
    page = b"""<!doctype html><html><head><meta charset="iso-8859-1"><title>no</title><style>p{}</style></head><body>
    <h1>Chap<i>ter</i>
      one</h1><script>alert("no")</script><!-- no -->
    <p>caf\xe9 &amp;  bar<br>next<p>end</p><ul><li>a</li><li>b</li></ul>
    <table><tr><td>1</td><td>2</td></tr></table><pre>x  y
  z</pre></body></html>"""
    assert text_of(page, "p.html").text == "Chapter one\ncafé & bar\nnext\nend\na\nb\n1 2\nx  y\n  z"


def test_pdf_gives_the_text_of_its_pages_and_says_which_have_none() -> None:
    found = text_of(pdf("Call me Ishmael", "Some years ago"), "moby.pdf")
    assert found.text == "Call me Ishmael\n\nSome years ago"
    assert found.note == ""
    partly = text_of(pdf("Call me", "", ""), "partly.pdf")
    assert partly.text.strip() == "Call me"
    assert partly.note == "partly.pdf: 2 of 3 pages hold no text"
    # Known by its first bytes, whatever it is called; and a file without a password to open it is open.
    assert text_of(pdf("named otherwise"), "x.txt").text == "named otherwise"
    assert text_of(pdf("locked against printing", password=""), "x.pdf").text == "locked against printing"


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (lambda: b"\x89PNG\r\n\x1a\n\0\0", "p.png", "p.png is a binary file (byte 0x00 at 8): give a text, Markdown"),
        (lambda: b"<p>\0", "p.html", "p.html is a binary file (byte 0x00 at 3)"),
        (lambda: b"caf\xe9", "l.txt", "l.txt is not UTF-8 text (byte 0xe9 at 3)"),
        (lambda: b"", "e.txt", "e.txt is empty"),
        (lambda: b" \n\t", "b.txt", "b.txt holds no text"),
        (lambda: b"<html><script>1</script></html>", "s.html", "s.html holds no text"),
        (lambda: pdf("", ""), "s.pdf", "s.pdf holds no text on its 2 pages, which are pictures (scanned?): run OCR"),
        (lambda: pdf("secret", password="x"), "c.pdf", "c.pdf is encrypted: remove its password first"),
        (lambda: pdf("cut off")[:200], "d.pdf", "d.pdf cannot be read as PDF ("),
        (lambda: b"no pdf at all", "n.pdf", "n.pdf cannot be read as PDF ("),
    ],
)
def test_what_is_no_text_is_one_line(content: Callable[[], bytes], name: str, expected: str) -> None:
    with pytest.raises(DataError) as refused:
        text_of(content(), name)
    assert str(refused.value).startswith(expected)
    assert "\n" not in str(refused.value)


def test_what_is_no_file_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"none.txt does not exist: give a text"):
        read_file(tmp_path / "none.txt")
    with pytest.raises(DataError, match="is a folder"):
        read_file(tmp_path)
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 2**20)
    (tmp_path / "large.txt").write_bytes(b"a" * 2**20)
    assert len(read_file(tmp_path / "large.txt").text) == 2**20
    (tmp_path / "large.txt").write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(DataError, match="is larger than the limit of 1 MiB"):
        read_file(tmp_path / "large.txt")


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(DataError, match="x.pdf needs a package that reads PDF: pip install pypdf"):
        text_of(b"%PDF-1.4", "x.pdf")
    monkeypatch.setitem(sys.modules, "bs4", None)
    with pytest.raises(DataError, match="pip install beautifulsoup4"):
        text_of(b"<p>a", "x.html")
