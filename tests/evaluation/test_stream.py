"""Reading once must give exactly what reading again for every question and every window would give."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

import longlora
from longlora.evaluation.reading.stream import Question, read
from longlora.model.head import output_head


def naive_losses(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
    return F.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")


@pytest.fixture
def tokens() -> list[int]:
    return torch.randint(128, (50,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize("chunk", [1, 7, 49, 50, 64])
def test_losses_do_not_depend_on_chunks(tiny_llama: LlamaForCausalLM, tokens: list[int], chunk: int) -> None:
    reading = read(tiny_llama, output_head(tiny_llama), tokens, chunk_tokens=chunk, loss_chunk_tokens=3)
    assert reading.losses_T[0].isnan()
    torch.testing.assert_close(reading.losses_T[1:], naive_losses(tiny_llama, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [8, 50])
def test_questions_are_answered_as_if_each_were_alone(
    tiny_llama: LlamaForCausalLM, tokens: list[int], chunk: int
) -> None:
    questions = [Question(30, (5, 6), (7, 8, 9)), Question(12, (4,), (3,)), Question(50, (9, 9, 1), (2, 2))]
    reading = read(tiny_llama, output_head(tiny_llama), tokens, questions, chunk_tokens=chunk)
    torch.testing.assert_close(reading.losses_T[1:], naive_losses(tiny_llama, tokens), rtol=1e-4, atol=1e-4)
    for question, answer in zip(questions, reading.answers, strict=True):
        prompt = [*tokens[: question.position], *question.tokens]
        alone = naive_losses(tiny_llama, [*prompt, *question.answer])[-len(question.answer) :]
        assert answer.log_probability == pytest.approx(-alone.sum().item(), rel=1e-4)
        generated = tiny_llama.generate(
            torch.tensor([prompt]), max_new_tokens=len(question.answer), do_sample=False, eos_token_id=None
        )
        said = tuple(generated[0, len(prompt) :].tolist())
        assert answer.likeliest[0] == said[0]
        assert (answer.likeliest == question.answer) == (said == question.answer)


def test_questions_before_the_text_twice_and_at_one_place(tiny_llama: LlamaForCausalLM, tokens: list[int]) -> None:
    """Wherever pieces end, and whatever was asked before at the same place."""
    questions = [Question(position, (5, 6), (7,)) for position in (0, 1, 16, 16, 49, 50)]
    head = output_head(tiny_llama)
    reading = read(tiny_llama, head, tokens, [*questions, Question(16, (8,), (3, 3))], chunk_tokens=16)
    torch.testing.assert_close(reading.losses_T[1:], naive_losses(tiny_llama, tokens), rtol=1e-4, atol=1e-4)
    for question, answer in zip(questions, reading.answers, strict=False):
        alone = naive_losses(tiny_llama, [*tokens[: question.position], 5, 6, 7])[-1]
        assert answer.log_probability == pytest.approx(-alone.item(), rel=1e-4)


def test_a_question_after_the_end_is_refused(tiny_llama: LlamaForCausalLM, tokens: list[int]) -> None:
    with pytest.raises(AssertionError, match="a question at 51 of 50 tokens"):
        read(tiny_llama, output_head(tiny_llama), tokens, [Question(51, (5,), (7,))], chunk_tokens=16)


def test_a_right_answer_is_recognised(tiny_llama: LlamaForCausalLM, tokens: list[int]) -> None:
    prompt = torch.tensor([[*tokens[:20], 5]])
    said = tiny_llama.generate(prompt, max_new_tokens=3, do_sample=False, eos_token_id=None)[0, 21:].tolist()
    reading = read(tiny_llama, output_head(tiny_llama), tokens, [Question(20, (5,), tuple(said))], chunk_tokens=16)
    assert reading.answers[0].likeliest == tuple(said)


def test_sparse_models_are_refused(tiny_llama: LlamaForCausalLM, tokens: list[int]) -> None:
    head = output_head(tiny_llama)
    longlora.use_s2(tiny_llama, group_size=8, sparse_in_evaluation=True)
    with pytest.raises(AssertionError, match="full attention"):
        read(tiny_llama, head, tokens, chunk_tokens=64)
    longlora.use_s2(tiny_llama, group_size=8)
    read(tiny_llama, head, tokens, chunk_tokens=64)
    with pytest.raises(AssertionError, match="full attention"):
        read(tiny_llama.train(), head, tokens, chunk_tokens=64)
