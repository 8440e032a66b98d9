"""Prompts of exact length with the key where it should be, and documents whose own tokens stay whole."""

import re
from collections.abc import Sequence

import pytest
from tiny import word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from longlora.errors import LongLoraError
from longlora.evaluation.retrieval.passkey import (
    _TASK,
    filler_prompt,
    filler_prompts,
    hide_facts,
    landmark_prompt,
    landmark_prompts,
)
from longlora.evaluation.retrieval.prompt import Prompt, score

tokenizer = word_tokenizer()
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def encode(text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_bytes(text: str) -> list[int]:
    return list(text.encode())


def text_of(prompt: Prompt) -> str:
    return bytes(prompt.tokens).decode()


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def words_with_a_space_in_front() -> Tokenizer:
    """A tokenizer that puts a space in front of every text, as those of Llama 2 do, and merges letters to words."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.decoder = decoders.Metaspace()
    alphabet = sorted({*_TASK, *FILLER, *"0123456789 \n?WpkqRmb▁"})
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    texts = [_TASK, FILLER, "\nThe pass key is 12345. Remember it.\nWhat is the pass key?"]
    trained.train_from_iterator(texts * 3, trainer)
    return trained


def test_filler_prompts_have_the_length_and_depth_they_say() -> None:
    prompts = filler_prompts(encode, [1], [512, 1024], [0.0, 0.5, 1.0], 2, seed=0)
    assert len(prompts) == 12
    assert len({prompt.references for prompt in prompts}) == 12
    for prompt in prompts:
        (key,) = prompt.references
        assert len(prompt.tokens) + prompt.max_new_tokens == prompt.facts["length"]
        sentence = encode(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
        question = encode("\nWhat is the pass key? The pass key is")
        assert list(prompt.tokens[-len(question) :]) == question
        task = 1 + len(encode(_TASK))
        assert prompt.tokens[0] == 1
        room = len(prompt.tokens) - task - len(sentence) - len(question)
        at = task + round(float(prompt.facts["depth"]) * room)
        assert list(prompt.tokens[at : at + len(sentence)]) == sentence
        assert prompt.answer == tuple(encode(f" {key}"))


def test_a_prompt_is_made_again_from_its_facts() -> None:
    prompts = filler_prompts(encode, [1], [512, 700], [0, 0.5], 2, seed=3)
    for prompt in prompts:
        fact = prompt.facts
        assert (fact["task"], fact["name"], fact["document"]) == ("passkey", "filler", None)
        assert prompt == filler_prompt(encode, [1], fact["length"], fact["depth"], fact["trial"], fact["seed"])
    assert prompts[0] != filler_prompt(encode, [1], 512, 0.0, 0, seed=4)
    for prompt in landmark_prompts(encode, [1], [3000, 5000], 2, seed=3):
        fact = prompt.facts
        assert (fact["task"], fact["name"]) == ("passkey", "landmark")
        assert prompt == landmark_prompt(encode, [1], fact["length"], fact["trial"], fact["seed"])
        assert prompt != landmark_prompt(encode, [1], fact["length"], fact["trial"], 4)


def test_prompts_are_equal_up_to_the_shallower_key() -> None:
    prompts = filler_prompts(encode, [1], [600, 1200, 2400], [0.25, 0.5, 1.0], 1, seed=0)
    for first in prompts:
        for second in prompts:
            if first is not second:
                shallower = min(float(p.facts["depth"]) * p.facts["length"] for p in (first, second))
                assert common_prefix(first.tokens, second.tokens) >= 0.75 * shallower


def test_a_copier_is_right_and_a_guesser_wrong() -> None:
    prompts = filler_prompts(encode_bytes, [], [700], [0.0, 0.3, 1.0], 1, 0)
    for prompt in [*prompts, *landmark_prompts(encode_bytes, [], [3000], 3, 0)]:
        found = re.findall(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", text_of(prompt))
        assert len(found) == 1
        assert score(prompt.metric, f" {found[0]}. The", prompt.references) == 1
        assert score(prompt.metric, " 51234. The", prompt.references) == 0
        assert score(prompt.metric, f" 1 {found[0]}", prompt.references) == 0
    for prompt in prompts:
        filler = re.sub(r"\nThe pass key is .*\n", "", text_of(prompt)).removeprefix(_TASK)
        assert filler.split("\nWhat is")[0] in " ".join([FILLER] * 9), "it goes on behind the key where it was in front"


def test_landmark_prompts_are_those_of_the_original_code() -> None:
    prompts = landmark_prompts(encode_bytes, [], [6000], 4, seed=0)
    assert len({prompt.facts["depth"] for prompt in prompts}) == 4
    for prompt in prompts:
        task, before, sentence, after, question = text_of(prompt).split("\n")
        assert f"{task}\n" == _TASK
        endless = " ".join([FILLER] * 100)
        assert (before, after) == (endless[: len(before)], endless[: len(after)])
        # int(3.75 * 6000) // 1024 * 1024 = 21504 characters do not fit 6000 bytes: the last step that does is taken.
        assert len(before) + len(after) == 5 * 1024
        assert prompt.facts["depth"] == len(before) / 5120
        (key,) = prompt.references
        assert 1 <= int(key) <= 50000
        assert sentence == f"The pass key is {key}. Remember it. {key} is the pass key."
        assert question == "What is the pass key? The pass key is"
        assert len(prompt.tokens) + prompt.max_new_tokens <= 6000


def test_landmark_prompts_keep_their_limit() -> None:
    for length in range(5300, 5700, 40):
        (prompt,) = landmark_prompts(encode_bytes, [1], [length], 1, seed=0)
        assert length - 1024 < len(prompt.tokens) + prompt.max_new_tokens <= length


def test_landmark_filler_is_not_cut_where_it_fits() -> None:
    """With words and marks as tokens, the filler has 3.75 characters a token: 4096 * 3.75 = 15 * 1024."""

    def encode_words(text: str) -> list[int]:
        return [len(word) for word in re.findall(r"\w+|[^\w\s]|\n", text)]

    (prompt,) = landmark_prompts(encode_words, [], [4200], 1, seed=0)
    (key,) = prompt.references
    around = (
        f"{_TASK}\nThe pass key is {key}. Remember it. {key} is the pass key.\n\nWhat is the pass key? The pass key is"
    )
    # The filler has 24 words and marks in 90 characters; two words may be cut.
    assert len(prompt.tokens) == pytest.approx(15 * 1024 * 24 / 90 + len(encode_words(around)), abs=2)


def test_tokens_are_those_of_the_whole_text() -> None:
    trained = words_with_a_space_in_front()

    def encode_trained(text: str) -> list[int]:
        return trained.encode(text).ids

    for prompt in filler_prompts(encode_trained, [], [400, 500], [0.0, 1.0], 2, seed=0):
        (key,) = prompt.references
        text = trained.decode(list(prompt.tokens))
        assert f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n" in text
        assert f"{FILLER} {FILLER} {FILLER}" in text
        assert text.endswith("\nWhat is the pass key? The pass key is")
        assert " \n" not in text, "no space in front of what stands behind other text"
        assert abs(len(encode_trained(text)) - len(prompt.tokens)) <= 3


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


def test_a_number_pushed_back_by_the_one_before_says_where_it_stands() -> None:
    hidden = hide_facts(encode, list(range(3, 120)) * 40, [1500], [0.1, 0.101, 0.102], trial=0, seed=0)
    for fact in hidden.facts:
        sentence = encode(f"\nThe {fact['name']} is {fact['key']}. Remember it. {fact['key']} is the {fact['name']}.\n")
        position = round(fact["depth"] * fact["length"])
        assert hidden.tokens[position : position + len(sentence)] == sentence


def test_too_little_room_is_said() -> None:
    with pytest.raises(LongLoraError, match="passkey length 100 is too short: the prompt alone has 2[5-9]. tokens"):
        filler_prompts(encode, [], [100], [0.5], 1, seed=0)
    with pytest.raises(LongLoraError, match="passkey length 100 is too short: the prompt alone has 2[5-9]. tokens"):
        landmark_prompts(encode, [], [100], 1, seed=0)
    with pytest.raises(LongLoraError, match="passkey length 200 is too short"):
        hide_facts(encode, list(range(3, 100)) * 9, [200, 400], [0.1, 0.9], 0, 0)
    with pytest.raises(LongLoraError, match="at most 4 numbers"):
        hide_facts(encode, [3] * 9000, [4000], [0.1, 0.2, 0.3, 0.4, 0.5], 0, 0)
