"""Text of a model on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Without the control characters with which a document could, through an answer, rule the terminal."""
    return "".join(letter for letter in text if letter in "\n\t" or letter.isprintable() or letter == "\u00a0")
