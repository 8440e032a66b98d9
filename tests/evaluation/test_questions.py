"""Questions about documents: the prompt is that of training, answers are scored by their form, the report compares."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_cases import complete_run, evaluation, prompt, save
from rich.console import Console
from tiny import word_tokenizer
from transformers import AutoTokenizer

from longlora.config import InstructConfig, build_recipe
from longlora.data.instruct import InstructReport, write_instruct_shard
from longlora.errors import DataError
from longlora.evaluation.report.write import write_report
from longlora.evaluation.retrieval.prompt import is_right, is_settled, score
from longlora.evaluation.retrieval.questions import question_prompts
from longlora.evaluation.run import evaluate

PLAIN = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token + '\n' }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def longqa_row(number: int, task: str = "fill_passage", length: int = 256) -> dict[str, Any]:
    document = f"word {number} " * 10
    return {
        "id": f"book:{length}:{number}", "document": "book", "task": task, "length": length,
        "messages": [{"role": "user", "content": f"{document}\n\nwhich number?"},
                     {"role": "assistant", "content": str(number)}],
        "document_end": len(document), "evidence": {"start": 0, "end": 4, "position": 0.25},
    }  # fmt: skip


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def settings(folder: Path, **changes: Any) -> InstructConfig:
    (folder / "t.jinja").write_text(PLAIN, encoding="utf-8")
    return InstructConfig.model_validate({"template": str(folder / "t.jinja"), **changes})


def asked(
    folder: Path, *records: object, per_length: int = 40, seed: int = 0, say: Any = lambda line: None, **changes: Any
) -> list[Any]:
    return question_prompts(
        word_tokenizer(), [write(folder / "q.jsonl", *records)], settings(folder, **changes),
        per_length=per_length, max_new_tokens=8, seed=seed, say=say,
    )  # fmt: skip


@pytest.mark.parametrize("system", [None, "be brief"])
def test_a_prompt_is_what_training_has_before_the_answer(tmp_path: Path, system: str | None) -> None:
    turns = [("user", "one?"), ("assistant", "first"), ("user", "two?"), ("assistant", "second")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (made,) = asked(tmp_path, record, system=system)
    tokenizer = word_tokenizer()
    shard = write_instruct_shard(
        tmp_path / "shard", [str(tmp_path / "q.jsonl")], tokenizer, settings=settings(tmp_path, system=system),
        context_length=200, tokenizer_hash="abc", report=InstructReport(),
    )  # fmt: skip
    assert shard.mask is not None
    flags = shard.mask.tolist()
    begins = [place for place in range(1, len(flags)) if flags[place] > flags[place - 1]]
    assert len(begins) == 2
    assert list(made.tokens) == shard.tokens[: begins[-1]].tolist()
    assert made.references == ("second",)


def test_facts_come_from_the_row_where_it_has_them(tmp_path: Path) -> None:
    rows = [longqa_row(1), longqa_row(2, task="count_mentions", length=512)]
    other = {"question": "which?", "document": "a b c", "answer": "b"}
    first, second = asked(tmp_path, *rows)
    assert (first.facts["name"], first.facts["length"], first.facts["depth"]) == ("fill_passage", 256, 0.25)
    assert (first.facts["document"], first.facts["example"], first.metric) == ("book", "book:256:1", "words")
    assert (second.metric, second.facts["length"]) == ("count", 512)
    (third,) = asked(tmp_path, other)
    assert (third.facts["name"], third.facts["depth"], third.metric) == ("question", None, "words")
    assert len(third.tokens) <= third.facts["length"] < 2 * len(third.tokens)
    (fourth,) = asked(tmp_path, {**other, "length": 12345})  # LongAlign's own, not one that was asked for
    assert fourth.facts["length"] == third.facts["length"]


def test_questions_are_drawn_by_seed_and_no_more_than_asked_for(tmp_path: Path) -> None:
    rows = [longqa_row(number) for number in range(30)] + [longqa_row(99, length=512)]
    drawn = [[prompt.references[0] for prompt in asked(tmp_path, *rows, per_length=5, seed=s)] for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(names) for names in drawn] == [6, 6, 6]
    assert drawn[0][-1] == "99"


def test_what_training_leaves_out_is_not_asked_and_counted(tmp_path: Path) -> None:
    bad, empty = longqa_row(1), longqa_row(2)
    bad["messages"][0]["content"] += word_tokenizer().eos_token
    empty["messages"][1]["content"] = " "
    said: list[str] = []
    made = asked(tmp_path, bad, empty, longqa_row(3), say=said.append)
    assert [prompt.references[0] for prompt in made] == ["3"]
    assert said == ["questions: left out 1 control tokens, 1 empty, as in training"]
    with pytest.raises(DataError, match="holds no example to ask"):
        asked(tmp_path, bad)


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "f1", "right"),
    [
        ("words", "The old river.", "old river", 1.0, True),
        ("words", "river old", "old river", 1.0, False),
        ("words", "old", "old river", 2 / 3, False),
        ("order", "3, 1, 2", "3, 1, 2", 1.0, True),
        ("order", "3, 2, 1", "3, 1, 2", 1 / 3, False),
        ("count", "There are seven.", "7", 1.0, True),
    ],
)
def test_f1_scores_and_an_exact_match_is_right(
    metric: Any, answer: str, reference: str, f1: float, right: bool
) -> None:
    assert score(metric, answer, [reference]) == pytest.approx(f1)
    assert is_right(metric, answer, [reference]) is right
    assert not is_settled(metric, answer, [reference])  # more words would change the score


def test_a_recipe_without_questions_says_where_to_name_them(tmp_path: Path, tiny_model_folder: Path) -> None:
    with pytest.raises(DataError, match=r"eval\.questions\.files"):
        evaluate(recipe(tmp_path, tiny_model_folder), Console(quiet=True))


def recipe(folder: Path, model: Path, **changes: Any) -> Any:
    template = AutoTokenizer.from_pretrained(model).chat_template
    values = {
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "context": {"context_length": 1024},
        "data": {"instruct": {} if template else {"template": settings(folder).template}},
        "eval": {"variants": ["base"], "tasks": ["questions"], "questions": {"max_new_tokens": 4, **changes}},
    }
    return build_recipe(values, [])


def test_questions_are_answered_and_scored(tmp_path: Path, tiny_model_folder: Path) -> None:
    files = [write(tmp_path / "q.jsonl", longqa_row(7), longqa_row(8, task="order_events"))]
    (path,) = evaluate(recipe(tmp_path, tiny_model_folder, files=files), Console(quiet=True))
    rows = json.loads(path.read_text(encoding="utf-8"))["retrieval"]
    assert [(row["task"], row["name"], row["references"]) for row in rows] == [
        ("questions", "fill_passage", ["7"]),
        ("questions", "order_events", ["8"]),
    ]
    for row in rows:
        form = "order" if row["name"] == "order_events" else "words"
        assert row["score"] == score(form, row["answer"], row["references"])  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["perplexity", "needle"])
def test_held_out_instructions_are_no_text_to_read(tmp_path: Path, tiny_model_folder: Path, task: str) -> None:
    made = recipe(tmp_path, tiny_model_folder)
    data = made.data.model_copy(update={"kind": "instruct"})
    made = made.model_copy(update={"data": data, "eval": made.eval.model_copy(update={"tasks": [task]})})
    with pytest.raises(DataError, match=r"eval\.perplexity\.texts"):
        evaluate(made, Console(quiet=True))


def questions(scores: dict[int, list[float]]) -> list[dict[str, Any]]:
    return [
        prompt("questions", length, 0.5, trial, name="find_sentence", document="book", score=value, correct=value == 1)
        for length, values in scores.items()
        for trial, value in enumerate(values)
    ]


def report(folder: Path, base: dict[int, list[float]], trained: dict[int, list[float]]) -> Any:
    run = complete_run(folder)
    made = {"base": base, "trained": trained}
    save(run, **{name: evaluation(name, retrieval=questions(scores)) for name, scores in made.items()})
    return run, write_report([run], run.root)


def test_the_report_compares_exact_match_and_f1_by_length(tmp_path: Path) -> None:
    base = {512: [0.0, 0.1, 0.2, 0.0, 0.1, 0.0], 1024: [0.0] * 6}
    trained = {512: [1.0, 0.9, 1.0, 0.8, 1.0, 0.7], 1024: [0.5, 0.4, 0.6, 0.5, 0.4, 0.5]}
    run, summary = report(tmp_path, base, trained)
    cells = {row.key: dict(zip(("base", "rope_only", "trained"), row.cells, strict=True)) for row in summary.table.rows}
    assert cells["questions/512/exact_match"]["trained"].text == "3/6"
    assert cells["questions/512/f1"]["trained"].value == pytest.approx(0.9)
    assert cells["questions/1024/f1"]["base"].value == 0.0
    (verdict,) = [verdict for verdict in summary.verdicts if verdict.claim.startswith("Questions")]
    assert verdict.status == "PASS"
    assert "512 tokens: difference +0.833" in verdict.numbers[0]
    text = run.report_markdown.read_text(encoding="utf-8")
    assert "Difference to base" in text
    assert "find_sentence: F1" in text


def test_a_gain_within_its_interval_is_no_gain(tmp_path: Path) -> None:
    _, summary = report(tmp_path, {512: [0.0, 1.0, 0.0, 1.0]}, {512: [1.0, 0.0, 0.1, 1.0]})
    (verdict,) = [verdict for verdict in summary.verdicts if verdict.claim.startswith("Questions")]
    assert verdict.status == "FAIL"


def test_runs_without_questions_have_no_verdict_on_them(tmp_path: Path) -> None:
    run = complete_run(tmp_path)
    assert not any(verdict.claim.startswith("Questions") for verdict in write_report([run], run.root).verdicts)


def test_a_model_that_was_not_extended_is_not_judged_as_one_that_was(tmp_path: Path) -> None:
    run = complete_run(tmp_path)
    own = {"original_context_length": 200, "context_length": 200, "covered_context_length": 200}
    found = questions({200: [0.0, 1.0]})
    save(run, **{name: evaluation(name, retrieval=found, **own) for name in ("base", "rope_only", "trained")})
    claims = [verdict.claim.split(":")[0] for verdict in write_report([run], run).verdicts]
    assert claims == ["Trained, 200 tokens", "Questions at every length"]
