"""Chat templates: which one a run uses, and where in the text it writes the assistant's words stand.

Templates are run by transformers in its sandbox. In: messages. Out: a text and the spans of it to be learned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlora.config import InstructConfig
from longlora.data.formats import local_path
from longlora.data.shards import bound_tokens
from longlora.errors import DataError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, str]
"""``{"role": ..., "content": ...}``, as `apply_chat_template` takes it."""

# The paper's supervised fine-tuning: "[INST]{instruction}[/INST]", no spaces, answer and EOS behind it; with a system
# message in Llama-2's form.
_LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' }}"
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}"
    "{{ ' <<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' }}{% endif %}{{ message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TRIAL: list[Turn] = [{"role": "user", "content": "ping?"}, {"role": "assistant", "content": "pong"}]


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it, and `spans` of characters (start, stop) that are to be learned: each
    answer of the assistant with its end token."""

    text: str
    spans: tuple[tuple[int, int], ...]


def joint_of(template: str) -> str:
    """What stands between ``instruction`` and ``input`` under a template of the recipe; the paper has its own."""
    return " \n" if template == "llama2" else "\n\n"


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Make `tokenizer` use ``chat`` (its own), ``llama2`` or the template in a file; returns the template.

    Raises:
        DataError: there is none, or it does not write a question and an answer so that they can be told apart.
    """
    if template == "llama2":
        if not tokenizer.eos_token:
            raise DataError(
                "data.instruct.template=llama2 ends answers with EOS, which the tokenizer lacks: give a file"
            )
        bos, _ = bound_tokens(tokenizer)
        tokenizer.chat_template = ("{{ bos_token }}" if bos else "") + _LLAMA2
    elif template != "chat":
        tokenizer.chat_template = _read(local_path(template))
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template: set "
            "data.instruct.template=llama2 or to a file with a Jinja template"
        )
    trial = render(tokenizer, _TRIAL, f"data.instruct.template={template}")
    if [trial.text[start:stop][:4] for start, stop in trial.spans] != ["pong"] or "ping?" not in trial.text:
        raise DataError(
            f"data.instruct.template={template} does not write a question and its answer one after the other: it gave "
            f"{trial.text[:200]!r} for 'ping?' and 'pong'"
        )
    return str(tokenizer.get_chat_template())


def ends_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template of `tokenizer` writes a control token behind an answer, which is how a model stops."""
    trial = render(tokenizer, _TRIAL, "the chat template")
    start, stop = trial.spans[-1]
    return trial.text[start:stop].endswith(tuple(special_tokens(tokenizer)))


def adopt_template(tokenizer: PreTrainedTokenizerBase, settings: InstructConfig) -> str:
    """Make `tokenizer` ask as training with `settings` does, system message included; returns the template.

    Raises:
        DataError: as `set_chat_template`.
    """
    tokenizer.chat_template = with_system(set_chat_template(tokenizer, settings.template), settings.system)
    return str(tokenizer.chat_template)


def with_system(template: str, system: str | None) -> str:
    """`template` as it is stored with the model: `system` comes first wherever a conversation has no system message.

    Training puts it there itself; whoever asks the model afterwards knows nothing of it.
    """
    if system is None:
        return template
    added = f"[{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}]"
    # The line end is taken out when the template is read, so that its first line stays one.
    return (
        f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = {added} + messages %}}{{% endif %}}\n{template}"
    )


def render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], place: str) -> Rendered:
    """Write `turns` with the tokenizer's template.

    The spans come from the template's ``{% generation %}`` marks where it has them. Otherwise an answer is what the
    text gains over the prompt that the model would be given, for which each such prompt must be the beginning of the
    whole text.

    Args:
        turns: a conversation that ends with the assistant.
        place: file and line, for errors.

    Raises:
        DataError: the template refuses the conversation, or the spans cannot be told.
    """
    if _GENERATION.search(str(tokenizer.get_chat_template())):
        text, spans = _marked(tokenizer, turns, place)
    else:
        text, spans = _gained(tokenizer, turns, place)
    return Rendered(text, tuple((start, _end(tokenizer, text, start, stop)) for start, stop in spans))


def _marked(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], place: str) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    # Not apply_chat_template, which gives a mask of tokens only: where a mark ends inside of a token or behind the last
    # one, that mask runs on to the end of the text.
    try:
        texts, marks = render_jinja_template(
            conversations=[list(turns)],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template is a program of its own
        raise _refused(place, error) from error
    text, eos = texts[0], tokenizer.eos_token or ""
    spans = [(a, b + len(eos) if eos and text.startswith(eos, b) else b) for a, b in marks[0] if a < b]
    if not spans:
        raise DataError(f"{place}: the chat template marks nothing as generated: remove its generation marks or set "
                        "data.instruct.template")  # fmt: skip
    return text, spans


def _gained(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], place: str) -> tuple[str, list[tuple[int, int]]]:
    text, spans = _write(tokenizer, turns, place), []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = _write(tokenizer, turns[:index], place, prompt=True)
        answered = _write(tokenizer, turns[: index + 1], place)
        if not (answered.startswith(prompt) and text.startswith(answered)):
            raise DataError(
                f"{place}, turn {index + 1}: the chat template writes the turns before this answer differently once it "
                "is there, so that its tokens cannot be told: give one answer to each conversation, or a template of "
                "your own in data.instruct.template"
            )
        spans.append((len(prompt), len(answered)))
    return text, spans


def _write(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], place: str, *, prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # a template is a program of its own
        raise _refused(place, error) from error


def _refused(place: str, error: Exception) -> DataError:
    return DataError(f"{place}: the chat template does not take this conversation ({one_line(error)})")


def _end(tokenizer: PreTrainedTokenizerBase, text: str, start: int, stop: int) -> int:
    """`stop` without the line breaks that a template writes behind its end token: nobody generates them."""
    answer = text[start:stop].rstrip()
    return start + len(answer) if answer.endswith(tuple(special_tokens(tokenizer))) else stop


def special_tokens(tokenizer: Any) -> list[str]:
    """Texts that become control tokens wherever they stand, longest first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=lambda token: (-len(token), token))


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.instruct.template={path} cannot be read ({error}): give chat, llama2 or a file with a template"
        ) from None
    if not text.strip():
        raise DataError(f"data.instruct.template={path} is empty: give chat, llama2 or a file with a template")
    return text
