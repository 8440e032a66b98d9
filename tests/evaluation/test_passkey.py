"""Prompts of exact length with the key where it should be, and documents whose own tokens stay whole."""

import pytest
from tiny import word_tokenizer

from longlora.errors import LongLoraError
from longlora.evaluation.passkey import _TASK, filler_prompts, hide_facts

tokenizer = word_tokenizer()


def encode(text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def test_filler_prompts_have_the_length_and_depth_they_say() -> None:
    prompts = filler_prompts(encode, [1], [512, 1024], [0.0, 0.5, 1.0], 2, seed=0)
    assert len(prompts) == 12
    assert len({prompt.facts[0]["key"] for prompt in prompts}) == 12
    for prompt in prompts:
        (question,), (fact,) = prompt.questions, prompt.facts
        assert len(prompt.tokens) + len(question.tokens) + len(question.answer) == fact["length"]
        assert question.position == len(prompt.tokens)
        sentence = encode(f"\nThe pass key is {fact['key']}. Remember it. {fact['key']} is the pass key.\n")
        task = 1 + len(encode(_TASK))
        assert prompt.tokens[0] == 1
        room = len(prompt.tokens) - task - len(sentence)
        at = task + round(float(fact["depth"]) * room)
        assert prompt.tokens[at : at + len(sentence)] == sentence
        assert question.answer == tuple(encode(f" {fact['key']}"))
    assert prompts[0] == filler_prompts(encode, [1], [512], [0.0], 1, seed=0)[0]
    assert prompts[0] != filler_prompts(encode, [1], [512], [0.0], 1, seed=1)[0]


def test_hidden_facts_leave_the_document_whole() -> None:
    document = list(range(3, 120)) * 40
    hidden = hide_facts(encode, document[:3000], [1500, 3000], [0.1, 0.3, 0.6], trial=0, seed=0)
    assert len(hidden.tokens) == len(hidden.scored) == 3000
    own = [token for token, counted in zip(hidden.tokens, hidden.scored, strict=True) if counted]
    assert own == document[: len(own)]
    assert len(hidden.questions) == len(hidden.facts) == 6
    for question, fact in zip(hidden.questions, hidden.facts, strict=True):
        assert question.position + len(question.tokens) + len(question.answer) == fact["length"]
        sentence = encode(f"\nThe {fact['name']} is {fact['key']}. Remember it. {fact['key']} is the {fact['name']}.\n")
        position = round(fact["depth"] * fact["length"])
        assert hidden.tokens[position : position + len(sentence)] == sentence
        assert not any(hidden.scored[position : position + len(sentence)])
        assert position < 1500, "every number is there at every length"
    assert len({fact["name"] for fact in hidden.facts}) == 3


def test_too_little_room_is_said() -> None:
    with pytest.raises(LongLoraError, match="passkey length 100 is too short"):
        filler_prompts(encode, [], [100], [0.5], 1, seed=0)
    with pytest.raises(LongLoraError, match="passkey length 200 is too short"):
        hide_facts(encode, list(range(3, 100)) * 9, [200, 400], [0.1, 0.9], 0, 0)
    with pytest.raises(LongLoraError, match="at most 4 numbers"):
        hide_facts(encode, [3] * 9000, [4000], [0.1, 0.2, 0.3, 0.4, 0.5], 0, 0)
