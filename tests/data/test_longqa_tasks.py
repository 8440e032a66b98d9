"""Every question has exactly one right answer in the text that is shown, and what has two is not asked."""

from __future__ import annotations

import random

import pytest

from longlora.data.documents import Document
from longlora.data.longqa.chapters import find_chapters
from longlora.data.longqa.score import form_of, score_answer
from longlora.data.longqa.tasks import TASKS, Draft, Offline, known_tasks
from longlora.data.longqa.text import Text, Window, quarter_of_characters
from longlora.errors import DataError

THINGS = ["lantern", "barrel", "ladder", "violin", "kettle", "anchor", "saddle", "mirror", "basket", "hammer"]
PLACES = ["harbour", "cellar", "garden", "chapel", "market", "stable", "attic", "bridge", "tunnel", "meadow"]


def sentence(number: int) -> str:
    thing, place = THINGS[number % 10], PLACES[number // 10]
    return f"On day {number} the old\nsailor carried his {thing} slowly down to the {place} before night fell."


def on_one_line(number: int) -> str:
    return sentence(number).replace("\n", " ")


def whole(text: str) -> Window:
    window = Text(Document("d", text), quarter_of_characters).window(10**6, random.Random(0))
    assert window is not None
    return window


def drafts(task: str, window: Window, seeds: int = 30) -> list[Draft]:
    found = (TASKS[task](window, random.Random(seed)) for seed in range(seeds))
    return [draft for draft in found if draft]


STORY = " ".join(sentence(number) for number in range(40))
CHAPTERS = "\n\n".join(
    f"CHAPTER {name}\n\n" + " ".join(sentence(number) for number in range(part * 5, part * 5 + 5))
    for part, name in enumerate(["I", "II", "III"])
)


def number_in(text: str) -> int:
    return int(text.split("day ")[1].split()[0])


class TestTasks:
    def test_next_sentence(self) -> None:
        window = whole(STORY)
        for draft in drafts("next_sentence", window):
            asked = next(line for line in draft.question.split("\n") if line.startswith("On day"))
            assert draft.answer == on_one_line(number_in(asked) + 1)
            evidence = window.text[draft.start : draft.end]
            assert " ".join(evidence.split()) == f"{asked} {draft.answer}"

    def test_find_sentence(self) -> None:
        window = whole(STORY)
        for draft in drafts("find_sentence", window):
            phrase = draft.question.split('"')[1]
            assert phrase in draft.answer != phrase
            assert [number for number in range(40) if phrase in on_one_line(number)] == [number_in(draft.answer)]
            assert " ".join(window.text[draft.start : draft.end].split()) == draft.answer

    def test_order_events(self) -> None:
        window, answers = whole(STORY), set()
        for draft in drafts("order_events", window):
            shown = [line[3:] for line in draft.question.split("\n") if line[:1].isdigit()]
            order = [int(number) - 1 for number in draft.answer.split(", ")]
            days = [number_in(shown[at]) for at in order]
            assert days == sorted(days)
            assert len(set(days)) == 4
            assert window.text[draft.start :].startswith(sentence(days[0]))
            assert window.text[: draft.end].endswith(sentence(days[-1]))
            answers.add(draft.answer)
        assert len(answers) > 10

    def test_fill_passage(self) -> None:
        for draft in drafts("fill_passage", whole(STORY)):
            line = next(line for line in draft.question.split("\n") if line.startswith("On day"))
            assert line.replace("[...]", draft.answer) == on_one_line(number_in(line.replace("[...]", draft.answer)))
            assert STORY.replace("\n", " ").count(draft.answer) == 1

    def test_count_mentions_in_any_number(self) -> None:
        text = STORY + " Then Marta met Jonas at last in town. Later Marta and Jonas saw Marta's boat again by night."
        window = whole(text)
        seen = {draft.question.split('"')[1]: draft for draft in drafts("count_mentions", window, 60)}
        assert {word: draft.answer for word, draft in seen.items()} == {"Marta": "3", "Jonas": "2"}
        marta = window.text[seen["Marta"].start : seen["Marta"].end]
        assert marta.startswith("Marta")
        assert marta.endswith("Marta")

    def test_words_that_can_be_counted_in_two_ways_are_not_asked(self) -> None:
        text = "Then Rose gave the other man a rose. Later Rose and Ann met Annette in the wide square of Ann."
        assert drafts("count_mentions", whole(text)) == []

    def test_which_chapter(self) -> None:
        window, answers = whole(CHAPTERS), set()
        for draft in drafts("which_chapter", window):
            line = next(line for line in draft.question.split("\n") if line.startswith("On day"))
            assert draft.answer == "CHAPTER " + ["I", "II", "III"][number_in(line) // 5]
            evidence = window.text[draft.start : draft.end]
            assert evidence.startswith(draft.answer)
            assert " ".join(evidence.split()).endswith(line)
            answers.add(draft.answer)
        assert len(answers) == 3

    def test_which_chapter_needs_two_chapters_that_are_named_once(self) -> None:
        assert drafts("which_chapter", whole(STORY)) == []
        named = CHAPTERS + " All this was told before in chapter ii and chapter iii of the very same book."
        assert drafts("which_chapter", whole(named)) == []

    @pytest.mark.parametrize("task", ["next_sentence", "find_sentence", "order_events", "fill_passage"])
    def test_what_stands_twice_is_not_asked(self, task: str) -> None:
        again = " ".join(sentence(number).replace("\n", " ").upper() for number in range(40))
        assert drafts(task, whole(STORY))
        assert drafts(task, whole(STORY + " " + again)) == []

    @pytest.mark.parametrize("task", list(TASKS))
    def test_wordings_and_answers_are_drawn_by_seed(self, task: str) -> None:
        window = whole(CHAPTERS + " Marta met Jonas. Marta went home.")
        asked = [draft.question for draft in drafts(task, window)]
        assert len(set(asked)) > 3
        assert asked == [draft.question for draft in drafts(task, window)]

    @pytest.mark.parametrize("task", list(TASKS))
    @pytest.mark.parametrize("text", ["A word.", "no sentence here", "一。"])
    def test_texts_without_anything_to_ask(self, task: str, text: str) -> None:
        assert drafts(task, whole(text), 3) == []

    def test_chinese_sentences(self) -> None:
        text = "老水手今天早上把灯笼带到了港口。他的妻子在花园里等了很久很久。孩子们晚上在桥边唱歌跳舞。"
        answers = {draft.answer for draft in drafts("find_sentence", whole(text))}
        assert answers <= set(text.replace("。", "。|").split("|"))
        assert len(answers) == 3

    def test_unknown_task_is_named_with_the_nearest(self) -> None:
        with pytest.raises(DataError, match="'next_sentense' is not known: did you mean next_sentence"):
            known_tasks(["next_sentense"])
        assert known_tasks([]) == list(TASKS)

    def test_tasks_come_in_turn_and_another_one_where_a_window_has_none(self) -> None:
        maker = Offline(["which_chapter", "find_sentence"])
        window = whole(STORY)
        assert maker.draft(window, random.Random(0), 0, 0) == "no question found"
        found = [maker.draft(window, random.Random(seed), 0, maker.attempts - 1) for seed in range(20)]
        assert {draft.task for draft in found if isinstance(draft, Draft)} == {"find_sentence"}


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        ("CHAPTER I\n\nOne.\n\nCHAPTER II\n\nTwo.", ["CHAPTER I", "CHAPTER II"]),
        ("Chapter 1: North\n\nOne.\n\nChapter 2: South\nTwo.", ["Chapter 1: North", "Chapter 2: South"]),
        ("Chapter one was long ago.\nChapter two of it came.", []),
        ("# Book\n\n## A b\n\nx\n\n## C #\n\ny\n```\n## no\n```\n", ["A b", "C"]),
        ("x\n\nII.\n\ntext\n\n  III  \n\nmore", ["II.", "III"]),
        ("x\n\n\nTHE SEA\n\ntext\n\n\nTHE LAND\n\nmore", ["THE SEA", "THE LAND"]),
        ("CHAPTER I\n\nonly one", []),
        ("", []),
    ],
)
def test_headings(text: str, titles: list[str]) -> None:
    found = find_chapters(text)
    assert [chapter.title for chapter in found] == titles
    assert all(chapter.title in text[chapter.start : chapter.end] for chapter in found)


class TestWindows:
    def test_windows_end_at_sentences_and_have_the_asked_length(self) -> None:
        text = Text(Document("d", STORY), quarter_of_characters)
        starts = set()
        for seed in range(50):
            window = text.window(200, random.Random(seed))
            assert window is not None
            assert STORY[window.start :].startswith(window.text)
            assert window.text.startswith("On day")
            assert window.text.endswith("fell.")
            assert 170 <= len(window.text) / 4 <= 200
            for each in window.sentences:
                assert " ".join(window.text[each.start : each.end].split()) == each.text
            starts.add(window.start)
        assert len(starts) > 20
        assert {0, STORY.index("On day 31")} <= starts | {0, STORY.index("On day 31")}

    def test_every_beginning_that_leaves_a_full_window_can_be_drawn(self) -> None:
        text = Text(Document("d", STORY), quarter_of_characters)
        days = {number_in(str(getattr(text.window(200, random.Random(seed)), "text", ""))) for seed in range(600)}
        assert min(days) == 0
        assert days == set(range(max(days) + 1))
        last = text.window(200, random.Random(0))
        assert last is not None
        assert max(days) + len(last.sentences) >= 38

    def test_a_short_document_is_a_window_and_a_long_sentence_is_none(self) -> None:
        assert whole(STORY).text == STORY
        assert Text(Document("d", STORY), quarter_of_characters).window(5, random.Random(0)) is None


@pytest.mark.parametrize(
    ("task", "answer", "reference", "expected"),
    [
        ("find_sentence", 'The "Ship", sailed!', "ship sailed.", (1.0, 1.0)),
        ("find_sentence", "ship sank", "the ship sailed", (0.0, 0.5)),
        ("find_sentence", "", "ship", (0.0, 0.0)),
        ("find_sentence", "the", "", (1.0, 1.0)),
        ("find_sentence", "老水手", "老水手。", (1.0, 1.0)),
        ("order_events", "The order is 3, 1, 4 and 2.", "3, 1, 4, 2", (1.0, 1.0)),
        ("order_events", "3, 1, 2, 4", "3, 1, 4, 2", (0.0, 0.5)),
        ("order_events", "none", "3, 1, 4, 2", (0.0, 0.0)),
        ("count_mentions", "It occurs seven times.", "7", (1.0, 1.0)),
        ("count_mentions", "17", "7", (0.0, 0.0)),
        ("count_mentions", "often", "7", (0.0, 0.0)),
    ],
)
def test_scores(task: str, answer: str, reference: str, expected: tuple[float, float]) -> None:
    assert score_answer(form_of(task), answer, reference) == pytest.approx(expected)
