"""Tuning on instructions: whole small runs within the model's own context, validation, and weights of examples."""

import io
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import save_tiny_model, word_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from longlora.artifacts import RunFolder
from longlora.config import Recipe, build_recipe
from longlora.data.packing import PackedDataset
from longlora.data.prepare import prepare_shards
from longlora.data.shards import open_shard
from longlora.errors import DataError, ModelError, RunFolderError
from longlora.evaluation.report.training_log import read_training
from longlora.evaluation.report.write import write_report
from longlora.evaluation.run import evaluate
from longlora.inference.load import load
from longlora.memory.chunked_loss import chunked_loss
from longlora.model.build import load_tokenizer, tokenizer_hash
from longlora.model.merge import merge_adapter
from longlora.model.rope import rescale_for
from longlora.training.trainer import train

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=128)


def make_recipe(
    tmp_path: Path, model: Path, run: str = "run", instruct: object = None, pattern: str = "s2", **train_changes: object
) -> Recipe:
    source = tmp_path / "a.jsonl"
    records = [
        {"question": f"which {number}?", "document": "a story. " * (number + 1), "answer": "it is " * (number + 1)}
        for number in range(12)
    ]
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    recipe = build_recipe({
        "run_dir": str(tmp_path / run),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "context": {"context_length": 96},
        "attention": {"group_size": 16, "sink_tokens": 2, "pattern": pattern},
        "data": {
            "kind": "instruct", "train": [str(source)], "heldout": [str(source)],
            "instruct": {"template": "llama2", **(instruct or {})},
        },
        "train": {
            "steps": 4, "grad_accum_steps": 2, "learning_rate": 0.02, "warmup_steps": 0, "save_steps": 2,
            "loss_chunk_tokens": 13, "validation_steps": 2, "validation_rows": 3, **train_changes,
        },
    })  # fmt: skip
    tokenizer = load_tokenizer(recipe.model)
    prepare_shards(recipe, tokenizer, tokenizer_hash(tokenizer), QUIET)
    return recipe


def lines(recipe: Recipe) -> list[dict[str, float]]:
    return [json.loads(line) for line in RunFolder(recipe.run_path).metrics.read_text().splitlines()]


def validated(recipe: Recipe) -> dict[float, float]:
    return {line["step"]: line["validation_loss"] for line in lines(recipe) if "validation_loss" in line}


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_run_within_the_models_context_leaves_rope_and_carries_its_template(tmp_path: Path, model: Path) -> None:
    recipe = make_recipe(tmp_path, model, steps=8)
    adapter = train(recipe, QUIET)
    found = validated(recipe)
    assert list(found) == [0, 2, 4, 6, 8]
    assert found[8] < found[0] - 0.3
    run = RunFolder(recipe.run_path)
    assert [row.step for row in read_training(run)] == list(range(1, 9)), "readers of the losses see no validation"
    merge_adapter(adapter, run.merged)
    before, after = AutoConfig.from_pretrained(model), AutoConfig.from_pretrained(run.merged)
    assert (after.rope_parameters, after.max_position_embeddings) == (before.rope_parameters, 128)
    template = open_shard(run.train_shard, None).chat_template
    assert template
    for folder in (adapter, run.merged):
        assert AutoTokenizer.from_pretrained(folder).chat_template == template
    # What validation says is the merged model's own loss on the answers of the held-out rows.
    merged = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
    dataset = PackedDataset(open_shard(run.heldout_shard, None), 96)
    total = count = 0.0
    for index in range(3):
        row = dataset[index]
        starts = [*torch.nonzero(row["position_ids"] == 0).flatten().tolist(), len(row["labels"])]
        for start, stop in itertools.pairwise(starts):  # each example by itself
            ids, labels = row["input_ids"][start:stop], row["labels"][start:stop]
            losses = torch.nn.functional.cross_entropy(
                merged(ids[None]).logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum"
            )
            total, count = total + losses.item(), count + int((labels[1:] != -100).sum())
    assert total / count == pytest.approx(found[8], rel=1e-3)


def test_full_fine_tuning_leaves_a_model_that_asks_in_its_template_and_is_measured(tmp_path: Path, model: Path) -> None:
    recipe = make_recipe(tmp_path, model, steps=8, learning_rate=0.003)
    full = recipe.adapter.model_copy(update={"method": "full"})
    questions = recipe.eval.questions.model_copy(update={"max_new_tokens": 3})
    measured = {"tasks": ["questions"], "variants": ["base", "trained"], "questions": questions}
    recipe = recipe.model_copy(update={"adapter": full, "eval": recipe.eval.model_copy(update=measured)})
    folder = train(recipe, QUIET)
    run = RunFolder(recipe.run_path)
    assert folder == run.merged
    assert validated(recipe)[8] < validated(recipe)[0] - 0.1
    template = open_shard(run.train_shard, None).chat_template
    _, tokenizer = load(str(run.root))
    assert tokenizer.chat_template == template
    for path in evaluate(recipe, QUIET):
        rows = json.loads(path.read_text(encoding="utf-8"))["retrieval"]
        assert {row["task"] for row in rows} == {"questions"}
        assert len(rows) == 12
    assert "Questions at every length" in {verdict.claim.split(":")[0] for verdict in write_report([run], run).verdicts}


def test_nf4_weights_are_tuned_on_instructions(tmp_path: Path) -> None:
    """QLoRA on a CPU; the merged model is not quantized and carries the template."""
    pytest.importorskip("bitsandbytes")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}
    source = save_tiny_model(tmp_path / "base", hidden_size=128, intermediate_size=256, **heads)
    recipe = make_recipe(tmp_path, source, steps=8)
    quantized = recipe.model.model_copy(update={"quantization": "nf4", "dtype": "bfloat16"})
    recipe = recipe.model_copy(update={"model": quantized})
    adapter = train(recipe, QUIET)
    assert validated(recipe)[8] < validated(recipe)[0] - 0.3
    run = RunFolder(recipe.run_path)
    merge_adapter(adapter, run.merged)
    merged = AutoModelForCausalLM.from_pretrained(run.merged)
    assert getattr(merged.config, "quantization_config", None) is None
    assert AutoTokenizer.from_pretrained(run.merged).chat_template == open_shard(run.train_shard, None).chat_template


def test_validation_changes_nothing_also_over_a_resume(tmp_path: Path, model: Path) -> None:
    without = make_recipe(tmp_path, model, "without", validation_steps=None)
    with_it = make_recipe(tmp_path, model, "with")
    expected = weights(train(without, QUIET))
    assert same(expected, weights(train(with_it, QUIET)))
    assert not validated(without)
    whole = validated(with_it)
    run = RunFolder(with_it.run_path)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "checkpoint-4")
    assert same(expected, weights(train(with_it, QUIET, resume=True)))
    assert validated(with_it) == whole
    assert [line["step"] for line in lines(with_it) if "validation_loss" in line] == [0, 2, 4]


def test_validation_without_held_out_data_is_refused(tmp_path: Path, model: Path) -> None:
    recipe = make_recipe(tmp_path, model)
    shutil.rmtree(RunFolder(recipe.run_path).heldout_shard)
    with pytest.raises(DataError, match=r"train\.validation_steps=2 measures held-out data, and there is none"):
        train(recipe, QUIET)


def test_examples_weigh_the_same_however_the_step_is_cut(tmp_path: Path, model: Path) -> None:
    """One step over all rows: cut into micro batches of one or not, and the first loss is the mean over examples."""
    rows = len(
        PackedDataset(open_shard(RunFolder(make_recipe(tmp_path, model, "count").run_path).train_shard, None), 96)
    )
    settings = {"instruct": {"loss_weighting": "examples"}, "steps": 1, "validation_rows": 99, "pattern": "full"}
    one = make_recipe(tmp_path, model, "one", micro_batch_size=rows, grad_accum_steps=1, **settings)
    cut = make_recipe(tmp_path, model, "cut", micro_batch_size=1, grad_accum_steps=rows, **settings)
    even = make_recipe(tmp_path, model, "even", micro_batch_size=rows, grad_accum_steps=1, steps=1, pattern="full")
    found = {recipe.run_dir: weights(train(recipe, QUIET)) for recipe in (one, cut, even)}
    for name, tensor in found[one.run_dir].items():
        torch.testing.assert_close(tensor, found[cut.run_dir][name], rtol=1e-3, atol=1e-4)
    losses = {recipe.run_dir: read_training(RunFolder(recipe.run_path))[0].loss for recipe in (one, cut, even)}
    assert losses[one.run_dir] == pytest.approx(losses[cut.run_dir], rel=1e-5)
    assert losses[one.run_dir] == pytest.approx(validated(one)[0], rel=1e-5)
    assert abs(losses[one.run_dir] - losses[even.run_dir]) > 1e-3
    assert validated(one)[0] != pytest.approx(validated(even)[0], rel=1e-4)


def test_weights_multiply_losses_and_gradients() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 11)
    hidden, labels, weight = torch.randn(7, 5), torch.randint(11, (7,)), torch.rand(7)
    labels[2] = -100
    grads = []
    for direct in (True, False):
        h = hidden.clone().requires_grad_()
        head.zero_grad()
        if direct:
            loss = (torch.nn.functional.cross_entropy(head(h), labels, reduction="none") * weight).sum()
        else:
            loss = chunked_loss(h, labels, head, 3, weight)
        loss.backward()
        grads.append([loss.detach(), h.grad, head.weight.grad.clone(), head.bias.grad.clone()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_positions_that_predict_nothing_get_no_logits(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longlora.training import loss_model

    seen = []

    def spy(hidden: torch.Tensor, labels: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append((len(labels), int((labels != -100).sum())))
        return chunked_loss(hidden, labels, *rest)

    monkeypatch.setattr(loss_model, "chunked_loss", spy)
    train(make_recipe(tmp_path, model, steps=2), QUIET)
    assert any(rows == counted for rows, counted in seen)
    assert all(rows == counted or 2 * counted >= rows for rows, counted in seen)


def test_contexts_beyond_the_models_own_rescale_rope(tmp_path: Path, model: Path) -> None:
    recipe = make_recipe(tmp_path, model)
    config = AutoConfig.from_pretrained(model)
    longer = recipe.model_copy(update={"context": recipe.context.model_copy(update={"context_length": 256})})
    assert rescale_for(longer, config)[1].after["factor"] == 2
    same_config, change = rescale_for(recipe, config)
    assert change.before == change.after == same_config.rope_parameters
    assert (change.original_context_length, change.context_length) == (128, 128)
    stretched = recipe.model_copy(update={"context": recipe.context.model_copy(update={"rope_factor": 2.0})})
    with pytest.raises(ModelError, match=r"so RoPE stays as it is; set context\.rope_factor=null"):
        rescale_for(stretched, config)
    text = recipe.model_copy(update={"data": recipe.data.model_copy(update={"kind": "text"})})
    with pytest.raises(ModelError, match="is not longer than the model's 128 tokens"):
        rescale_for(text, config)


def test_a_shard_of_the_other_kind_is_refused(tmp_path: Path, model: Path) -> None:
    recipe = make_recipe(tmp_path, model)
    text = recipe.model_copy(update={
        "data": recipe.data.model_copy(update={"kind": "text"}),
        "context": recipe.context.model_copy(update={"context_length": 256}),
    })  # fmt: skip
    with pytest.raises(DataError, match=r"was prepared with data\.kind=instruct, the recipe says text"):
        train(text, QUIET)


def test_prepare_says_what_was_shortened(tmp_path: Path, model: Path) -> None:
    recipe = make_recipe(tmp_path, model)
    printed = io.StringIO()
    tokenizer = word_tokenizer()
    prepare_shards(recipe, tokenizer, tokenizer_hash(tokenizer), Console(file=printed, width=400))
    line = printed.getvalue().splitlines()[0]
    assert line.startswith("train: ")
    assert "of them to be learned" in line
    assert "shortened the documents of" in line
    assert "longest 96" in line


def test_the_trainer_never_sees_a_cut_example(tmp_path: Path, model: Path) -> None:
    recipe = make_recipe(tmp_path, model)
    shard = open_shard(RunFolder(recipe.run_path).train_shard, None)
    dataset = PackedDataset(shard, 96)
    spans = [span for row in dataset.sequences for span in row.spans]
    assert sorted(span.document for span in spans) == list(range(len(shard)))
    assert all(span.start == 0 and span.stop == shard.lengths[span.document] for span in spans)


def test_instructions_shortened_for_another_context_are_refused(tmp_path: Path, model: Path) -> None:
    recipe = make_recipe(tmp_path, model)
    assert open_shard(RunFolder(recipe.run_path).train_shard, None).context_length == 96
    longer = recipe.model_copy(update={"context": recipe.context.model_copy(update={"context_length": 112})})
    with pytest.raises(DataError, match="prepared with context.context_length=96, the recipe says 112: run `longlora"):
        train(longer, QUIET)


def test_examples_drawn_with_another_seed_are_refused(tmp_path: Path, model: Path) -> None:
    recipe = make_recipe(tmp_path, model, instruct={"weights": [0.5]})
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 1})})
    with pytest.raises(RunFolderError, match=r"train.seed=1: examples were drawn .* with seed 0 .*: prepare again"):
        train(other, QUIET, prepared=True)
    whole = make_recipe(tmp_path, model, run="whole", instruct={"weights": [2]})
    other = whole.model_copy(update={"train": whole.train.model_copy(update={"seed": 1, "steps": 1})})
    assert train(other, QUIET, prepared=True).exists()
