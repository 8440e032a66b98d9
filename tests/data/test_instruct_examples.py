"""Records of every format become conversations, and what cannot is said with file and line."""

import json
import os
from pathlib import Path

import pytest

from longlora.data.instruct_examples import Example, read_examples, split_document
from longlora.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]}
ALPACA = {"instruction": "ask", "input": "", "output": "answer"}
ASKED = [("user", "ask"), ("assistant", "answer")]


def written(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def read(source: str, system: str | None = None) -> list[Example]:
    return list(read_examples(source, system, "\n\n"))


def said(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.messages]


@pytest.mark.parametrize(
    "record",
    [
        CHAT,
        ALPACA,
        {"instruction": "ask", "output": "answer", "file": "x"},
        {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "answer"}]},
        {"messages": [*CHAT["messages"], {"role": "user", "content": "thanks"}], "length": 9},
        {"prompt": "ask", "completion": "answer"},
        {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
        {"question": "ask", "answer": "answer"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "ask"}]}, CHAT["messages"][1]]},
    ],
)
def test_every_format_gives_the_same_conversation(tmp_path: Path, record: dict[str, object]) -> None:
    (example,) = read(written(tmp_path / "a.jsonl", record))
    assert said(example) == ASKED
    assert example.name == "a.jsonl:1"


def test_all_kinds_of_files(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps([ALPACA, ALPACA], indent=1), encoding="utf-8")
    written(folder / "b.jsonl", CHAT)
    parquet.write_table(pa.Table.from_pylist([CHAT, CHAT]), folder / "c.parquet")
    found = read(str(folder))
    assert [example.name for example in found] == ["a.json:2", "a.json:7", "b.jsonl:1", "c.parquet:0", "c.parquet:1"]
    assert all(said(example) == ASKED for example in found)
    datasets.Dataset.from_list([CHAT]).save_to_disk(str(tmp_path / "saved"))
    assert [said(example) for example in read(str(tmp_path / "saved"))] == [ASKED]


def test_a_system_message_is_put_where_there_is_none(tmp_path: Path) -> None:
    own = {"messages": [{"role": "system", "content": "own"}, *CHAT["messages"]]}
    first, second = read(written(tmp_path / "a.jsonl", CHAT, own), system="given")
    assert said(first)[0] == ("system", "given")
    assert said(second)[0] == ("system", "own")


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([CHAT, ALPACA], "a.jsonl:2 is of format 'instruction' and"),
        ([{"messages": CHAT["messages"][:1]}], "a.jsonl:1 has no turn of the assistant"),
        ([{"messages": [{"role": "tool", "content": "x"}]}], "a.jsonl:1, turn 1 has role 'tool': known are system"),
        ([{"messages": [{"role": "user", "content": 3}]}], "a.jsonl:1, turn 1 has content that is int"),
        ([{"messages": "hi"}], "a.jsonl:1: messages is str"),
        ([{"text": "hi"}], "a.jsonl:1 is of no known format, its fields are text"),
        ([{"instruction": ["a"], "output": "b"}], "a.jsonl:1: the question is list, not text"),
        ([[1]], "a.jsonl:1 holds a JSON list"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, records: list[object], expected: str) -> None:
    source = written(tmp_path / "a.jsonl", *records)
    with pytest.raises(DataError) as caught:
        read(source)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[\n{"prompt": "a", "completion": "b"},\n{"prompt": }]', "a.json:3 is not valid JSON"),
        ('[\n{"prompt": "a", "completion": "b"}\n\n{"prompt": 1}]', "a.json:4: an item of the list is not followed by"),
        ("[", "a.json:1 is not valid JSON"),
        ("{", "a.json:1 is not valid JSON"),
    ],
)
def test_damaged_json_is_named_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=expected):
        read(str(tmp_path / "a.json"))


def test_a_missing_source_is_found_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_examples(str(tmp_path / "none.jsonl"), None, "")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"unknown type '\.txt' for instructions"):
        read_examples(str(tmp_path / "a.txt"), None, "")


@pytest.mark.parametrize(
    ("text", "document"),
    [
        ("Below is a paper. The paper begins. P1\n\nP2 Now the paper ends. What is it?", " P1\n\nP2 "),
        ("Document first.\nMore.\n\nWhat is it?", "Document first.\nMore."),
        ("Answer from the text.\n\nThe text.\n\nMore text.\n\nWhat is it?\n", "The text.\n\nMore text."),
        ("Only a question?", ""),
        ("Only a question?\n\n", ""),
    ],
)
def test_the_document_in_a_prompt_never_holds_the_question(text: str, document: str) -> None:
    before, found, after = split_document(text)
    assert (before + found + after, found) == (text, document)


def test_a_field_of_its_own_is_the_document(tmp_path: Path) -> None:
    source = written(tmp_path / "a.jsonl", {"instruction": "ask", "input": "a\n\nb", "output": "c"})
    message = read(source)[0].messages[0]
    assert (message.before, message.document, message.after) == ("ask\n\n", "a\n\nb", "")
    source = written(tmp_path / "c.jsonl", {"instruction": "ask", "context": "a\n\nb", "response": "c"})
    assert read(source)[0].messages[0] == message
    source = written(tmp_path / "b.jsonl", {"context": "a\n\nb", "question": "ask", "answer": "c"})
    message = read(source)[0].messages[0]
    assert (message.before, message.document, message.after) == ("", "a\n\nb", "\n\nask")


def test_rows_of_longqa_say_where_their_document_ends(tmp_path: Path) -> None:
    content = "a\n\nb\n\nWhich?\n\n1. b"
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "1"}]
    source = written(tmp_path / "a.jsonl", {"messages": turns, "document_end": 4})
    message = read(source)[0].messages[0]
    assert (message.before, message.document, message.after) == ("", "a\n\nb", "\n\nWhich?\n\n1. b")
    source = written(tmp_path / "b.jsonl", {"messages": turns, "document_end": 4000})
    assert read(source)[0].messages[0].after == "\n\n1. b"


def test_names_that_are_not_utf8_can_be_written(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    written(tmp_path / os.fsdecode(b"\xe8.jsonl"), CHAT)
    written(tmp_path / os.fsdecode(b"\xe9.jsonl"), CHAT)
    parquet.write_table(pa.Table.from_pylist([CHAT]), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").rename(tmp_path / os.fsdecode(b"\xe9.parquet"))
    names = [example.name for example in read(str(tmp_path))]
    assert names == ["\ufffd.jsonl:1", "\ufffd.jsonl:1", "\ufffd.parquet:0"]
