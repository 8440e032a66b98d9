"""LongEval (Li et al. 2023): find one of many lines, or the first topic of a long conversation.

In: an encoder, lengths; for topics texts, or a test file of the original. Out: prompts. Headers, lines and questions
are those of the original's test files (github.com/DachengLi1/LongChat, longeval), with the beginnings of an answer that
it gives to models without a chat format. Its conversations are not ours to ship: `topic_prompts` has topics of our own
with real text in between, and `load_topics` reads the original's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from longlora.errors import DataError
from longlora.evaluation.retrieval.filling import Passage, most_that_fits, passage
from longlora.evaluation.retrieval.haystack import Haystack
from longlora.evaluation.retrieval.prompt import Encode, Prompt, split_answer
from longlora.evaluation.retrieval.ruler_draft import new_name

_LINES_HEAD = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of "
    "a certain line index. Now the record start:\n\n"
)
_LINE = "line {index}: REGISTER_CONTENT is <{number}>\n"
_LINES_QUESTION = (
    "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {index}? I need the number. "
    "Line <{index}>: <REGISTER_CONTENT> is"
)
_LINE_NEW_TOKENS = 15  # the original's for models without a chat format

_TOPICS_HEAD = (
    "Below is a record of our previous conversation on {count} different topics. You are the ASSISTANT, and I am the "
    "USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize "
    "each <TOPIC>. At the end of the record, I will ask you to retrieve the first topic name. Now the record start. "
)
_TOPIC = "USER: I would like to discuss the topic of {topic}. \n ASSISTANT: {text} \n USER: {end}"
_TOPIC_END = "Great, this is the end of our discussion on this topic, let's talk about the next topic."
_TOPICS_QUESTION = (
    " Now the record ends. What is the first topic we discussed? Only give me the topic name. "
    "Do not summarize yourself."
)
_TOPICS_ANSWER = "\n ASSISTANT: The first topic is"
_TOKENS_PER_TOPIC = 600  # about as many as in the original's conversations
_SLACK = 0.02  # part of the length that may stay free

TOPICS = (
    *("the repair of old clocks", "the taste of mountain honey", "the migration of grey whales"),
    *("the design of paper kites", "the rules of underwater hockey", "the smell of rain in cities"),
    *("the care of bonsai trees", "the training of rescue dogs", "the colours of autumn leaves"),
    *("the building of stone bridges", "the folding of road maps", "the sound of church organs"),
    *("the making of goat cheese", "the habits of night owls", "the history of board games"),
    *("the painting of tin soldiers", "the life of lighthouse keepers", "the growth of coral reefs"),
    *("the weaving of willow baskets", "the study of fossil footprints", "the art of shadow puppets"),
    *("the planning of roof gardens", "the language of ship flags", "the tuning of grand pianos"),
    *("the harvest of sea salt", "the sport of wheelchair rugby", "the printing of banknotes"),
    *("the heating of greenhouses", "the names of winter storms", "the collecting of postage stamps"),
    *("the baking of rye bread", "the flight of paper lanterns", "the safety of cable cars"),
    *("the breeding of silk moths", "the geometry of snow crystals", "the price of used bicycles"),
    *("the drawing of comic strips", "the cleaning of ancient coins", "the dance of honey bees"),
    *("the restoration of steam trains", "the training of opera singers", "the digging of village wells"),
    *("the behaviour of desert ants", "the lighting of theatre stages", "the brewing of ginger beer"),
    *("the shape of river deltas", "the forging of kitchen knives", "the work of bicycle couriers"),
    *("the craft of glass blowing", "the legends of frozen lakes"),
)


def line_prompts(
    encode: Encode, before: Sequence[int], lengths: Sequence[int], num_trials: int, seed: int
) -> list[Prompt]:
    """One prompt for each length and trial, with as many lines as fit, one of which is asked for.

    The lines of a trial are the same at every length, so a shorter prompt is the beginning of a longer one up to its
    question; the line asked for is drawn for each length.

    Args:
        before: tokens in front of every prompt, such as a BOS that the tokenizer adds.
        lengths: prompt and the tokens that are generated, at most.

    Raises:
        DataError: a length has no room for a line.
    """
    return [line_prompt(encode, before, length, trial, seed) for length in lengths for trial in range(num_trials)]


def line_prompt(encode: Encode, before: Sequence[int], length: int, trial: int, seed: int) -> Prompt:
    """The prompt of one length and trial of `line_prompts`; its depth is the part of the lines before the one asked."""
    drawing = random.Random(f"{seed}-lines-{trial}")
    taken: set[str] = set()
    # No tokenizer is known to write a line with four tokens.
    record = [(new_name(drawing, taken), drawing.randint(1, 50000)) for _ in range(max(1, length // 4))]
    lines = [_LINE.format(index=index, number=number) for index, number in record]
    choosing = random.Random(f"{seed}-lines-{length}-{trial}").random()

    def build(size: int) -> tuple[str, int]:
        chosen = int(choosing * size)
        return _LINES_HEAD + "".join(lines[:size]) + _LINES_QUESTION.format(index=record[chosen][0]), chosen

    room = length - len(before) - _LINE_NEW_TOKENS
    guess = max(1, room * 16 // max(1, len(encode("".join(islice(lines, 16))))))
    size = most_that_fits(lambda size: len(encode(build(size)[0])), room, enough=room, guess=guess, most=len(lines))
    if size < 1:
        alone = length - room + len(encode(build(1)[0]))
        raise DataError(f"lines length {length} is too short: one line needs {alone} tokens, raise eval.lines.lengths")
    text, chosen = build(size)
    tokens, answer = split_answer(encode, text, f" <{record[chosen][1]}>")
    facts = _facts("lines", "lines", length, chosen / size, trial, None, seed)
    references = (str(record[chosen][1]),)
    return Prompt((*before, *tokens), references, "last_integer", tuple(answer), _LINE_NEW_TOKENS, facts)


def topic_prompts(
    encode: Encode,
    before: Sequence[int],
    texts: Mapping[str, str],
    lengths: Sequence[int],
    num_trials: int,
    seed: int,
) -> list[Prompt]:
    """One conversation for each length and trial: a topic for each 600 tokens, 50 at most, and real text on none.

    Args:
        before: tokens in front of every prompt, such as a BOS that the tokenizer adds.
        texts: names and texts that stand between the topics; a trial begins at any sentence and uses each text once.
        lengths: prompt and the tokens that are generated, at most; at least 97% of it.

    Raises:
        DataError: the texts are too short for a length, or a length has no room for two topics.
    """
    haystack = Haystack(texts)
    return [
        topic_prompt(encode, before, haystack, length, trial, seed) for length in lengths for trial in range(num_trials)
    ]


def topic_prompt(
    encode: Encode, before: Sequence[int], haystack: Haystack, length: int, trial: int, seed: int
) -> Prompt:
    """The prompt of one length and trial of `topic_prompts`."""
    generator = random.Random(f"{seed}-topics-{length}-{trial}")
    topics = generator.sample(TOPICS, min(max(2, length // _TOKENS_PER_TOPIC), len(TOPICS)))
    filler = passage(haystack, generator)

    def build(size: int) -> str:
        head = _TOPICS_HEAD.format(count=len(topics))
        return head + _conversation(topics, filler, size) + _TOPICS_QUESTION + _TOPICS_ANSWER

    new_tokens = len(split_answer(encode, _TOPICS_ANSWER, f" {topics[0]}")[1]) + 8
    room = length - len(before) - new_tokens
    enough = room - int(_SLACK * length)
    sample = filler.text[:length]
    guess = round(length * len(sample) / len(encode(sample)))
    most = len(filler.text)
    size = most_that_fits(lambda size: len(encode(build(size))), room, enough=enough, guess=guess, most=most)
    used = length - room + len(encode(build(max(0, size))))
    if size < 0:
        raise DataError(
            f"topics length {length} is too short: two topics need {used} tokens, raise eval.topics.lengths"
        )
    if size == most and used < length - room + enough:
        raise DataError(
            f"topics length {length} is longer than the haystack texts, which are enough for {used} tokens: "
            "add texts to eval.haystack or lower eval.topics.lengths"
        )
    tokens, answer = split_answer(encode, build(size), f" {topics[0]}")
    facts = _facts("topics", "topics", length, None, trial, filler.name, seed)
    return Prompt((*before, *tokens), (topics[0],), "all", tuple(answer), new_tokens, facts)


@dataclass(frozen=True)
class Conversation:
    """A test case of the original: a whole prompt without the beginning of an answer, and its topics in order."""

    name: str
    """File and line."""
    prompt: str
    topics: tuple[str, ...]


def load_topics(path: Path) -> list[Conversation]:
    """The conversations of a test file of the original, ``longeval/evaluation/topics/testcases/N_topics.jsonl``.

    Raises:
        DataError: the file cannot be read, or a line is not an object with a text ``prompt`` and texts ``topics``.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): name a test file of LongEval topics") from None
    found = [_conversation_of(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise DataError(f"{path} has no conversations: name a test file of LongEval topics")
    return found


def conversation_prompts(
    encode: Encode, before: Sequence[int], conversations: Sequence[Conversation], seed: int
) -> list[Prompt]:
    """One prompt for each loaded conversation; its length is its own, a trial is its place among them."""
    return [
        conversation_prompt(encode, before, conversation, trial, seed)
        for trial, conversation in enumerate(conversations)
    ]


def conversation_prompt(
    encode: Encode, before: Sequence[int], conversation: Conversation, trial: int, seed: int
) -> Prompt:
    """The prompt of one loaded conversation; nothing is drawn, the seed is for its row alone."""
    first = conversation.topics[0]
    # Topics have a capital letter in the file and a small one in the sentence that a model copies from.
    small = first[:1].lower() + first[1:]
    said = small if f"topic of {small}" in conversation.prompt else first
    tokens, answer = split_answer(encode, conversation.prompt + _TOPICS_ANSWER, f" {said}")
    new_tokens = len(answer) + 8
    length = len(before) + len(tokens) + new_tokens
    facts = _facts("topics", "file", length, None, trial, conversation.name, seed)
    return Prompt((*before, *tokens), (first,), "all", tuple(answer), new_tokens, facts)


def _conversation(topics: Sequence[str], filler: Passage, size: int) -> str:
    """Each topic with its part of the first `size` characters of the text, cut where sentences begin."""
    cuts = [0, *(filler.boundary(size * part // len(topics)) for part in range(1, len(topics))), filler.word_end(size)]
    return "".join(
        _TOPIC.format(topic=topic, text=filler.text[start:stop].strip(), end=_TOPIC_END)
        for topic, (start, stop) in zip(topics, pairwise(cuts), strict=True)
    )


def _conversation_of(name: str, line: str) -> Conversation:
    try:
        case: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not valid JSON ({error}): write one JSON object on each line") from None
    fields: dict[str, Any] = case if isinstance(case, dict) else {}
    prompt, topics = fields.get("prompt"), fields.get("topics", [])
    named = isinstance(topics, list) and topics and all(isinstance(topic, str) and topic.strip() for topic in topics)
    if not isinstance(prompt, str) or not named:
        raise DataError(f"{name} needs a text `prompt` and texts `topics`: name a test file of LongEval topics")
    return Conversation(name, prompt, tuple(topics))


def _facts(
    task: str, name: str, length: int, depth: float | None, trial: int, document: str | None, seed: int
) -> dict[str, object]:
    fact = {"task": task, "name": name, "length": length, "depth": depth}
    return {**fact, "trial": trial, "document": document, "seed": seed}
