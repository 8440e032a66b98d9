"""A conversation about documents -> the tokens of its prompt, by the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from longlora.errors import ModelError, one_line


@dataclass(frozen=True)
class Message:
    """One turn. Documents stand before the text, as in LongAlpaca's instructions."""

    role: Literal["user", "assistant"]
    text: str
    documents: tuple[str, ...] = ()

    def content(self) -> str:
        """What the chat template gets."""
        return "\n\n".join((*self.documents, self.text))


def chat_tokens(tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Message]) -> list[int]:
    """Tokens of the prompt, up to where the answer begins.

    A document that contains ``<|im_end|>`` or the like cannot end its message: such text is read as ordinary text.

    Raises:
        ModelError: the template cannot be rendered, or does not take this conversation.
    """
    messages = [{"role": message.role, "content": message.content()} for message in conversation]
    try:
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
    except (TemplateError, TypeError, ValueError) as error:
        reason = one_line(error)
        raise ModelError(f"the model's chat template does not take this conversation ({reason})") from error
    return [int(token) for token in tokens]
