"""A set is the same for the same seed, also after a kill, and no held-out text is trained on."""

from __future__ import annotations

import fcntl
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from longlora.data.documents import Document
from longlora.data.longqa.build import LongQASettings, build_longqa
from longlora.data.longqa.card import Facts
from longlora.data.longqa.split import held_out, related_groups, without_copies
from longlora.data.longqa.tasks import TASKS, Draft, Offline
from longlora.data.longqa.text import Window, quarter_of_characters
from longlora.errors import DataError, RunFolderError

SETTINGS = LongQASettings(lengths=(600, 900), per_document=6, seed=3)
FILES = ("train.jsonl", "heldout.jsonl", "dropped.jsonl", "README.md", "settings.json")
WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "islet", "jetty", "knoll", "ledge"]


def book(seed: int, sentences: int = 120) -> str:
    generator = random.Random(seed)
    return " ".join(
        f"The {' '.join(generator.choices(WORDS, k=generator.randint(9, 14)))} number {seed}{at}."
        for at in range(sentences)
    )


BOOKS = [Document(f"book{seed}", book(seed)) for seed in range(5)]


def build(
    folder: Path, settings: LongQASettings = SETTINGS, documents: Sequence[Document] = BOOKS, **changes: Any
) -> Facts:
    maker = changes.pop("maker", Offline(list(TASKS)))
    return build_longqa(documents, folder, settings, maker, quarter_of_characters, command="longlora x", **changes)


def rows(folder: Path, side: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def test_rows_are_what_the_docstring_says(tmp_path: Path) -> None:
    facts = build(tmp_path / "set")
    texts = {document.name: document.text for document in BOOKS}
    found = rows(tmp_path / "set", "train") + rows(tmp_path / "set", "heldout")
    assert len(found) == 5 * 2 * 6 == sum(side.rows for side in facts.sides.values())
    for row in found:
        user, assistant = row["messages"]
        text = user["content"][: row["document_end"]]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert texts[row["document"]][row["window"]["start"] : row["window"]["end"]] == text
        assert user["content"][row["document_end"] :].startswith("\n\n")
        assert assistant["content"] == row["answer"]
        assert row["length"] // 2 < row["tokens"] <= row["length"] - 48
        evidence = row["evidence"]
        assert 0 <= evidence["start"] < evidence["end"] <= row["document_end"]
        if row["task"] in ("find_sentence", "fill_passage", "next_sentence"):
            assert row["answer"] in " ".join(text[evidence["start"] : evidence["end"]].split())
    assert len({row["id"] for row in found}) == len(found)
    assert {row["task"] for row in found} == set(TASKS) - {"which_chapter", "count_mentions"}


def test_same_seed_same_bytes_other_seed_other_rows(tmp_path: Path) -> None:
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        build(tmp_path / name, LongQASettings(lengths=(600,), per_document=4, seed=seed))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one")[0] != contents(tmp_path / "other")[0]


class Killed(Offline):
    """Stops in the middle, as a kill would."""

    def draft(self, window: Window, generator: random.Random, index: int, attempt: int) -> Draft | str:
        if index == 4:
            raise KeyboardInterrupt
        return super().draft(window, generator, index, attempt)


@pytest.mark.parametrize("torn", [b"", b'{"id": "book0:600:4", "doc'])
def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path: Path, torn: bytes) -> None:
    build(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "killed", maker=Killed(list(TASKS)))
    side = next(side for side in ("train", "heldout") if rows(tmp_path / "killed", side))
    assert len(rows(tmp_path / "killed", side)) == 4
    with (tmp_path / "killed" / f"{side}.jsonl").open("ab") as file:
        file.write(torn)
    said: list[str] = []
    build(tmp_path / "killed", say=said.append)
    assert said[0] == "going on: 4 rows are there already"
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_finished_set_is_left_as_it_is(tmp_path: Path) -> None:
    build(tmp_path / "set")
    before = contents(tmp_path / "set")
    build(tmp_path / "set")
    assert contents(tmp_path / "set") == before


def test_a_damaged_row_in_the_middle_is_named(tmp_path: Path) -> None:
    build(tmp_path / "set")
    path = tmp_path / "set" / "train.jsonl"
    path.write_bytes(b"{\n" + path.read_bytes())
    with pytest.raises(DataError, match=r"train\.jsonl:1 is damaged: remove this line"):
        build(tmp_path / "set")


def test_other_settings_start_anew_only_with_replace(tmp_path: Path) -> None:
    build(tmp_path / "set")
    before = contents(tmp_path / "set")
    other = LongQASettings(lengths=(600,), per_document=2, seed=3)
    with pytest.raises(DataError, match=r"per_document 6 then, 2 now.*--replace"):
        build(tmp_path / "set", other)
    with pytest.raises(DataError, match="other documents"):
        build(tmp_path / "set", documents=BOOKS[:4])
    assert contents(tmp_path / "set") == before
    build(tmp_path / "set", other, replace=True)
    build(tmp_path / "new", other)
    assert contents(tmp_path / "set") == contents(tmp_path / "new")


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("mine")
    with pytest.raises(DataError, match="holds other files already"):
        build(tmp_path / "set", replace=True)
    assert (tmp_path / "set" / "train.jsonl").read_text() == "mine"
    with pytest.raises(DataError, match="is a file"):
        build(tmp_path / "set" / "train.jsonl")


def locked(folder: Path) -> bool:
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_folder_is_written_by_one_command_at_a_time(tmp_path: Path) -> None:
    class Looking(Offline):
        def draft(self, window: Window, generator: random.Random, index: int, attempt: int) -> Draft | str:
            assert locked(tmp_path / "set")
            return super().draft(window, generator, index, attempt)

    build(tmp_path / "set", maker=Looking(list(TASKS)))
    assert {path.name for path in (tmp_path / "set").iterdir()} == set(FILES)
    before = contents(tmp_path / "set")
    other = LongQASettings(lengths=(600,), per_document=2, seed=3)
    with (tmp_path / "set" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match=r"--output .*set is in use by another process: wait until it ends"):
            build(tmp_path / "set", other, replace=True)
    assert contents(tmp_path / "set") == before
    with pytest.raises(DataError, match="begun with other settings"):
        build(tmp_path / "set", other)
    assert not (tmp_path / "set" / ".lock").exists()


def test_a_lock_that_a_killed_command_left_is_no_file_of_others(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / ".lock").write_text("{}")
    build(tmp_path / "set")
    assert {path.name for path in (tmp_path / "set").iterdir()} == set(FILES)


def test_no_question_is_asked_twice(tmp_path: Path) -> None:
    short = [Document("short", book(7, 30)), Document("other", book(8, 30))]
    settings = LongQASettings(lengths=(1000,), per_document=120, heldout_share=0)
    facts = build(tmp_path / "set", settings, short, maker=Offline(["next_sentence"], attempts=2))
    found = rows(tmp_path / "set", "train")
    keys = [
        (row["messages"][0]["content"][row["document_end"] :], row["window"]["start"] + row["evidence"]["start"])
        for row in found
    ]
    assert len(set(keys)) == len(keys) == len(found)
    assert facts.dropped["asked before"] == 240 - len(found) > 0


class TestSplit:
    def test_documents_are_on_one_side_and_a_share_is_held_out(self, tmp_path: Path) -> None:
        facts = build(tmp_path / "set", LongQASettings(lengths=(600,), per_document=2, heldout_share=0.4))
        sides = {side: {row["document"] for row in rows(tmp_path / "set", side)} for side in ("train", "heldout")}
        assert (len(sides["train"]), len(sides["heldout"])) == (3, 2)
        assert not sides["train"] & sides["heldout"]
        assert {name for name, side in facts.side_of.items() if side == "heldout"} == sides["heldout"]

    def test_copies_are_left_out_and_equal_names_get_numbers(self) -> None:
        documents = [Document("a", "Some Text."), Document("b", "some\n text."), Document("a", "Other text.")]
        kept, copies = without_copies(documents)
        assert [document.name for document in kept] == ["a", "a (2)"]
        assert copies == [("b", "a")]

    def test_documents_that_share_text_stay_together(self) -> None:
        changed = BOOKS[0].text.replace("amber", "opal")[: len(BOOKS[0].text) // 2] + BOOKS[0].text[-3000:]
        part = Document("part", BOOKS[1].text[2000:6000])
        documents = [*BOOKS[:3], Document("changed", changed), part]
        assert related_groups(documents) == [["book0", "changed"], ["book1", "part"], ["book2"]]
        for seed in range(20):
            held = held_out(related_groups(documents), 0.4, [], seed)
            assert ("book0" in held) == ("changed" in held)
            assert ("book1" in held) == ("part" in held)
            assert 0 < len(held) < 5

    def test_many_relatives_stay_together(self) -> None:
        documents = [Document(str(number), f"{book(1)} Then came {number}.") for number in range(120)]
        assert len(related_groups(documents)) == 1

    def test_named_documents_take_their_relatives_along(self) -> None:
        groups = [["a", "a2"], ["b"], ["c"]]
        assert held_out(groups, 0.0, ["a2"], 0) == {"a", "a2"}
        with pytest.raises(DataError, match=r"'b2' is not among the 4 documents that are used: did you mean"):
            held_out(groups, 0.0, ["b2"], 0)
        with pytest.raises(DataError, match="all 4 documents are held out"):
            held_out(groups, 0.0, ["a", "b", "c"], 0)

    def test_one_document_cannot_be_split(self) -> None:
        with pytest.raises(DataError, match="cannot be split: give other documents, or --heldout 0"):
            held_out([["a"]], 0.2, [], 0)
        assert held_out([["a"]], 0.0, [], 0) == set()


@pytest.mark.parametrize("seed", range(6))
def test_what_is_held_out_is_long_enough_to_be_asked_about(tmp_path: Path, seed: int) -> None:
    documents = [*BOOKS[:2], *(Document(f"note{number}", f"Note {number} is short.") for number in range(4))]
    settings = LongQASettings(lengths=(600,), per_document=1, seed=seed)
    facts = build(tmp_path / "set", settings, documents)
    assert [side.rows for side in facts.sides.values()] == [1, 1]


@pytest.mark.parametrize(
    ("documents", "settings", "message"),
    [
        ([], SETTINGS, "no document with text"),
        ([Document("a", "x\0y"), *BOOKS], SETTINGS, "a is binary"),
        (
            [Document("a", "Too short for this."), Document("b", "And b.")],
            SETTINGS,
            "no document has half of --tokens 600",
        ),
        (BOOKS, LongQASettings(lengths=(64,)), "--tokens 64: give lengths of at least 128"),
        (BOOKS, LongQASettings(per_document=0), "--per-document 0"),
        (BOOKS, LongQASettings(heldout_share=1.0), "--heldout 1.0"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(
    tmp_path: Path, documents: list[Document], settings: LongQASettings, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        build(tmp_path / "set", settings, documents)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_card_tells_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    facts = build(tmp_path / "set", documents=[*BOOKS, Document("tiny", "Tiny."), Document("copy", BOOKS[0].text)])
    text = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    train = facts.sides["train"]
    assert f"| all | {train.rows} | {facts.sides['heldout'].rows} |" in text
    for expected in (
        "license: unknown",
        "TO BE FILLED IN",
        "seed: 3",
        "characters / 4",
        "longlora x",
        "path: train.jsonl",
    ):
        assert expected in text
    assert "- left out, too short: tiny (2 tokens)" in text
    assert "- left out: copy, a copy of book0" in text
    assert all(f"| {name} | {side} |" in text for name, side in facts.side_of.items())
