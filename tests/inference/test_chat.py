"""A conversation at the terminal: its commands, its memory, and Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from inference_cases import askable_model, askable_tokenizer
from rich.console import Console
from transformers import LlamaForCausalLM

from longlora.errors import DataError
from longlora.inference.chat import Chat
from longlora.inference.session import LongSession, Sampling
from longlora.inference.terminal import printable


class Person:
    """Types lines; an exception among them is what the terminal raises."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.left: Iterator[str | type[BaseException]] = iter(lines)

    def __call__(self, prompt: str) -> str:
        line = next(self.left, EOFError)
        if isinstance(line, str):
            return line
        raise line


@pytest.fixture
def model() -> LlamaForCausalLM:
    return askable_model()


Talk = Callable[..., tuple[str, list[int]]]


@pytest.fixture
def talk(model: LlamaForCausalLM) -> Talk:
    def run(*lines: str | type[BaseException], files: tuple[Path, ...] = ()) -> tuple[str, list[int]]:
        """What was printed, and the tokens of each pass over a prompt."""
        passes: list[int] = []
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        session, out = LongSession(model, askable_tokenizer()), StringIO()
        passes.clear()
        chat = Chat(session, Console(file=out, width=200), Person(*lines), max_new_tokens=4, sampling=Sampling())
        chat.run(files)
        return out.getvalue(), [tokens for tokens in passes if tokens > 1]

    return run


def test_turns_and_documents_are_kept_until_cleared(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It was April. " * 20)
    printed, passes = talk(
        "What month?", "Sure?", "/clear", "What month?", "/exit", "never", files=(tmp_path / "a.txt",)
    )
    assert "a.txt: 280 tokens of the model's window of 1,024" in printed
    assert printed.count("first token after") == 3
    assert len(passes) == 3
    assert passes[0] > 280 > 100 > passes[1]  # the document is in the cache
    assert passes[2] < 60  # and forgotten
    assert "forgotten: documents and turns" in printed


def test_what_does_not_fit_or_cannot_be_read_is_said_and_the_talk_goes_on(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("x" * 2000)
    files = [f"/file {tmp_path / name}" for name in ("none.txt", "long.txt")]
    printed, passes = talk(*files, "Why?", "/clear", "Why?", "/what", "", EOFError)
    assert "none.txt does not exist" in printed
    assert "document 2,000 + question 4" in printed
    assert printed.count("/clear forgets everything") == 2  # at the beginning and for what is no command
    assert len(passes) == 1
    with pytest.raises(DataError, match="does not exist"):
        talk(files=(tmp_path / "none.txt",))


def test_ctrl_c_stops_an_answer_and_twice_ends(talk: Talk, model: LlamaForCausalLM) -> None:
    passes = 0

    def interrupt(module: object, args: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise KeyboardInterrupt

    session = LongSession(model, askable_tokenizer())
    hook = model.lm_head.register_forward_pre_hook(interrupt)
    out, lines = StringIO(), Person("Why?", KeyboardInterrupt, "never asked")
    Chat(session, Console(file=out, width=200), lines, max_new_tokens=9, sampling=Sampling()).run()
    hook.remove()
    assert "; stopped" in out.getvalue()
    assert list(lines.left) == ["never asked"]
    printed, _ = talk(KeyboardInterrupt, "/clear", KeyboardInterrupt, KeyboardInterrupt, "Why?")
    assert printed.count("Ctrl-C again or /exit ends") == 2
    assert "first token" not in printed


def test_an_answer_cannot_rule_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07\x9b2J\tb\nc\u202ed é日") == "a]0;title2J\tb\ncd é日"
