"""The section ``data.instruct``: how instructions become tokens. Read with ``data.kind: instruct`` only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from longlora.config.section import Section


class InstructConfig(Section):
    """Instructions and answers to train on: LongAlpaca, Alpaca, chat messages, prompt and completion."""

    template: str = "chat"
    """``chat``: the tokenizer's own chat template; ``llama2``: the paper's ``[INST]question[/INST]answer``; else a file
    with a Jinja template. It is stored with the model."""
    system: str | None = None
    """System message of conversations that have none of their own, afterwards too: it is stored with the template. Null
    means none."""
    shorten: Literal["middle", "head", "tail"] = "middle"
    """Where tokens of the document are taken out when an example is longer than `context.context_length`. Question and
    answer are never cut: an example that is too long without its document is left out, and counted."""
    loss_weighting: Literal["tokens", "examples"] = "tokens"
    """``tokens``: every token of an answer weighs the same; ``examples``: every example does, however long its answers
    are (LongAlign, Bai et al. 2024)."""
    weights: list[Annotated[float, Field(gt=0)]] = []
    """How often the examples of each source of `data.train` are used, in the same order: 2 is twice, 0.5 every other
    one, drawn by `train.seed`. Empty means once each."""
