"""Standard benchmarks through lm-evaluation-harness: right numbers, right cuts, no network, one line for a mistake."""

import hashlib
import json
import math
import socket
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import word_tokenizer
from transformers import LlamaForCausalLM

from longlora.attention.registry import use_s2
from longlora.errors import DataError, ModelError
from longlora.evaluation.harness.run import default_truncation, run_harness

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is the extra [bench] and is not installed")

from datasets import Dataset  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from longlora.evaluation.harness import tasks as harness_tasks  # noqa: E402
from longlora.evaluation.harness.model import cut  # noqa: E402
from longlora.evaluation.harness.tasks import libraries, load_tasks  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    {"goal": "to boil an egg", "sol1": "put it into hot water", "sol2": "put it into the freezer", "label": 0},
    {"goal": "to open a door", "sol1": "paint it", "sol2": "turn the handle", "label": 1},
    {"goal": "to see at night", "sol1": "shut your eyes", "sol2": "light a lamp and look", "label": 1},
]


@pytest.fixture(scope="module")
def few_tasks() -> TaskManager:
    """lm-eval's own PIQA, ARC, HellaSwag and LongBench: the index of all its 14,000 files takes long to read."""
    root = Path(lm_eval.__file__).parent / "tasks"
    folders = [str(root / name) for name in ("piqa", "arc", "hellaswag", "longbench")]
    return TaskManager(include_defaults=False, include_path=folders)


@pytest.fixture
def named(few_tasks: TaskManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness_tasks, "_manager", lambda with_names: few_tasks)


def choice_task(rows: Sequence[dict[str, Any]], name: str = "tiny_piqa", **changes: Any) -> dict[str, Any]:
    """Settings like those of PIQA over rows in memory."""
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(list(rows))},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
        **changes,
    }


def generation_task(rows: Sequence[dict[str, Any]], name: str = "tiny_answers", **changes: Any) -> dict[str, Any]:
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(list(rows))},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"max_gen_toks": 6, "do_sample": False, "until": []},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 2.0},
        **changes,
    }


def run(model: LlamaForCausalLM, task: Any, **changes: Any) -> Any:
    tasks = task if isinstance(task, list) else [task]
    return run_harness(model, word_tokenizer(), tasks, **{"max_length": 256, **changes})


def log_probability(model: LlamaForCausalLM, context: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        log_p = model(torch.tensor([context + answer])).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(answer) - 1)
    return sum(float(log_p[place, token]) for place, token in zip(places, answer, strict=True))


def continued(model: LlamaForCausalLM, context: list[int], count: int) -> str:
    made = model.generate(torch.tensor([context]), max_new_tokens=count, do_sample=False, pad_token_id=2)
    return word_tokenizer().decode(made[0, len(context) :], skip_special_tokens=True)


def encode(text: str) -> list[int]:
    return list(word_tokenizer()(text).input_ids)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_choices_are_scored_with_the_log_probability_of_the_answer(
    tiny_llama: LlamaForCausalLM, batch_size: int
) -> None:
    result = run(tiny_llama, choice_task(ROWS), batch_size=batch_size)
    right = 0
    for row, sample in zip(ROWS, result.samples, strict=True):
        context = encode(f"Question: {row['goal']}\nAnswer:")
        expected = [log_probability(tiny_llama, context, encode(f" {row[key]}")) for key in ("sol1", "sol2")]
        assert [answer[0] for answer in sample["answers"]] == pytest.approx(expected, abs=1e-3)
        right += max((0, 1), key=expected.__getitem__) == row["label"]
    accuracy = next(row for row in result.rows if row["metric"] == "acc")
    assert accuracy["value"] == pytest.approx(right / len(ROWS))
    assert accuracy["task"] == "tiny_piqa"
    assert (accuracy["samples"], accuracy["num_fewshot"], accuracy["version"]) == (3, 0, 1.0)
    assert accuracy["truncated"] == 0
    assert accuracy["higher_is_better"] is True
    assert {row["metric"] for row in result.rows} == {"acc", "acc_norm"}
    json.dumps([result.rows, result.samples, result.settings], allow_nan=False)


def test_only_logits_of_the_answers_are_made(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    forward = tiny_llama.lm_head.forward
    monkeypatch.setattr(tiny_llama.lm_head, "forward", lambda x: widths.append(x.shape[1]) or forward(x))
    run(tiny_llama, choice_task(ROWS))
    longest = max(len(row[key]) + 1 for row in ROWS for key in ("sol1", "sol2"))
    assert set(widths) == {longest}


def test_a_text_is_scored_token_by_token_after_the_first_one(tiny_llama: LlamaForCausalLM) -> None:
    text = "it was a dark and stormy night"
    task = generation_task(
        [{"text": text}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        generation_kwargs=None,
        metric_list=[{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    )
    (row,) = run(tiny_llama, task).rows
    nats = -log_probability(tiny_llama, [1], encode(text))
    assert row["value"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-4)
    assert row["higher_is_better"] is False


def test_a_chat_template_is_put_around_the_question(tiny_llama: LlamaForCausalLM) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [assistant]"
    task = generation_task([{"text": "who?", "answer": "me"}])
    result = run_harness(tiny_llama, tokenizer, [task], max_length=64, chat_template=True)
    expected = hashlib.sha256(b"[user] who? [assistant]").hexdigest()
    assert result.samples[0]["prompt_sha256"] == expected


@pytest.mark.parametrize("truncation", ["middle", "left"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_long_prompts_are_continued_from_their_cut_tokens(
    tiny_llama: LlamaForCausalLM, truncation: str, batch_size: int
) -> None:
    texts = ["head " * 10 + "tail " * 10, "0123456789" * 9, "short"]
    room = 64 - 6
    cuts = [
        ids if len(ids) <= room else ids[: room // 2] + ids[-(room // 2) :] if truncation == "middle" else ids[-room:]
        for ids in map(encode, texts)
    ]
    rows = [{"text": text, "answer": continued(tiny_llama, ids, 6)} for text, ids in zip(texts, cuts, strict=True)]
    result = run(tiny_llama, generation_task(rows), max_length=64, truncation=truncation, batch_size=batch_size)
    (row,) = result.rows
    assert (row["metric"], row["value"]) == ("exact_match", 1.0)
    assert row["truncated"] == 2
    assert row["truncation"] == truncation
    assert result.samples[0]["answers"] == [rows[0]["answer"]]


@pytest.mark.parametrize("truncation", ["middle", "left"])
def test_long_questions_are_scored_after_their_cut_tokens(tiny_llama: LlamaForCausalLM, truncation: Any) -> None:
    rows = [{**ROWS[0], "goal": "to find the needle " * 8}]
    result = run(tiny_llama, choice_task(rows), max_length=60, truncation=truncation)
    context = encode(f"Question: {rows[0]['goal']}\nAnswer:")
    expected = []
    for key in ("sol1", "sol2"):
        answer = encode(f" {rows[0][key]}")
        # What is read is at most max_length tokens, and the last token of an answer is not read.
        expected.append(log_probability(tiny_llama, cut(context, 61 - len(answer), truncation), answer))
    assert [answer[0] for answer in result.samples[0]["answers"]] == pytest.approx(expected, abs=1e-3)
    assert result.rows[0]["truncated"] == 1  # one prompt, though it is read for both answers


def test_the_middle_cut_keeps_equal_ends_exactly() -> None:
    tokens = list(range(10))
    assert cut(tokens, 10, "middle") == tokens
    assert cut(tokens, 6, "middle") == [0, 1, 2, 7, 8, 9]
    assert cut(tokens, 7, "middle") == [0, 1, 2, 7, 8, 9]  # as LongBench's pred.py: half of 7 from each end
    assert cut(tokens, 1, "middle") == [9]
    assert cut(tokens, 6, "left") == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("longbench_qasper", "middle"),
        ("longbench2_code", "middle"),
        ("infinitebench_passkey", "middle"),
        ("piqa", "left"),
    ],
)
def test_prompts_are_cut_where_the_benchmark_says(task: str, expected: str) -> None:
    assert default_truncation(task) == expected


def test_tasks_of_both_kinds_keep_their_own_rows_and_cuts(tiny_llama: LlamaForCausalLM) -> None:
    texts = ["x" * 100, "y" * 70]
    tasks = [
        choice_task(ROWS),
        generation_task([{"text": text, "answer": "?"} for text in texts], "longbench_tiny"),
        generation_task([{"text": texts[0], "answer": "?"}], "other"),
    ]
    result = run(tiny_llama, tasks, max_length=80)
    by_task = {row["task"]: row for row in result.rows}
    cuts = {task: row["truncated"] for task, row in by_task.items()}
    assert cuts == {"tiny_piqa": 0, "longbench_tiny": 1, "other": 1}
    assert by_task["longbench_tiny"]["truncation"] == "middle"
    assert by_task["other"]["truncation"] == "left"
    assert result.settings["tasks"] == ["tiny_piqa", "longbench_tiny", "other"]


def test_limit_takes_the_first_questions_and_examples_come_from_their_split(tiny_llama: LlamaForCausalLM) -> None:
    data = {"train": Dataset.from_list(ROWS[1:]), "test": Dataset.from_list(ROWS)}
    task = choice_task([], custom_dataset=lambda **_: data, training_split="train")
    result = run(tiny_llama, task, limit=1, num_fewshot=1)
    assert [row["samples"] for row in result.rows] == [1, 1]
    assert result.rows[0]["num_fewshot"] == 1
    assert result.rows[0]["stderr"] is None  # lm-eval says "N/A"
    again = run(tiny_llama, task, limit=1, num_fewshot=1)
    assert again.samples == result.samples


def test_lengths_that_were_not_measured_have_no_row(tiny_llama: LlamaForCausalLM) -> None:
    def results(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
        return {"4096": 0.25, "8192": -1.0, "score": math.nan}

    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("4096", "8192", "score")]
    task = generation_task([{"text": "a", "answer": "b"}], process_results=results, metric_list=metrics)
    assert {row["metric"]: row["value"] for row in run(tiny_llama, task).rows} == {"4096": 0.25, "score": None}


def test_evaluation_is_full_attention_in_evaluation_mode(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(AssertionError, match="without dropout"):
        run(tiny_llama.train(), choice_task(ROWS))
    use_s2(tiny_llama.eval(), group_size=16, sparse_in_evaluation=True)
    with pytest.raises(AssertionError, match="full attention"):
        run(tiny_llama, choice_task(ROWS))


def test_code_of_a_model_or_tokenizer_is_refused(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["own.Tokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer.name_or_path = str(tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer_config.json names code of its own \(auto_map\)"):
        run_harness(tiny_llama, tokenizer, [choice_task(ROWS)], max_length=64)
    tiny_llama.config.auto_map = {"AutoModelForCausalLM": "own.Model"}
    with pytest.raises(ModelError, match="auto_map"):
        run(tiny_llama, choice_task(ROWS))


def test_a_chat_template_that_is_missing_is_said(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(ModelError, match="has no chat template"):
        run(tiny_llama, choice_task(ROWS), chat_template=True)


def test_answers_that_leave_no_room_are_said(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="generates up to 6 tokens, which leaves no room for a prompt in 7"):
        run(tiny_llama, generation_task([{"text": "a", "answer": "b"}]), max_length=7)
    with pytest.raises(DataError, match="an answer of 22 tokens, more than the context of 20"):
        run(tiny_llama, choice_task(ROWS), max_length=20)


@pytest.mark.usefixtures("named")
def test_an_unknown_task_gets_the_names_that_are_close(tiny_llama: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match=r"task 'helaswag' is not known to .*; did you mean hellaswag\?"):
        run(tiny_llama, "helaswag")


@pytest.mark.parametrize("name", ["ruler", "ruler_vt", "niah_single_1"])
def test_ruler_is_left_to_our_own_task(tiny_llama: LlamaForCausalLM, name: str) -> None:
    with pytest.raises(DataError, match=f"task {name} is RULER.*eval.tasks"):
        run(tiny_llama, name)


@pytest.mark.usefixtures("named")
def test_a_dataset_that_is_not_there_is_named_with_remedies(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # whatever this machine has
    with pytest.raises(DataError) as raised:
        run(tiny_llama, "arc_challenge")
    message = str(raised.value)
    assert message.startswith("task arc_challenge needs dataset allenai/ai2_arc (config ARC-Challenge)")
    for remedy in ("--download", "--data arc_challenge=FILE", "cache"):
        assert remedy in message
    assert "\n" not in message


def test_nothing_is_asked_over_the_network(tiny_llama: LlamaForCausalLM) -> None:
    def fetch(**_: Any) -> None:
        urllib.request.urlopen("http://rows.example.org/piqa.jsonl", timeout=60)

    with pytest.raises(DataError, match=r"rows.example.org was asked for.*the network is off; add --download"):
        run(tiny_llama, choice_task([], custom_dataset=fetch))
    before = socket.getaddrinfo
    with libraries(download=True):
        assert socket.getaddrinfo is before
    with libraries(download=False):
        assert socket.getaddrinfo("localhost", 80)
    assert socket.getaddrinfo is before


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_named_task_reads_local_rows(tiny_llama: LlamaForCausalLM, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"piqa{suffix}"
    match suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(ROWS), encoding="utf-8")
        case ".parquet":
            Dataset.from_list(ROWS).to_parquet(path)
    result = run(tiny_llama, "piqa", data={"piqa": path})
    own = run(tiny_llama, choice_task(ROWS))
    assert [sample["answers"] for sample in result.samples] == [sample["answers"] for sample in own.samples]
    assert result.rows[0]["samples"] == 3
    assert result.settings["data"] == {"piqa": str(path)}


@pytest.mark.usefixtures("named")
def test_rows_of_hellaswag_and_arc_as_they_are_published(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    hellaswag = {
        "activity_label": "Cooking",
        "ctx_a": "A man cuts an onion.",
        "ctx_b": "he",
        "endings": ["cries.", "flies.", "rains.", "sings [title]."],
        "label": "0",
    }
    arc = {
        "question": "What is cold?",
        "choices": {"text": ["fire", "ice", "sun", "tea"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    }
    (tmp_path / "hellaswag.jsonl").write_text(json.dumps(hellaswag), encoding="utf-8")
    folder = tmp_path / "arc"
    folder.mkdir()
    (folder / "test.jsonl").write_text(json.dumps(arc), encoding="utf-8")
    (folder / "train.jsonl").write_text(json.dumps(arc) + "\n" + json.dumps(arc), encoding="utf-8")
    data = {"hellaswag": tmp_path / "hellaswag.jsonl", "arc_easy": folder}
    result = run(tiny_llama, ["hellaswag", "arc_easy"], data=data)
    assert {row["task"] for row in result.rows} == {"hellaswag", "arc_easy"}
    with_examples = run(tiny_llama, ["arc_easy"], data={"arc_easy": folder}, num_fewshot=2)
    assert with_examples.rows[0]["num_fewshot"] == 2
    with pytest.raises(DataError, match="takes 2 examples from split 'train', which .* does not have"):
        run(tiny_llama, ["arc_easy"], data={"arc_easy": folder / "test.jsonl"}, num_fewshot=2)


@pytest.mark.usefixtures("named")
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "?", "label": 0}, r"cannot use .*piqa.jsonl \(UndefinedError: 'goal' is undefined\)"),
        ({**ROWS[0], "label": -1}, r"row 1 of .*piqa.jsonl has no right answer for task piqa \(-1 of 2 choices\)"),
        ([1], "holds no rows"),
    ],
)
def test_rows_that_do_not_fit_are_said(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, row: object, expected: str
) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match=expected):
        run(tiny_llama, "piqa", data={"piqa": path})


@pytest.mark.usefixtures("named")
def test_data_that_cannot_be_read_or_belongs_to_no_task_is_said(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl does not exist"):
        run(tiny_llama, "piqa", data={"piqa": tmp_path / "gone.jsonl"})
    with pytest.raises(DataError, match=r"--data pica=...: pica is not in --tasks; did you mean piqa\?"):
        run(tiny_llama, "piqa", data={"pica": tmp_path})
    (tmp_path / "broken.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"broken.jsonl cannot be read"):
        run(tiny_llama, "piqa", data={"piqa": tmp_path / "broken.jsonl"})
    (tmp_path / "rows.csv").write_text("a,b", encoding="utf-8")
    with pytest.raises(DataError, match=r"unknown type '.csv'"):
        run(tiny_llama, "piqa", data={"piqa": tmp_path / "rows.csv"})


def test_loaded_tasks_serve_several_models(tiny_llama: LlamaForCausalLM) -> None:
    loaded = load_tasks([choice_task(ROWS)])
    first = run(tiny_llama, loaded)
    second = run(tiny_llama, loaded)
    assert first.rows == second.rows
    assert first.samples == second.samples


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"unsafe_code": True}, "runs code that the model writes"),
        ({"doc_to_image": "picture"}, "needs images or sound"),
        ({"metric_list": [{"metric": "rouge", "hf_evaluate": True}]}, "remote code is off"),
    ],
)
def test_tasks_that_run_code_or_need_pictures_are_refused(
    tiny_llama: LlamaForCausalLM, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        run(tiny_llama, choice_task(ROWS, **changes))


@pytest.mark.usefixtures("named")
def test_a_copy_of_a_dataset_repository_gives_its_own_splits(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: ARC-Easy\n  data_files: [{split: test, path: easy.jsonl}]\n"
        "- config_name: Other\n  data_files: [{split: test, path: other.jsonl}]\n---\n",
        encoding="utf-8",
    )
    row = {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    (tmp_path / "easy.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (tmp_path / "other.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row), encoding="utf-8")
    assert run(tiny_llama, "arc_easy", data={"arc_easy": tmp_path}).rows[0]["samples"] == 1
    with pytest.raises(DataError, match="has no config 'ARC-Challenge': it has ARC-Easy, Other"):
        run(tiny_llama, "arc_challenge", data={"arc_challenge": tmp_path})


@pytest.mark.usefixtures("named")
def test_a_group_takes_each_task_its_own_part_or_nothing(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    row = {"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match="is one file for several tasks"):
        run(tiny_llama, "ai2_arc", data={"ai2_arc": tmp_path / "test.jsonl"})
    with pytest.raises(DataError, match="has no config 'ARC-Challenge'"):
        run(tiny_llama, "ai2_arc", data={"ai2_arc": tmp_path})
    (tmp_path / "both.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row), encoding="utf-8")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: ARC-Easy\n  data_files: [{split: test, path: both.jsonl}]\n"
        "- config_name: ARC-Challenge\n  data_files: [{split: test, path: test.jsonl}]\n---\n",
        encoding="utf-8",
    )
    result = run(tiny_llama, "ai2_arc", data={"ai2_arc": tmp_path})
    counted = {row["task"]: row["samples"] for row in result.rows}
    assert counted == {"arc_easy": 2, "arc_challenge": 1}
