"""How an exported model is served: ready command lines with the right lengths, and Ollama's Modelfile.

In: where the files lie, the context in tokens, the tokenizer's chat template. Out: text.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, str]


@dataclass(frozen=True)
class ChatFormat:
    """How one family of chat templates writes a conversation.

    `system` and `user` hold ``{}`` for the text; `answer` is what stands before the model's answer, `end` after it.
    """

    name: str
    system: str
    user: str
    answer: str
    end: str
    stop: tuple[str, ...]

    def written(self, messages: Sequence[Message], start: str = "") -> str:
        """The prompt of `messages`, ready for an answer; `start` is the token that opens a text."""
        parts = [start]
        for message in messages:
            if message["role"] == "assistant":
                parts.append(f"{self.answer}{message['content']}{self.end}")
            else:
                form = self.system if message["role"] == "system" else self.user
                parts.append(form.replace("{}", message["content"]))
        return "".join([*parts, self.answer])

    @property
    def ollama(self) -> str:
        """The same for Ollama, whose templates are in Go's language."""
        system, user = (form.replace("{}", name) for form, name in ((self.system, _SYSTEM), (self.user, _PROMPT)))
        return f"{{{{ if .System }}}}{system}{{{{ end }}}}{user}{self.answer}{{{{ .Response }}}}{self.end}"


_SYSTEM, _PROMPT = "{{ .System }}", "{{ .Prompt }}"
_FORMATS = (
    ChatFormat(
        "ChatML",
        "<|im_start|>system\n{}<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<|im_end|>\n",
        ("<|im_start|>", "<|im_end|>"),
    ),
    ChatFormat(
        "Llama 3",
        "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # The prompt of the LongLoRA paper's long instruction tuning, and Mistral's with blanks.
    ChatFormat("[INST]", "", "[INST]{}[/INST]", "", "", ("[INST]", "[/INST]")),
    ChatFormat("[INST] with blanks", "", "[INST] {} [/INST]", "", "", ("[INST]", "[/INST]")),
)
_QUESTION: Message = {"role": "user", "content": "longlora-question"}
_ANSWER: Message = {"role": "assistant", "content": "longlora-answer"}
_RULES: Message = {"role": "system", "content": "longlora-rules"}


def prompt_of(tokenizer: Any) -> str | None:
    """A question as the chat template writes it, ready for an answer; None where there is no template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    return _rendered(tokenizer, [{"role": "user", "content": "Your question"}])


def answer_end(tokenizer: Any) -> int | None:
    """The special token that the chat template writes behind an answer; None where it writes none."""
    whole = _rendered(tokenizer, [_QUESTION, _ANSWER], prompt=False)
    _, found, rest = (whole or "").rpartition(_ANSWER["content"])
    tokens = tokenizer(rest, add_special_tokens=False).input_ids if found and rest else []
    if not tokens:
        return None
    added = tokenizer.added_tokens_decoder.get(tokens[0])
    return int(tokens[0]) if added is not None and added.special else None


def known_format(tokenizer: Any) -> tuple[ChatFormat, str | None] | None:
    """The known format that `tokenizer`'s chat template writes, and the system text it adds on its own.

    Found by rendering conversations, not by looking at the template; None where no known format writes the same.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    ruled = _rendered(tokenizer, [_RULES, _QUESTION])
    start = tokenizer.bos_token or ""
    for form in (*_FORMATS, *(replace(form, end=tokenizer.eos_token or "") for form in _FORMATS if not form.end)):
        for opening in ("", start):
            if form.system and ruled != form.written([_RULES, _QUESTION], opening):
                continue
            added = _added_system(form, _rendered(tokenizer, [_QUESTION]), opening)
            system = [] if added is None else [{"role": "system", "content": added}]
            talks = ([_QUESTION], [_QUESTION, _ANSWER, _QUESTION])
            if all(_rendered(tokenizer, talk) == form.written([*system, *talk], opening) for talk in talks):
                return form, added
    return None


def _rendered(tokenizer: Any, messages: list[Message], *, prompt: bool = True) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception:  # a template may refuse a system message, or anything else
        return None


def _added_system(form: ChatFormat, alone: str | None, start: str) -> str | None:
    if alone is None or not form.system:
        return None
    before, after = form.system.split("{}")
    end = after + form.written([_QUESTION])
    if alone.startswith(start + before) and alone.endswith(end):
        return alone[len(start + before) : len(alone) - len(end)]
    return None


def modelfile(gguf_name: str, context_length: int, tokenizer: Any) -> str:
    """Ollama's Modelfile beside a GGUF file.

    Without ``num_ctx`` Ollama runs a short window, silently. Where the chat template is of no known format, TEMPLATE
    is left out: Ollama then takes the one in the GGUF file if it knows it, and else sends the bare prompt.
    """
    lines = [f"FROM ./{gguf_name}", f"PARAMETER num_ctx {context_length}"]
    found = known_format(tokenizer)
    if found is None:
        lines.append(
            "# The chat template is of no format that longlora can write for Ollama: see that `ollama show --template` "
            "gives it, or write it here."
        )
        return "\n".join(lines) + "\n"
    form, system = found
    lines += [f'PARAMETER stop "{word}"' for word in form.stop]
    lines.append(f'TEMPLATE """{form.ollama}"""')
    if system is not None and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def command_lines(folder: str, context_length: int, name: str, gguf: str | None = None) -> dict[str, str]:
    """Engine -> command line; `folder` is where the files lie, `gguf` the name of a GGUF file in it.

    RoPE is in the files, so no command overrides it: only the length of the window has to be said. vLLM would multiply
    it by the factor of linear or yarn, llama-server may cut it into slots.
    """
    place = "." if folder == "." else folder.rstrip("/")
    lines = {"vLLM": f"vllm serve {shlex.quote(place)} --max-model-len {context_length}"}
    if gguf is None:
        return lines
    inside = gguf if place == "." else f"{place}/{gguf}"
    lines["llama.cpp"] = f"llama-server -m {shlex.quote(inside)} -c {context_length} -np 1"
    modelfile_path = "Modelfile" if place == "." else f"{place}/Modelfile"
    model = ollama_name(name)
    lines["Ollama"] = f"ollama create {model} -f {shlex.quote(modelfile_path)} && ollama run {model}"
    return lines


def ollama_name(name: str) -> str:
    """`name` in the letters that Ollama takes."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "longlora"
