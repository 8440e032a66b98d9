"""How long a prompt is, part by part, against the model's window; and what an answer took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """Tokens of one prompt and its answer. `template` is what the chat template adds, system message included."""

    documents: int
    history: int
    """Earlier questions and answers."""
    question: int
    template: int
    answer: int
    """What is kept free for the answer."""
    window: int
    """Tokens the model handles (max_position_embeddings)."""

    @property
    def prompt(self) -> int:
        return self.documents + self.history + self.question + self.template

    @property
    def missing(self) -> int:
        """Tokens by which it is too long; not positive if it fits."""
        return self.prompt + self.answer - self.window

    def sum(self) -> str:
        """For example ``document 14,000 + question 20 + template 31 + answer 512 = 14,563 tokens``."""
        parts = {
            "document": self.documents,
            "earlier turns": self.history,
            "question": self.question,
            "template": self.template,
            "answer": self.answer,
        }
        shown = " + ".join(f"{name} {tokens:,}" for name, tokens in parts.items() if tokens)
        return f"{shown} = {self.prompt + self.answer:,} tokens"

    def refusal(self) -> str:
        """One line that says why it does not fit, and what would."""
        remedies = []
        if self.answer > self.missing:
            remedies.append(f"keep {self.answer - self.missing:,} tokens for the answer instead of {self.answer:,}")
        if self.documents > self.missing:
            remedies.append(f"shorten the document by {self.missing:,} token{'s' * (self.missing > 1)}")
        if self.history:
            remedies.append("clear the earlier turns")
        remedies.append("take a model with a longer context")
        return f"{self.sum()}, the model's window is {self.window:,}: {' or '.join(remedies)}"


@dataclass
class Numbers:
    """What an answer took so far; times in seconds."""

    lengths: Lengths
    reused: int
    """Tokens of the prompt that the KV cache held from before."""
    read: int = 0
    """Tokens of the prompt that are in the cache by now, those reused included."""
    tokens: int = 0
    """Of the answer, without the one that ends it."""
    to_first_token: float | None = None
    generating: float = 0.0
    """From the first token to the last."""
    ended: str = ""
    """``end`` by the model itself, ``length`` at its budget, ``stopped`` by a person; empty while it goes on."""

    @property
    def per_second(self) -> float | None:
        """Tokens per second after the first; None before the second."""
        return (self.tokens - 1) / self.generating if self.tokens > 1 and self.generating > 0 else None

    def line(self) -> str:
        """One line for a person."""
        prompt = self.lengths.prompt
        if self.to_first_token is None:
            return f"reading: {self.read:,} of {prompt:,} tokens"
        kept = f" ({self.reused:,} kept from before)" if self.reused else ""
        parts = [f"prompt {prompt:,} of {self.lengths.window:,} tokens{kept}"]
        parts.append(f"first token after {self.to_first_token:.2f} s")
        rate = f" at {self.per_second:.1f} tokens/s" if self.per_second else ""
        parts.append(f"answer {self.tokens:,} {'token' if self.tokens == 1 else 'tokens'}{rate}")
        if self.ended == "length":
            parts.append(f"cut off at its budget of {self.lengths.answer:,} tokens")
        if self.ended == "stopped":
            parts.append("stopped")
        return "; ".join(parts)
