"""RULER's tasks against the definitions of NVIDIA/RULER at c3f5e3b, each read back from the finished prompt."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from functools import cache

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from longlora.config.evaluation import RulerConfig
from longlora.errors import DataError
from longlora.evaluation.retrieval.haystack import Haystack
from longlora.evaluation.retrieval.prompt import Encode, Prompt, score
from longlora.evaluation.retrieval.ruler import effective_length, ruler_prompt, ruler_prompts, weighted_average
from longlora.evaluation.retrieval.ruler_draft import Draft, Filled, insert, largest, word_list

TASKS = RulerConfig().tasks
ESSAY = ["niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"]
ONE_PLACE = ["niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
TEXTS = {
    "log": "".join(f"On day {day} the crew of the ship saw {day * 7} birds and slept. " for day in range(300)),
    "diary": "".join(f"Week {week} was calm. " for week in range(100)),
}
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (.+?) is: ([0-9a-f-]+)\.")
UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class Words:
    """A word with the space in front of it is a token."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.calls: list[int] = []

    def __call__(self, text: str) -> list[int]:
        words = re.findall(r"\s*\S+|\s+", text)
        self.calls.append(len(words))
        return [self.numbers.setdefault(word, len(self.numbers)) for word in words]

    def text(self, tokens: tuple[int, ...]) -> str:
        words = list(self.numbers)
        return "".join(words[token] for token in tokens)


WORDS = Words()


def encode_bytes(text: str) -> list[int]:
    return list(text.encode())


@cache
def coarse() -> Encode:
    """A BPE of 600 tokens that has seen little text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS.values(), NOISE], trainer)
    return lambda text: tokenizer.encode(text).ids


@cache
def prompt(task: str, length: int = 4096, trial: int = 0, seed: int = 0) -> Prompt:
    return ruler_prompt(WORDS, (), Haystack(TEXTS), task, length, trial, seed)


def text(task: str, length: int = 4096, trial: int = 0) -> str:
    return WORDS.text(prompt(task, length, trial).tokens)


def context(task: str, trial: int = 0) -> str:
    """What stands between the first and the last line of a needle prompt."""
    first, rest = text(task, trial=trial).split("\n", 1)
    assert first.endswith("afterwards.")
    return rest.rsplit("\n", 1)[0]


# --- the wording, and what is asked -----------------------------------------------------------------------------------


def test_noise_needle_is_the_original_prompt_in_the_singular() -> None:
    (value,) = prompt("niah_single_1").references
    key = NEEDLE.search(text("niah_single_1"))[2]  # type: ignore[index]
    lines = text("niah_single_1").split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert sorted(set(lines[1:-1])) == [f"One of the special magic numbers for {key} is: {value}.", NOISE]
    assert lines[1:-1].count(NOISE) == len(lines) - 3
    assert lines[-1] == (
        f"What is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is"
    )
    assert re.fullmatch(r"[1-9][0-9]{6}", value)


def test_four_values_of_one_key_are_asked_for_in_the_plural() -> None:
    needles = NEEDLE.findall(context("niah_multivalue"))
    (key,) = {key for _, key, _ in needles}
    assert len(needles) == 4
    assert sorted(value for _, _, value in needles) == sorted(prompt("niah_multivalue").references)
    assert text("niah_multivalue").startswith("Some special magic numbers are hidden within the following text. ")
    assert text("niah_multivalue").endswith(
        f"\nWhat are all the special magic numbers for {key} mentioned in the provided text?"
        f" The special magic numbers for {key} mentioned in the provided text are"
    )


def test_four_keys_are_asked_for_in_the_order_of_the_references() -> None:
    values = {key: value for _, key, value in NEEDLE.findall(context("niah_multiquery"))}
    asked = re.search(r"numbers for (.+) mentioned in the provided text\?", text("niah_multiquery"))[1]  # type: ignore[index]
    first, last = asked.split(", and ")
    keys = [*first.split(", "), last]
    assert len(values) == 4
    assert [values[key] for key in keys] == list(prompt("niah_multiquery").references)


@pytest.mark.parametrize(("task", "number"), [("niah_single_2", 1), ("niah_single_3", 1), ("niah_multikey_1", 4)])
def test_real_text_holds_the_needles_and_one_is_asked_for(task: str, number: int) -> None:
    values = {key: value for _, key, value in NEEDLE.findall(context(task))}
    asked = re.search(r"What is the special magic (?:number|uuid) for (.+?) mentioned", text(task))[1]  # type: ignore[index]
    assert len(values) == number
    assert (values[asked],) == prompt(task).references


def test_uuids_are_uuids_of_version_4() -> None:
    assert UUID4.fullmatch(prompt("niah_single_3").references[0])
    assert "The special magic uuid for" in text("niah_single_3")
    assert all(
        UUID4.fullmatch(key) and UUID4.fullmatch(value) for _, key, value in NEEDLE.findall(context("niah_multikey_3"))
    )


def test_without_needles_the_real_text_is_a_piece_of_the_haystack() -> None:
    plain = NEEDLE.sub("", context("niah_single_2"))
    whole = " ".join((TEXTS["log"] + TEXTS["diary"]).split())
    assert " ".join(plain.split()) in f"{whole} {whole}"
    assert "  " not in context("niah_single_2")


def test_values_of_a_key_stand_in_any_order() -> None:
    orders = []
    for trial in range(4):
        stand = [value for _, _, value in NEEDLE.findall(context("niah_multivalue", trial))]
        orders.append([stand.index(value) for value in prompt("niah_multivalue", trial=trial).references])
    assert len({tuple(order) for order in orders}) > 1


def test_no_key_occurs_twice_even_where_names_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    few = tuple(f"w{number}" for number in range(20))
    monkeypatch.setattr("longlora.evaluation.retrieval.ruler_draft.word_list", lambda *_: few)
    for trial in range(8):
        made = ruler_prompt(WORDS, (), Haystack({}), "niah_multikey_2", 3500, trial, 0)
        keys = [key for _, key, _ in NEEDLE.findall(WORDS.text(made.tokens))]
        assert len(set(keys)) == len(keys) > 200


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_all_lines_are_needles_of_different_keys(task: str) -> None:
    lines = context(task).split("\n")
    found = [NEEDLE.fullmatch(line) for line in lines]
    assert all(found)
    assert len({match[2] for match in found if match}) == len(lines) > 200
    assert context(task).count(prompt(task).references[0]) == 1


@pytest.mark.parametrize("task", ONE_PLACE)
def test_depth_is_where_the_needle_stands(task: str) -> None:
    for trial in range(3):
        held = context(task, trial)
        needle = next(match for match in NEEDLE.finditer(held) if match[3] == prompt(task, trial=trial).references[0])
        expected = needle.start() / (len(held) - len(needle[0]))
        assert prompt(task, trial=trial).facts["depth"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("task", sorted(set(TASKS) - set(ONE_PLACE)))
def test_several_places_have_no_depth_and_no_answer_text(task: str) -> None:
    assert prompt(task).facts["depth"] is None
    assert prompt(task).answer == ()


# --- variables, common words, codes -----------------------------------------------------------------------------------


def resolve(held: str, value: str) -> set[str]:
    known: dict[str, str] = {}
    for name, given in re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", held):
        known[name] = known.get(given, given)
    return {name for name, given in known.items() if given == value}


@pytest.mark.parametrize("trial", range(3))
def test_the_chain_of_variables_leads_to_the_value(trial: int) -> None:
    example, own = text("vt", trial=trial).split("\n\nMemorize and track")
    value = re.search(r"assigned the value (\d{5}) in the text above\. Answer: ", own)[1]  # type: ignore[index]
    names = prompt("vt", trial=trial).references
    assert resolve(own, value) == set(names)
    assert len(names) == 5
    assert all(re.fullmatch("[A-Z]{5}", name) for name in names)
    assert own.endswith(
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"5 variables are assigned the value {value}, they are: "
    )
    asked, answer = example.split(", they are:  ")
    assert resolve(example, asked[-5:]) == set(answer.split()) >= {answer[:3]}
    assert len(answer.split()) == 5
    assert not set(answer.split()) & resolve(own, value)
    assert own.count(NOISE) + 5 == len(own.split("\n\n")[1].split("\n")) - 1


def test_the_example_of_variables_has_at_most_500_tokens() -> None:
    example = text("vt").split("\n\nMemorize and track")[0]
    assert 460 <= len(WORDS(example)) - 5 <= 500


def listed(held: str) -> Counter[str]:
    entries = re.findall(r"(?:^| )(\d+)\. (.+?)(?= \d+\. |$)", held)
    assert [int(place) for place, _ in entries] == list(range(1, len(entries) + 1))
    return Counter(word for _, word in entries)


@pytest.mark.parametrize(
    ("length", "example", "own"),
    [(4096, (10, 3, 40), (30, 3)), (4095, (3, 1, 20), (6, 1)), (8192, (10, 3, 40), (30, 3))],
)
def test_ten_words_are_common_and_all_others_rare(
    length: int, example: tuple[int, int, int], own: tuple[int, int]
) -> None:
    first, second = text("cwe", length).split("\nBelow is a numbered list")
    shown = listed(first.split("\n")[1])
    answer = listed(first.split("in the list are: ")[1])
    assert {word for word, times in shown.items() if times == example[0]} == set(answer)
    assert sorted(set(shown.values())) == sorted(example[:2])
    assert (len(shown), len(answer)) == (example[2], 10)
    counts = listed(second.split("\n")[1])
    assert {word for word, times in counts.items() if times == own[0]} == set(prompt("cwe", length).references)
    assert Counter(counts.values()) == {own[0]: 10, own[1]: len(counts) - 10}
    assert second.endswith(
        "\nQuestion: What are the 10 most common words in the above list?"
        " Answer: The top 10 words that appear most often in the list are:"
    )


def test_a_list_longer_than_the_word_list_goes_on_with_pairs() -> None:
    made = ruler_prompt(WORDS, (), Haystack({}), "cwe", 60_000, 0, 0)
    second = WORDS.text(made.tokens).split("\nBelow is a numbered list")[1]
    counts = listed(second.split("\n")[1])
    assert len(counts) > len(word_list("noun", "adjective", "verb"))
    assert Counter(counts.values()) == {30: 10, 3: len(counts) - 10}


@pytest.mark.parametrize("length", [350, 512, 1000, 4096])
def test_three_codes_are_the_most_frequent_behind_the_dots(length: int) -> None:
    held = re.search(r"coded words\. (.+)\nQuestion: ", text("fwe", length))[1]  # type: ignore[index]
    counts = Counter(held.split(" "))
    first, *ranks, next_one = counts.most_common(5)
    assert first[0] == "..."
    assert tuple(code for code, _ in ranks) == prompt("fwe", length).references
    assert ranks[-1][1] > next_one[1]
    # Zeta with alpha 2: the second rank has a quarter of the first.
    assert ranks[0][1] == pytest.approx(first[1] / 4, abs=1)
    assert all(re.fullmatch("[a-z]{6}", code) for code in counts if code != "...")


# --- all tasks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["bytes", "words", "coarse"])
def test_prompt_and_answer_fill_the_length_and_no_more(task: str, name: str) -> None:
    encode = {"bytes": encode_bytes, "words": Words(), "coarse": coarse()}[name]
    length = 8192
    before = (1,) * 300
    made = ruler_prompt(encode, before, Haystack(TEXTS), task, length, 3, 0)
    assert made.tokens[:300] == before
    used = len(made.tokens) + made.max_new_tokens
    assert length * 0.97 <= used <= length


@pytest.mark.parametrize("task", TASKS)
def test_right_answers_are_in_the_prompt_and_score_1_and_others_0(task: str) -> None:
    made = prompt(task)
    assert all(reference in text(task) for reference in made.references)
    assert made.metric == "all"
    assert score(made.metric, " ".join(made.references), made.references) == 1.0
    assert score(made.metric, "0000 zzqq XXQQ", made.references) == 0.0
    if len(made.references) > 1:
        assert score(made.metric, made.references[0], made.references) == 1 / len(made.references)


def test_tokens_to_generate_are_the_original_numbers() -> None:
    numbers = {task: prompt(task).max_new_tokens for task in TASKS}
    assert numbers == {task: {"vt": 30, "cwe": 120, "fwe": 50}.get(task, 128) for task in TASKS}


@pytest.mark.parametrize("task", ONE_PLACE)
def test_the_answer_continues_the_prompt(task: str) -> None:
    made = prompt(task)
    assert WORDS.text(made.tokens + made.answer) == f"{text(task)} {made.references[0]}"


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_is_made_again_from_its_facts_alone(task: str) -> None:
    settings = RulerConfig(tasks=["vt", task], num_samples=2)  # type: ignore[list-item]
    for made in ruler_prompts(WORDS, (5,), TEXTS, settings, [1024, 2048], seed=7)[4:]:
        facts = made.facts
        again = ruler_prompt(
            WORDS, (5,), Haystack(TEXTS), facts["name"], facts["length"], facts["trial"], facts["seed"]
        )
        assert again == made
        assert facts["task"] == "ruler"


@pytest.mark.parametrize("task", TASKS)
def test_trials_and_seeds_draw_everything_anew(task: str) -> None:
    made = [prompt(task), prompt(task, trial=1), prompt(task, seed=1)]
    assert len({each.sha256 for each in made}) == 3
    assert not set(made[0].references) & set(made[1].references)
    if task in ONE_PLACE:
        assert len({prompt(task, trial=trial).facts["depth"] for trial in range(4)}) > 2


@pytest.mark.parametrize("task", ESSAY)
def test_real_text_begins_elsewhere_in_every_trial(task: str) -> None:
    starts = [NEEDLE.sub("", context(task, trial)).split()[:8] for trial in range(4)]
    assert len({tuple(start) for start in starts}) > 2
    assert {prompt(task, trial=trial).facts["document"] for trial in range(4)} <= set(TEXTS)


def test_common_words_stand_elsewhere_in_every_trial() -> None:
    places = []
    for trial in range(2):
        second = text("cwe", trial=trial).split("\nBelow is a numbered list")[1].split("\n")[1]
        words = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", second)
        places.append([place for place, word in enumerate(words) if word in prompt("cwe", trial=trial).references][:20])
    assert places[0] != places[1]


@pytest.mark.parametrize("task", TASKS)
def test_a_chat_template_holds_the_question_and_ends_with_the_beginning_of_the_answer(task: str) -> None:
    def wrap(question: str, prefix: str) -> str:
        return f"<user> {question}</user> <assistant>{prefix}"

    made = ruler_prompt(WORDS, (), Haystack(TEXTS), task, 4096, 0, 0, wrap)
    held = WORDS.text(made.tokens)
    question, prefix = held.split("</user> <assistant>")
    assert question.startswith("<user> ")
    assert text(task).endswith(prefix)
    assert len(made.tokens) + made.max_new_tokens <= 4096


# --- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("encode", [Words(), encode_bytes])
def test_a_length_too_short_is_refused_with_what_is_needed(task: str, encode: Encode) -> None:
    with pytest.raises(DataError, match=rf"ruler task {task} needs about \d+ tokens: length 100 ") as refused:
        ruler_prompt(encode, (), Haystack(TEXTS), task, 100, 0, 0)
    needed = int(re.search(r"about (\d+)", str(refused.value))[1])  # type: ignore[index]
    made = ruler_prompt(encode, (), Haystack(TEXTS), task, int(needed * 1.1), 0, 0)
    assert len(made.tokens) + made.max_new_tokens <= needed * 1.1


def test_real_text_is_needed_only_by_tasks_that_hold_some() -> None:
    for task in sorted(set(TASKS) - set(ESSAY)):
        assert ruler_prompt(WORDS, (), Haystack({}), task, 2048, 0, 0).references
    for task in ESSAY:
        with pytest.raises(DataError, match="eval.haystack"):
            ruler_prompt(WORDS, (), Haystack({}), task, 2048, 0, 0)


@pytest.mark.parametrize("task", TASKS)
def test_a_tokenizer_of_any_behaviour_comes_to_an_end(task: str) -> None:
    def nothing(text: str) -> list[int]:
        return []

    def erratic(text: str) -> list[int]:
        return encode_bytes(text) if len(text) < 200 else [0] * (zlib.crc32(text.encode()) % 400)

    assert ruler_prompt(nothing, (), Haystack(TEXTS), task, 500, 0, 0).tokens == ()
    for trial in range(3):
        try:
            made = ruler_prompt(erratic, (), Haystack(TEXTS), task, 500, trial, 0)
        except DataError:
            continue
        assert len(made.tokens) + made.max_new_tokens <= 500


@pytest.mark.parametrize("task", TASKS)
def test_few_whole_prompts_are_tokenized(task: str) -> None:
    for trial in range(3):
        encode = Words()
        ruler_prompt(encode, (), Haystack(TEXTS), task, 32_768, trial, 0)
        assert sum(encode.calls) < 3 * 32_768


@pytest.mark.parametrize("unit", [1, 3, 7, 20])
def test_the_largest_size_leaves_one_unit_or_a_hundredth_free(unit: int) -> None:
    draft = Draft("", "", ())
    for room in range(60, 1000, 7):
        filled = largest(lambda size: Filled(draft, [0] * (10 + size * unit)), 2, room)
        assert filled is not None
        assert room - max(unit, room / 100) <= len(filled.tokens) <= room
    assert largest(lambda size: Filled(draft, [0] * (size * unit)), 11, 11 * unit - 1) is None


def test_a_measure_that_jumps_takes_few_sizes_to_find_its_step() -> None:
    draft, sizes = Draft("", "", ()), []

    def jump(size: int) -> Filled:
        sizes.append(size)
        return Filled(draft, [0] * (10 if size < 777 else 5_000))

    assert largest(jump, 5, 1000) == Filled(draft, [0] * 10)
    assert 776 in sizes
    assert len(sizes) < 30


def test_lines_go_in_front_of_the_parts_of_their_places() -> None:
    assert insert(["a", "b", "c"], ["x", "y"], [0, 1, 1]) == (["a", "x", "b", "c", "y"], [0, 2, 3])
    assert insert(["a"], ["x"], [1]) == (["x", "a"], [1])


# --- summary numbers --------------------------------------------------------------------------------------------------

# Llama3.1-70B, Command-R-plus-0824 and LongAlpaca-13B in the table of RULER's README.
PUBLISHED = {
    "llama": ([96.5, 95.8, 95.4, 94.8, 88.4, 66.6], 65536, 85.5, 93.7),
    "command": ([96.0, 95.1, 94.0, 92.4, 85.4, 64.6], 32768, 83.4, 92.4),
    "longalpaca": ([60.6, 57.0, 56.6, 43.6, 0.0, 0.0], None, 24.7, 47.9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_give_their_published_summary(name: str) -> None:
    row, effective, increasing, decreasing = PUBLISHED[name]
    scores = {4096 * 2**step: value for step, value in enumerate(row)}
    assert effective_length(scores, 85.6) == effective
    assert weighted_average(scores, increasing=True) == pytest.approx(increasing, abs=0.051)
    assert weighted_average(scores, increasing=False) == pytest.approx(decreasing, abs=0.051)


def test_a_score_at_the_threshold_counts() -> None:
    assert effective_length({4096: 90.0, 8192: 85.6}, 85.6) == 8192
