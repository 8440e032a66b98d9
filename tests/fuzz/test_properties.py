"""Rules that hold for any pattern and any conversation, not only for those that somebody thought of.

Those of packing are in tests/data/test_packing.py, those of manifests in tests/test_artifacts.py, those of shards in
tests/data/test_shards.py, those of stretches of a sequence on several processes in tests/data/test_stretches.py and
tests/distributed/test_halo_plan.py.
"""

from __future__ import annotations

import pytest
from growth import LIMIT, growth
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import word_tokenizer

from longlora.attention.pattern import S2Pattern, head_slices, may_attend, runs, shifted_heads
from longlora.data.instruct_examples import Example, Message, split_document
from longlora.data.instruct_tokens import Encoder
from longlora.inference.files import text_of

TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30)
ANSWERS = TEXTS.filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(half=st.integers(1, 24), data=st.data(), shifted=st.booleans(), length=st.integers(1, 160))
def test_runs_of_any_pattern_cut_what_the_definition_says(
    half: int, data: st.DataObject, shifted: bool, length: int
) -> None:
    pattern = S2Pattern(2 * half, data.draw(st.integers(0, 2 * half - 1)))
    position = 0
    for run in runs(length, pattern, shifted=shifted):
        assert run.start == position
        position = run.stop
        for query in range(run.start, run.stop):
            start = run.start + (query - run.start) // run.size * run.size
            keys = [*range(run.sinks), *range(start, query + 1)]
            assert keys == [key for key in range(length) if may_attend(query, key, length, pattern, shifted=shifted)]
    assert position == length


@settings(max_examples=200, deadline=None)
@given(kv_heads=st.integers(1, 16), share=st.integers(1, 16), shift=st.sampled_from(["half", "all", "none"]))
def test_slices_of_heads_cover_each_once(kv_heads: int, share: int, shift: str) -> None:
    heads, head = kv_heads * share, 0
    for piece in head_slices(heads, kv_heads, shift):  # type: ignore[arg-type]
        assert piece.query_start == head
        assert piece.query_heads % piece.kv_heads == 0
        for offset in range(piece.query_heads):
            assert (head + offset) // share == piece.kv_start + offset // (piece.query_heads // piece.kv_heads)
            assert piece.shifted == (head + offset >= heads - shifted_heads(heads, shift))  # type: ignore[arg-type]
        head += piece.query_heads
    assert head == heads


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    messages = [Message("system", before=draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(TEXTS), draw(st.just("") | TEXTS.map(lambda text: 4 * text)), draw(TEXTS)))
        messages.append(Message("assistant", before=draw(ANSWERS)))
    return Example("a:1", "a:1", tuple(messages))


@settings(max_examples=200, deadline=None)
@given(conversations(), st.integers(20, 300), st.sampled_from(["middle", "head", "tail"]))
def test_labels_are_the_answers_and_only_documents_are_shortened(example: Example, context: int, side: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    encoder = Encoder(tokenizer, context, side)  # type: ignore[arg-type]
    if encoder.unusable(example):
        return
    encoded = encoder.encode(example)
    fixed = sum(len(m.before) + len(m.after) + len("r:\n") + (m.role == "assistant") for m in example.messages)
    documents = sum(len(message.document) for message in example.messages)
    if encoded is None:
        assert fixed > context or fixed + documents > context
        return
    assert len(encoded.tokens) == len(encoded.mask) <= context
    assert len(encoded.tokens) + encoded.removed == fixed + documents
    assert any(encoded.mask[1:]), "a row that teaches nothing is not kept"
    learned = [token for token, flag in zip(encoded.tokens, encoded.mask, strict=True) if flag]
    answers = "".join(f"{message.before}</s>" for message in example.messages if message.role == "assistant")
    assert tokenizer.decode(learned) == answers
    text = tokenizer.decode(encoded.tokens)
    for message in example.messages:
        assert message.before in text
        assert message.after in text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300) | st.lists(TEXTS | st.just("\n\n"), max_size=12).map("".join))
def test_splitting_a_prompt_loses_nothing(text: str) -> None:
    assert "".join(split_document(text)) == text


@settings(max_examples=150, deadline=None)
@given(half=st.integers(1, 12), data=st.data(), shifted=st.booleans(), length=st.integers(1, 80))
def test_a_query_sees_itself_its_group_and_the_sinks_and_nothing_later(
    half: int, data: st.DataObject, shifted: bool, length: int
) -> None:
    pattern = S2Pattern(2 * half, data.draw(st.integers(0, 2 * half - 1)))
    for query in range(length):
        keys = [key for key in range(length) if may_attend(query, key, length, pattern, shifted=shifted)]
        assert query in keys
        assert max(keys) == query
        assert set(range(min(pattern.sink_tokens, query + 1))) <= set(keys)
        near = [key for key in keys if key >= pattern.sink_tokens or length <= pattern.group_size]
        assert all(query - key < pattern.group_size for key in near)
        # Neighbours are cut apart on one grid at most, so that no place stops all that passes.
        if query and half > 1:
            assert any(may_attend(query, query - 1, length, pattern, shifted=other) for other in (True, False))


@pytest.mark.parametrize(
    ("piece", "last"),
    [
        ("<div>", ""), ("<p>x", ""), ("<a ", ""), ("<a ", ">"), ("<a b='", ">"), ("<!--", ""), ("<!--", ">"),
        ("<?", ""), ("<![CDATA[", ""), ("<![CDATA[", ">"), ("</a ", ""), ("&#", ""), ("<td>", ""), ("<pre> ", ""),
    ],
)  # fmt: skip
def test_html_takes_a_time_that_grows_with_its_length(piece: str, last: str) -> None:
    """With the tree as it was, 5,000 divs took 3 s; with the parser alone, 40 kB of `<a ` took 15 s."""

    def read(pieces: int) -> None:
        assert text_of(("<p>sea</p>" + pieces * piece + last).encode(), "a.html").text.startswith("sea")

    assert growth(read, 1000) < LIMIT
