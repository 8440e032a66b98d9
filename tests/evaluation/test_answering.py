"""Prompts that share what they begin with, and prompts side by side: all as each alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from cache_cases import MODELS, model_of, random_tokens
from transformers import LlamaForCausalLM, PreTrainedModel

import longlora
from longlora.evaluation.reading import order
from longlora.evaluation.reading.answering import Answered, PromptReader
from longlora.evaluation.retrieval.prompt import Prompt, is_settled, score
from longlora.model.head import output_head

pytestmark = pytest.mark.usefixtures("one_thread")


def decode(tokens: Sequence[int]) -> str:
    return "".join(f"<{token}>" for token in tokens)


def reader_of(model: PreTrainedModel, **settings: Any) -> PromptReader:
    stop_ids = settings.pop("stop_ids", ())
    return PromptReader(model, output_head(model), decode, stop_ids, **({"chunk_tokens": 16} | settings))


def generated(model: PreTrainedModel, tokens: Sequence[int], count: int) -> tuple[int, ...]:
    said = model.generate(
        torch.tensor([tokens]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return tuple(said[0, len(tokens) :].tolist())


def log_probability(model: PreTrainedModel, prompt: Prompt) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt.tokens, *prompt.answer]])).logits[0].double()
    places = range(len(prompt.tokens) - 1, len(prompt.tokens) + len(prompt.answer) - 1)
    return sum(logits[place].log_softmax(-1)[token].item() for place, token in zip(places, prompt.answer, strict=True))


def expected(model: PreTrainedModel, prompt: Prompt, stop_ids: Sequence[int] = ()) -> Answered:
    """From transformers alone, without any cache of ours."""
    likely = log_probability(model, prompt) if prompt.answer else None
    if not prompt.max_new_tokens:
        correct = generated(model, prompt.tokens, len(prompt.answer)) == prompt.answer
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt.tokens, *prompt.answer]])).logits[0]
        text = decode(logits[len(prompt.tokens) - 1 : -1].argmax(-1).tolist())
        return Answered(text, float(correct), correct, likely)
    said: list[int] = []
    for token in generated(model, prompt.tokens, prompt.max_new_tokens):
        if token in stop_ids or is_settled(prompt.metric, decode(said), prompt.references):
            break
        said.append(token)
    value = score(prompt.metric, decode(said), prompt.references)
    return Answered(decode(said), value, value == 1.0, likely)


def check(model: PreTrainedModel, prompts: Sequence[Prompt], reader: PromptReader) -> None:
    check_against([expected(model, prompt) for prompt in prompts], prompts, reader)


def check_against(right: Sequence[Answered], prompts: Sequence[Prompt], reader: PromptReader) -> None:
    answers = dict(reader.answers(prompts))
    assert sorted(answers) == list(range(len(prompts)))
    for index, wanted in enumerate(right):
        made = answers[index]
        assert (made.text, made.score, made.correct) == (wanted.text, wanted.score, wanted.correct)
        if wanted.log_probability is None:
            assert made.log_probability is None
        else:
            assert made.log_probability == pytest.approx(wanted.log_probability, rel=1e-4)


@cache
def tree_of(name: str) -> tuple[list[Prompt], int, list[Answered]]:
    """Prompts, a token that ends answers, and what transformers says to the prompts.

    They branch off a trunk at several places; one is the beginning of others, one is there twice, one is one token.
    Answers are wrong, right, right at first, or missing; some are generated, of which some are settled early.
    """
    model = model_of(name)
    trunk = random_tokens(40, 1)
    places = ((5, 3), (17, 19), (17, 2), (31, 8), (39, 1))
    texts = [(*trunk[:at], *random_tokens(length, 100 + at)) for at, length in places]
    texts += [trunk, trunk[:20], trunk, trunk[:1], random_tokens(23, 7), random_tokens(22, 8)]
    prompts = []
    for place, tokens in enumerate(texts):
        said = generated(model, tokens, 5)
        half = (*said[:2], (said[2] + 1) % 128, *said[3:])
        answer = (said, half, random_tokens(3, place), ())[place % 4]
        references = (decode(said[1:2]),) if place % 3 == 0 else ("none",)
        prompts.append(Prompt(tokens, references, "all", answer, 6))
        if answer and place % 2 == 0:
            prompts.append(Prompt(tokens, references, "all", answer))
    stop = generated(model, texts[1], 4)[3]
    return prompts, stop, [expected(model, prompt, [stop]) for prompt in prompts]


def nodes(prompts: Sequence[Prompt]) -> int:
    return len({prompt.tokens[:length] for prompt in prompts for length in range(1, len(prompt.tokens) + 1)})


@pytest.mark.parametrize(("name", "chunk"), [*((name, 7) for name in MODELS), ("llama", 1), ("llama", 64)])
def test_answers_with_shared_beginnings_are_those_of_each_prompt_alone(name: str, chunk: int) -> None:
    prompts, stop, right = tree_of(name)
    reader = reader_of(model_of(name), chunk_tokens=chunk, stop_ids=[stop])
    check_against(right, prompts, reader)
    assert reader.work.tokens_read == nodes(prompts) == sum(step.fresh for step in reader.order(prompts))
    assert reader.work.tokens_reused == sum(len(prompt.tokens) for prompt in prompts) - nodes(prompts)


@pytest.mark.parametrize(("name", "batch"), [*((name, 400) for name in MODELS), ("llama", 90)])
def test_answers_side_by_side_are_those_of_each_prompt_alone(
    name: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one to 40 tokens in one batch, whether that is wise or not."""
    monkeypatch.setattr(order, "_PASS_TOKENS", 10_000)
    prompts, stop, right = tree_of(name)
    reader = reader_of(model_of(name), batch_tokens=batch, stop_ids=[stop])
    widths = [{len(prompts[index].tokens) for index in step.indices} for step in reader.order(prompts)]
    assert max(map(len, widths)) > (3 if batch == 400 else 1)
    check_against(right, prompts, reader)


@pytest.mark.parametrize("seed", range(3))
def test_every_node_of_a_random_tree_is_read_once(tiny_llama: LlamaForCausalLM, seed: int) -> None:
    tokens = torch.randint(3, 5, (40, 12), generator=torch.Generator().manual_seed(seed)).tolist()
    prompts = [Prompt(tuple(row[: 1 + place % 12]), (), "all", (9,)) for place, row in enumerate(tokens)]
    reader = reader_of(tiny_llama, chunk_tokens=3)
    assert len(list(reader.answers(prompts))) == 40
    assert reader.work.tokens_read == nodes(prompts)


def test_right_answers_are_not_generated_again(tiny_llama: LlamaForCausalLM) -> None:
    passes: list[int] = []
    tiny_llama.base_model.register_forward_pre_hook(
        lambda module, arguments, named: passes.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    tokens = random_tokens(20, 3)
    said = generated(tiny_llama, tokens, 6)
    reader = reader_of(tiny_llama, chunk_tokens=64)
    for answer, new, seen in (
        (said, 6, [20, 5]),
        (said[:4], 6, [20, 3, 1, 1]),
        ((said[0], said[1] + 1, *said[2:]), 3, [20, 5, 1]),
        ((), 3, [20, 1, 1]),
        (said[:1], 0, [20]),
    ):
        passes.clear()
        list(reader.answers([Prompt(tokens, ("none",), "all", tuple(answer), new)]))
        assert passes == seen
    assert reader.work.tokens_generated == 6 + 6 + 3 + 3


def test_strangers_go_side_by_side_and_kin_share() -> None:
    reader = order.Order(chunk_tokens=512, batch_tokens=4096, even_tokens=1000.0)
    strangers = [Prompt(random_tokens(500 + seed, seed), (), "all", (1,), 8) for seed in range(10)]
    trunk = random_tokens(900, 99)
    kin = [Prompt((*trunk[:at], *random_tokens(5, at)), (), "all", (1,)) for at in range(700, 900, 20)]
    steps = reader.steps([*kin, *strangers])
    assert sorted(index for step in steps for index in step.indices) == list(range(20))
    together = [step for step in steps if len(step.indices) > 1]
    assert {index for step in together for index in step.indices} == set(range(10, 20))
    assert all(step.fresh <= 4096 for step in together)
    assert sum(step.fresh for step in steps if len(step.indices) == 1) == nodes(kin)
    one_by_one = order.Order(512, 1, 1000.0).steps(strangers)
    assert sum(step.cost for step in together) < sum(step.cost for step in one_by_one) * 0.7
    short, long = order.Order(512, 1, 1000.0).steps(
        [Prompt(trunk[:400], (), "all", (1,)), Prompt(trunk, (), "all", (1,))]
    )
    assert long.fresh == 500
    assert 1.25 * short.cost < long.cost, "later tokens attend to more"


def test_there_may_be_nothing_to_ask_and_one_token_is_enough(tiny_llama: LlamaForCausalLM) -> None:
    reader = reader_of(tiny_llama, batch_tokens=100)
    assert list(reader.answers([])) == []
    check(tiny_llama, [Prompt((5,), ("none",), "any", (), 3)], reader)
    check(tiny_llama, [Prompt((token,), ("none",), "any", (token,), 3) for token in (5, 6)], reader)


def test_weights_of_two_dtypes_are_read(tiny_llama: LlamaForCausalLM) -> None:
    model = tiny_llama.bfloat16()
    model.model.norm.float()
    prompts = [Prompt(random_tokens(20 + seed, seed), ("none",), "all", (4, 5), 3) for seed in range(3)]
    one_by_one, together = (dict(reader_of(model, batch_tokens=size).answers(prompts)) for size in (1, 100))
    for index, answer in one_by_one.items():
        assert answer.log_probability == pytest.approx(together[index].log_probability, rel=0.05)


def test_what_is_not_full_attention_is_refused(tiny_llama: LlamaForCausalLM) -> None:
    head = output_head(tiny_llama)
    longlora.use_s2(tiny_llama, group_size=8, sparse_in_evaluation=True)
    with pytest.raises(AssertionError, match="full attention"):
        PromptReader(tiny_llama, head, decode, (), chunk_tokens=8)
    longlora.use_s2(tiny_llama, group_size=8)
    reader = PromptReader(tiny_llama, head, decode, (), chunk_tokens=8, batch_tokens=100)
    check(tiny_llama, [Prompt(random_tokens(20 + seed, seed), ("none",), "all", (4,), 3) for seed in range(3)], reader)
    with pytest.raises(AssertionError, match="full attention"):
        PromptReader(tiny_llama.train(), head, decode, (), chunk_tokens=8)
