"""Tokens of an answer -> pieces of its text, each of whole characters."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of tokens as they come. A character may take several tokens; until it is whole it is held back."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = 0

    def add(self, token: int) -> str:
        """What can be shown now; may be empty."""
        self._tokens.append(token)
        return self._after(self._text().rstrip(_UNFINISHED))

    def rest(self) -> str:
        """What was held back, with a sign in place of a character that never became whole."""
        return self._after(self._text())

    def _text(self) -> str:
        # From the first token on: some tokenizers write a piece differently at the beginning of a text.
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _after(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece
