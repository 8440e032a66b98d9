"""Instructions as token shards: what is learned, what is shortened, what is left out, and that it is all said."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import word_tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from longlora.artifacts import LOSS_MASK
from longlora.config import InstructConfig
from longlora.data.instruct import InstructReport, write_instruct_shard
from longlora.data.instruct_template import set_chat_template
from longlora.data.packing import IGNORE_INDEX, PackedDataset, collate
from longlora.data.shards import TokenShard, open_shard
from longlora.errors import DataError

# Without a special token between prompt and answer, as nothing but spans of characters can tell them apart.
PLAIN = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token + '\n' }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'a:' }}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{{ eos_token + '\n' }}{% else %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
)
LAST_ONLY = (
    "{% for m in messages %}{{ m['content'] }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = [("user", "one?"), ("assistant", "first"), ("user", "two?"), ("assistant", "second")]


def chat(*turns: tuple[str, str]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[TokenShard, InstructReport, PreTrainedTokenizerFast]]:
    def write(
        *records: object, context: int = 200, template: str = PLAIN, weights: tuple[float, ...] = (), **settings: object
    ) -> tuple[TokenShard, InstructReport, PreTrainedTokenizerFast]:
        if template not in ("llama2", "chat"):
            (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
            template = str(tmp_path / "t.jinja")
        source = tmp_path / "a.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        tokenizer, report = word_tokenizer(), InstructReport()
        shutil.rmtree(tmp_path / "shard", ignore_errors=True)
        shard = write_instruct_shard(
            tmp_path / "shard", [str(source)] * max(1, len(weights)), tokenizer,
            settings=InstructConfig.model_validate({"template": template, **settings}), context_length=context,
            tokenizer_hash="abc", weights=weights, report=report,
        )  # fmt: skip
        return shard, report, tokenizer

    return write


def learned(shard: TokenShard, tokenizer: PreTrainedTokenizerFast, index: int = 0) -> list[str]:
    """Text of each run of tokens that is learned."""
    tokens, mask = shard.document(index), shard.loss_mask(index)
    assert mask is not None
    cuts = np.flatnonzero(np.diff(mask)) + 1
    parts = zip(np.split(tokens, cuts), np.split(mask, cuts), strict=True)
    return [tokenizer.decode(part) for part, flags in parts if flags[0]]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_answers_and_their_end_tokens_are_learned_and_nothing_else(make: Callable[..., tuple], template: str) -> None:
    shard, _, tokenizer = make(chat(*TURNS), template=template)
    assert learned(shard, tokenizer) == ["first</s>", "second</s>"]
    assert tokenizer.decode(shard.document(0)) == "u:one?\na:first</s>\nu:two?\na:second</s>\n"
    assert shard.chat_template == template
    again = open_shard(shard.folder, "abc")
    assert np.array_equal(again.mask, shard.mask)
    (shard.folder / LOSS_MASK).write_bytes(b"\1")
    with pytest.raises(DataError, match="prepare"):
        open_shard(shard.folder, "abc")


def test_the_papers_template(make: Callable[..., tuple]) -> None:
    alpaca = {"instruction": "do", "input": "it", "output": "done"}
    shard, _, tokenizer = make({"instruction": "do", "output": "done"}, alpaca, template="llama2")
    texts = [tokenizer.decode(shard.document(index)) for index in range(2)]
    assert texts == ["[INST]do[/INST]done</s>", "[INST]do \nit[/INST]done</s>"]
    assert learned(shard, tokenizer) == ["done</s>"]
    shard, _, tokenizer = make(alpaca, template="llama2", system="be good")
    assert tokenizer.decode(shard.document(0)).startswith("[INST] <<SYS>>\nbe good\n<</SYS>>\n\ndo \nit[/INST]")


def test_the_stored_template_puts_the_system_message_of_training_first(make: Callable[..., tuple]) -> None:
    said = 'be "good"\n{% if x %} \\ é'
    shard, _, tokenizer = make(chat(("user", "one?"), ("assistant", "first")), template=PLAIN, system=said)
    trained = tokenizer.decode(shard.document(0))
    question = [{"role": "user", "content": "one?"}]
    tokenizer.chat_template = shard.chat_template
    asked = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert asked == f"s:{said}\nu:one?\na:"
    assert len(tokenizer(asked, add_special_tokens=False).input_ids) == shard.loss_mask(0).tolist().index(1)
    assert "first" in trained
    own = [{"role": "system", "content": "own"}, *question]
    assert tokenizer.apply_chat_template(own, tokenize=False) == "s:own\nu:one?\n"


def test_a_token_that_would_straddle_prompt_and_answer_is_not_made(
    tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    """ "the" is one token of this tokenizer: with the prompt "t" its answer "he" must not begin inside of it."""
    tokenizer = make_tokenizer("$A")
    (tmp_path / "t").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "t", "completion": "he book"}))
    assert len(tokenizer("the").input_ids) == 1
    shard = write_instruct_shard(
        tmp_path / "s", [str(tmp_path / "a.jsonl")], tokenizer, settings=InstructConfig(template=str(tmp_path / "t")),
        context_length=50, tokenizer_hash="abc", report=InstructReport(),
    )  # fmt: skip
    prompt = tokenizer("t", add_special_tokens=False).input_ids
    assert shard.document(0).tolist()[: len(prompt)] == prompt
    assert learned(shard, tokenizer) == ["he book"]


@pytest.mark.parametrize(
    ("side", "kept"), [("middle", "abcdeopqrst"), ("head", "jklmnopqrst"), ("tail", "abcdefghijk")]
)
def test_only_the_document_is_shortened(make: Callable[..., tuple], side: str, kept: str) -> None:
    record = {"document": "abcdefghijklmnopqrst", "question": "what?", "answer": "this"}
    shard, report, tokenizer = make(record, context=11 + len("u:\n\nwhat?\na:this\n") + 1, shorten=side)
    text = tokenizer.decode(shard.document(0))
    assert text.endswith("\n\nwhat?\na:this</s>\n")
    document = text.removeprefix("u:").split("\n")[0]
    assert len(document) == 11
    assert sorted(document) == sorted(kept) or side == "middle"
    assert document in ({kept} if side != "middle" else {"abcdefpqrst", "abcdeopqrst"})
    assert (report.shortened, report.removed_tokens) == (["a.jsonl:1"], 9)
    assert "shortened the documents of 1 by 9 tokens (a.jsonl:1)" in report.summary(99)
    assert max(shard.lengths) == 11 + len("u:\n\nwhat?\na:this\n") + 1


def test_what_is_left_out_is_counted_and_named(make: Callable[..., tuple]) -> None:
    good = chat(("user", "one?"), ("assistant", "first"))
    shard, report, _ = make(
        good,
        chat(("user", "one?"), ("assistant", " ")),
        chat(("user", "doc\n\none?"), ("assistant", "long" * 20)),
        chat(("user", "a</s>b"), ("assistant", "x")),
        chat(("user", "\ud800"), ("assistant", "x")),
        context=60,
    )
    assert shard.names == ("a.jsonl:1",)
    assert report.summary(60) == (
        "read 5 examples; left out: 1 longer than 60 tokens without their documents (a.jsonl:3), 1 with an empty "
        "answer (a.jsonl:2), 1 with invalid Unicode (a.jsonl:5), 1 with control tokens in their text (a.jsonl:4)"
    )
    manifest = json.loads((shard.folder / "manifest.json").read_text())
    assert manifest["too_long"] == {"count": 1, "names": ["a.jsonl:3"]}
    with pytest.raises(DataError, match="no example is left for .* longer than 10 tokens"):
        make(good, context=10)


def test_weights_repeat_and_draw_by_seed(make: Callable[..., tuple]) -> None:
    records = [chat(("user", f"{number}?"), ("assistant", "yes")) for number in range(40)]
    first, _, _ = make(*records, weights=(2, 0.5))
    names = first.names
    assert names[:4] == ("a.jsonl:1", "a.jsonl:1#2", "a.jsonl:2", "a.jsonl:2#2")
    assert 8 < len(names) - 80 < 32
    assert make(*records, weights=(2, 0.5))[0].names == names


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("chat", "has no chat template: set data.instruct.template=llama2"),
        ("{% if %}", "the chat template does not take this conversation"),
        ("{{ messages[0]['content'] }}", "does not write a question and its answer"),
        ("{{ ''.__class__.__mro__ }}", "does not take this conversation"),
        (" ", "is empty"),
    ],
)
def test_templates_that_cannot_be_used(make: Callable[..., tuple], template: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        make(chat(*TURNS), template=template)
    assert "\n" not in str(caught.value)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_line(make: Callable[..., tuple]) -> None:
    make(chat(*TURNS[:2]), template=LAST_ONLY)
    with pytest.raises(DataError, match=r"a\.jsonl:1, turn 2: the chat template writes the turns before this answer"):
        make(chat(*TURNS), template=LAST_ONLY)


def test_a_missing_template_file() -> None:
    with pytest.raises(DataError, match="cannot be read"):
        set_chat_template(word_tokenizer(), "none.jinja")


def test_rows_learn_answers_only_and_examples_weigh_the_same(make: Callable[..., tuple]) -> None:
    short, long = chat(("user", "a?"), ("assistant", "b")), chat(("user", "c?"), ("assistant", "defg"))
    shard, _, tokenizer = make(short, long, context=40)
    (row,) = PackedDataset(shard, 40, weigh_documents=True)
    assert tokenizer.decode(row["labels"][row["labels"] != IGNORE_INDEX]) == "b</s>defg</s>"
    weights = row["loss_weights"]
    assert torch.equal(weights > 0, row["labels"] != IGNORE_INDEX)
    torch.testing.assert_close(weights[weights > 0], torch.tensor([1 / 2] * 2 + [1 / 5] * 5))
    batch = collate([row, {key: value[:3] for key, value in row.items()}], 0)
    assert batch["loss_weights"].shape == batch["labels"].shape
    assert not batch["loss_weights"][1, 3:].any()
    assert "loss_weights" not in PackedDataset(shard, 40)[0]
    with pytest.raises(DataError, match="holds an example of 13 tokens, context.context_length is 12"):
        PackedDataset(shard, 12)


def test_a_template_that_never_ends_an_answer_is_said(make: Callable[..., Any]) -> None:
    record = chat(("user", "one?"), ("assistant", "first"))
    assert "WARNING" not in make(record)[1].summary(200)
    _, report, _ = make(record, template="{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    assert "the model will not learn to end one" in report.summary(200)


def test_a_tokenizer_without_offsets_is_refused_at_the_first_example(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(PLAIN)
    (tmp_path / "a.jsonl").write_text(json.dumps(chat(("user", "one?"), ("assistant", "first"))))
    with pytest.raises(DataError, match=r"ByT5Tokenizer of the model gives no character offsets, .*: take a model"):
        write_instruct_shard(
            tmp_path / "s", [str(tmp_path / "a.jsonl")], ByT5Tokenizer(),
            settings=InstructConfig(template=str(tmp_path / "t")), context_length=500, tokenizer_hash="abc",
            report=InstructReport(),
        )  # fmt: skip
    assert not (tmp_path / "s").exists()
