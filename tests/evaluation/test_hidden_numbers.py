"""Which numbers are hidden where, and when an answer is settled."""

from __future__ import annotations

import pytest
from tiny import word_tokenizer

from longlora.evaluation.retrieval.passkey import hide_facts
from longlora.evaluation.retrieval.prompt import is_settled

tokenizer = word_tokenizer()


def encode(text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def test_each_document_hides_other_numbers_under_other_names() -> None:
    """At a depth stands another name in every document, and a number is hidden once."""
    found = [
        hide_facts(encode, list(range(3, 120)) * 40, [1500], [0.1, 0.6], trial, seed=0).facts for trial in range(4)
    ]
    assert [[fact["name"] for fact in facts] for facts in found] == [
        ["pass key", "phone number"], ["phone number", "house number"], ["house number", "account number"],
        ["account number", "pass key"],
    ]  # fmt: skip
    assert len({fact["key"] for facts in found for fact in facts}) == 8


@pytest.mark.parametrize(("text", "settled"), [(" is", False), (" 4", False), (" 48213", False), (" 48213.", True)])
def test_a_number_is_settled_only_when_something_follows_it(text: str, settled: bool) -> None:
    assert is_settled("first_integer", text, ["48213"]) == settled
