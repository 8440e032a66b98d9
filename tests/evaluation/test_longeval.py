"""Lines and topics: as many as fit, asked for by name, scored by program, and the original's own test files."""

import json
import random
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny import word_tokenizer

from longlora.errors import DataError
from longlora.evaluation.retrieval.haystack import Haystack
from longlora.evaluation.retrieval.longeval import (
    TOPICS,
    conversation_prompt,
    conversation_prompts,
    line_prompt,
    line_prompts,
    load_topics,
    topic_prompt,
    topic_prompts,
)
from longlora.evaluation.retrieval.prompt import Prompt, score

tokenizer = word_tokenizer()
_WORDS = random.Random(0).choices(["ash", "birch", "cedar", "élan", "größe", "hazel", "森林", "larch"], k=3000)
TEXTS = {"trees": "".join(f"{' '.join(_WORDS[at : at + 7])}. ".capitalize() for at in range(0, 3000, 7))}


def encode_bytes(text: str) -> list[int]:
    return list(text.encode())


def encode_tiny(text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_words(text: str) -> list[int]:
    return [zlib.crc32(word.encode()) for word in re.findall(r"\s?\w+|\W", text)]


encoders = pytest.mark.parametrize("encode", [encode_bytes, encode_tiny, encode_words])


def text_of(prompt: Prompt) -> str:
    return bytes(prompt.tokens).decode()


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


@encoders
def test_as_many_lines_as_fit(encode: Callable[[str], list[int]]) -> None:
    for prompt in line_prompts(encode, [1], [1200, 2500], 3, seed=0):
        used = len(prompt.tokens) + prompt.max_new_tokens
        # The question names the line, so its size changes with the line as well.
        assert prompt.facts["length"] - 100 <= used <= prompt.facts["length"]
        assert prompt.tokens[0] == 1
        assert 0 < len(prompt.answer) <= prompt.max_new_tokens


def test_lines_are_worded_as_in_the_original() -> None:
    (prompt,) = line_prompts(encode_bytes, [], [1500], 1, seed=0)
    text = text_of(prompt)
    assert text.startswith("Below is a record of lines I want you to remember. Each line begins with 'line <")
    record, question = text.split("Now the record start:\n\n")[1].split("\n\nNow the record is over. ")
    lines = record.split("\n")
    assert all(re.fullmatch(r"line \S[^:]*-[^:]*\S: REGISTER_CONTENT is <\d+>", line) for line in lines)
    names = [line.split(":")[0] for line in lines]
    assert len(set(names)) == len(names) > 5
    assert re.fullmatch(
        r"Tell me what is the <REGISTER_CONTENT> in (line [^?]+)\? I need the number\. "
        r"Line <([^>]+)>: <REGISTER_CONTENT> is",
        question,
    )


def test_a_copier_of_lines_is_right_and_a_guesser_wrong() -> None:
    prompts = line_prompts(encode_bytes, [], [1200, 2500], 4, seed=0)
    for prompt in prompts:
        text = text_of(prompt)
        index = text[text.rindex("Line <") + 6 : text.rindex(">: <")]
        (number,) = re.findall(rf"line {re.escape(index)}: REGISTER_CONTENT is <(\d+)>", text)
        assert bytes(prompt.answer).decode() == f" <{number}>"
        assert score(prompt.metric, f" <{number}>\nline", prompt.references) == 1
        assert score(prompt.metric, f" <{number}>, no, <1{number}>", prompt.references) == 0
        assert prompt.facts["depth"] == [line.split(":")[0] for line in text.split("\n")[2:-2]].index(
            f"line {index}"
        ) / (len(text.split("\n")) - 4)
    assert len({prompt.references for prompt in prompts}) == len(prompts)


def test_a_shorter_record_is_the_beginning_of_a_longer_one() -> None:
    shorter, longer, other = (
        line_prompt(encode_bytes, [1], length, trial, 0) for length, trial in ((1200, 0), (2500, 0), (2500, 1))
    )
    assert common_prefix(shorter.tokens, longer.tokens) > 1200 - 250
    assert common_prefix(longer.tokens, other.tokens) < 500


@encoders
def test_conversations_nearly_fill_their_length(encode: Callable[[str], list[int]]) -> None:
    for prompt in topic_prompts(encode, [1], TEXTS, [1300, 2500], 2, seed=0):
        used = len(prompt.tokens) + prompt.max_new_tokens
        assert 0.97 * prompt.facts["length"] <= used <= prompt.facts["length"]
        assert prompt.tokens[0] == 1


def test_the_first_of_all_topics_is_asked_for() -> None:
    prompts = topic_prompts(encode_bytes, [], TEXTS, [1300, 3100], 4, seed=0)
    for prompt in prompts:
        text = text_of(prompt)
        said = re.findall(r"USER: I would like to discuss the topic of ([^.]+)\. \n ASSISTANT: ", text)
        assert len(said) == {1300: 2, 3100: 5}[prompt.facts["length"]]
        assert f"on {len(said)} different topics" in text
        assert len(set(said)) == len(said)
        assert all(text.count(topic) == 1 for topic in said)
        assert text.endswith("Do not summarize yourself.\n ASSISTANT: The first topic is")
        assert score(prompt.metric, f" {said[0].upper()}.", prompt.references) == 1
        assert score(prompt.metric, f" {said[1]}.", prompt.references) == 0
        assert bytes(prompt.answer).decode() == f" {said[0]}"
        between = [part.split("\n USER: ")[0] for part in text.split("\n ASSISTANT: ")[1:-1]]
        assert sum(map(len, between)) > 300
        assert all(part.strip() in f"{TEXTS['trees']}\n\n{TEXTS['trees']}" for part in between[:-1])
    assert len({prompt.references for prompt in prompts}) > 4


def test_no_topic_is_part_of_another() -> None:
    assert len(TOPICS) == len(set(TOPICS)) == 50
    assert not [(one, other) for one in TOPICS for other in TOPICS if one is not other and one in other]


def test_a_prompt_is_made_again_from_its_facts() -> None:
    for prompt in line_prompts(encode_bytes, [], [1200, 1500], 2, seed=5):
        fact = prompt.facts
        assert fact["task"] == "lines"
        assert prompt == line_prompt(encode_bytes, [], fact["length"], fact["trial"], fact["seed"])
        assert prompt != line_prompt(encode_bytes, [], fact["length"], fact["trial"], 6)
    for prompt in topic_prompts(encode_bytes, [], TEXTS, [1300, 2000], 2, seed=5):
        fact = prompt.facts
        assert (fact["task"], fact["document"]) == ("topics", "trees")
        assert prompt == topic_prompt(encode_bytes, [], Haystack(TEXTS), fact["length"], fact["trial"], fact["seed"])
        assert prompt != topic_prompt(encode_bytes, [], Haystack(TEXTS), fact["length"], fact["trial"], 6)


def test_lengths_without_room_and_short_texts_are_said() -> None:
    with pytest.raises(DataError, match=r"length 300 is too short: one line needs [5-9]\d\d tokens, raise eval.lines"):
        line_prompts(encode_bytes, [], [300], 1, seed=0)
    with pytest.raises(DataError, match=r"length 300 is too short: two topics need \d{3} tokens, raise eval.topics"):
        topic_prompts(encode_bytes, [], TEXTS, [300], 1, seed=0)
    texts = {"short": TEXTS["trees"][:700]}
    with pytest.raises(DataError, match=r"topics length 4000 is longer .* for [12]\d{3} tokens: add texts to"):
        topic_prompts(encode_bytes, [], texts, [4000], 1, seed=0)


CASE = {
    "test_id": 0,
    "prompt": "Below is a record. USER: I would like to discuss the topic of the benefits of tea. \n ASSISTANT: Sure! "
    "\n USER: I would like to discuss the topic of the MOON. \n ASSISTANT: No! Now the record ends. What is the "
    "first topic we discussed? Only give me the topic name. Do not summarize yourself.",
    "topics": ["The benefits of tea", "the MOON"],
    "prompt_length": -1,
}


def test_the_original_test_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "2_topics.jsonl"
    upper = CASE | {"prompt": CASE["prompt"].replace("of the benefits", "of The benefits")}
    path.write_text(f"{json.dumps(CASE)}\n\n{json.dumps(upper)}\n", encoding="utf-8")
    conversations = load_topics(path)
    assert [conversation.name for conversation in conversations] == [f"{path}:1", f"{path}:3"]
    first, second = conversation_prompts(encode_bytes, [1], conversations, seed=0)
    assert text_of(first) == f"\x01{CASE['prompt']}\n ASSISTANT: The first topic is"
    assert bytes(first.answer).decode() == " the benefits of tea"
    assert bytes(second.answer).decode() == " The benefits of tea"
    assert first.facts["length"] == len(first.tokens) + first.max_new_tokens
    assert (first.facts["task"], first.facts["name"], first.facts["document"]) == ("topics", "file", f"{path}:1")
    assert score(first.metric, " the Benefits of Tea.", first.references) == 1
    assert score(first.metric, " the MOON.", first.references) == 0
    assert second == conversation_prompt(encode_bytes, [1], conversations[1], 1, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2 is not valid JSON"),
        ("[1]", ":2 needs a text `prompt`"),
        (json.dumps({"prompt": "x", "topics": []}), ":2 needs a text `prompt`"),
        (json.dumps({"prompt": 3, "topics": ["x"]}), ":2 needs a text `prompt`"),
        (json.dumps({"prompt": "x", "topics": ["x", 3]}), ":2 needs a text `prompt`"),
    ],
)
def test_other_files_are_refused_with_their_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "topics.jsonl"
    path.write_text(f"{json.dumps(CASE)}\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(f"{path}{message}")):
        load_topics(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no conversations"):
        load_topics(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_topics(tmp_path / "absent.jsonl")
