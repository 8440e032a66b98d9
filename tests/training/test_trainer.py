"""Whole small runs: what is written, that it learns, that resuming is exact, and what a broken run leaves."""

import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import bear_texts, save_tiny_model
from transformers import AutoModelForCausalLM

from longlora.artifacts import RunFolder
from longlora.attention import registry
from longlora.attention.pattern import FULL
from longlora.config import Recipe, build_recipe
from longlora.data.prepare import prepare_shards
from longlora.data.shards import open_shard
from longlora.errors import LongLoraError
from longlora.model.attention import full_attention_steps
from longlora.model.build import load_config, load_for_training, load_tokenizer, tokenizer_hash
from longlora.model.merge import merge_adapter
from longlora.training import loss_model
from longlora.training.attention_schedule import moved_full_phase
from longlora.training.trainer import train

QUIET = Console(quiet=True)

# Two threads that wait for one another beside other jobs take minutes for what takes seconds.
pytestmark = pytest.mark.usefixtures("one_thread")


def make_recipe(tmp_path: Path, model: Path, run: str = "run", **train_changes: object) -> Recipe:
    texts = bear_texts(tmp_path / "texts")
    values = {
        "run_dir": str(tmp_path / run),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "context": {"context_length": 128, "rope_type": "linear"},
        "attention": {"group_size": 32, "sink_tokens": 2},
        "data": {"train": [str(texts)], "heldout": [str(texts)]},
        "train": {
            "steps": 6, "grad_accum_steps": 2, "learning_rate": 0.02, "warmup_steps": 0, "save_steps": 2,
            "save_total_limit": 2, "loss_chunk_tokens": 50, **train_changes,
        },
    }  # fmt: skip
    recipe = build_recipe(values)
    if not RunFolder(recipe.run_path).train_shard.exists():
        tokenizer = load_tokenizer(recipe.model)
        prepare_shards(recipe, tokenizer, tokenizer_hash(tokenizer), QUIET)
    return recipe


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def rows(recipe: Recipe) -> list[dict[str, float]]:
    return [json.loads(line) for line in RunFolder(recipe.run_path).metrics.read_text().splitlines()]


def test_a_run_learns_and_leaves_what_it_should(tmp_path: Path, tiny_model_folder: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder, steps=8)
    adapter = train(recipe, QUIET)
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "longlora.json", "manifest.json",
    }  # fmt: skip
    logged = rows(recipe)
    assert [row["step"] for row in logged] == list(range(1, 9))
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.5
    assert set(logged[0]) == {
        "step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "seconds", "skipped_steps",
        "unlabelled_batches",
    }  # fmt: skip
    checkpoints = sorted(path.name for path in RunFolder(recipe.run_path).checkpoints.iterdir())
    assert checkpoints == ["checkpoint-6", "checkpoint-8"]
    for path in RunFolder(recipe.run_path).checkpoints.iterdir():
        assert (path / "manifest.json").exists()
        assert not (path / "training_args.bin").exists(), "no pickled arguments"


def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path, tiny_model_folder: Path) -> None:
    whole = make_recipe(tmp_path, tiny_model_folder, "whole")
    expected = weights(train(whole, QUIET))
    stopped = make_recipe(tmp_path, tiny_model_folder, "stopped")
    train(stopped, QUIET)
    run = RunFolder(stopped.run_path)
    # As if it had been killed while it wrote its last checkpoint.
    shutil.rmtree(run.adapter)
    (run.checkpoints / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
    resumed = weights(train(stopped, QUIET, resume=True))
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
    found = rows(stopped)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    seconds = [row["seconds"] for row in found]
    assert seconds == sorted(seconds), "those of the process before count"


def test_the_last_step_has_a_row_whatever_the_distance_of_rows(tmp_path: Path, tiny_model_folder: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder, steps=3, logging_steps=2)
    train(recipe, QUIET)
    assert [row["step"] for row in rows(recipe)] == [2, 3]
    shutil.rmtree(RunFolder(recipe.run_path).adapter)
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 4})})
    train(longer, QUIET, resume=True)
    assert [row["step"] for row in rows(recipe)] == [2, 3, 4]
    every = make_recipe(tmp_path, tiny_model_folder, "every", steps=3)
    train(every, QUIET)
    assert rows(recipe)[1]["loss"] == pytest.approx(rows(every)[2]["loss"])


def with_attention(recipe: Recipe, run_dir: Path, **changes: object) -> Recipe:
    """The recipe with another attention section, in a run folder of its own with the same data."""
    shutil.copytree(RunFolder(recipe.run_path).root / "data", run_dir / "data")
    values = recipe.model_dump(mode="json")
    values["attention"].update(changes)
    return build_recipe({**values, "run_dir": str(run_dir)})


def test_the_final_phase_is_full_attention_also_after_resuming(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_recipe(tmp_path, tiny_model_folder, "plain")
    sparse = with_attention(plain, tmp_path / "sparse")
    annealed = with_attention(plain, tmp_path / "annealed", full_attention_final_fraction=0.5)
    full = with_attention(plain, tmp_path / "full", pattern="full")
    patterns = []
    attend = registry.attend

    def record(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: object, pattern: object, **options: object):
        if torch.is_grad_enabled() and type(q) is torch.Tensor:  # neither the probe nor the plan before training
            patterns.append(pattern)
        return attend(q, k, v, bounds, pattern, **options)

    expected = weights(train(annealed, QUIET))
    first, _, _, fourth = (row["loss"] for row in rows(annealed)[:4])
    train(sparse, QUIET)
    assert [row["loss"] for row in rows(sparse)][:3] == [row["loss"] for row in rows(annealed)][:3]
    assert rows(sparse)[3]["loss"] != fourth
    train(full, QUIET)
    assert rows(full)[0]["loss"] != pytest.approx(first, rel=1e-6)

    run = RunFolder(annealed.run_path)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    monkeypatch.setattr(registry, "attend", record)
    resumed = weights(train(annealed, QUIET, resume=True))
    assert patterns
    assert all(pattern == FULL for pattern in patterns), "steps 5 and 6 are in the final phase"
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())


def test_more_steps_on_resume_move_the_final_phase_and_it_is_said(tmp_path: Path, tiny_model_folder: Path) -> None:
    plain = make_recipe(tmp_path, tiny_model_folder, "plain")
    recipe = with_attention(plain, tmp_path / "annealed", full_attention_final_fraction=0.5)
    train(recipe, QUIET)
    shutil.rmtree(RunFolder(recipe.run_path).adapter)
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 8})})
    out = io.StringIO()
    train(longer, Console(file=out, width=300), resume=True)
    said = [line for line in out.getvalue().splitlines() if "train.steps was" in line]
    assert said == [
        "train.steps was 6 and is 8: the phase with full attention was to be steps 4-6 and is steps 5-8; step 4 had "
        "full attention already"
    ]
    shutil.rmtree(RunFolder(recipe.run_path).adapter)
    out = io.StringIO()
    train(longer, Console(file=out, width=300), resume=True)
    assert "train.steps was" not in out.getvalue()


@pytest.mark.parametrize(
    ("steps", "done", "expected"),
    [
        (200, 50, "steps 91-100 and is steps 181-200"),
        (200, 100, "and is steps 181-200; steps 91-100 had full attention already; steps 101-180 will be sparse again"),
        (200, 92, "steps 91-92 had full attention already; steps 93-180 will be sparse again"),
        (60, 58, "and is steps 55-60; steps 55-58 had sparse attention"),
        (60, 50, "was to be steps 91-100 and is steps 55-60"),
        (100, 95, ""),
    ],
)
def test_what_is_said_of_a_final_phase_that_moved(steps: int, done: int, expected: str) -> None:
    values = {"run_dir": "r", "model": {"name_or_path": "m"}, "context": {"context_length": 64}}
    before = build_recipe(values, ["attention.full_attention_final_fraction=0.1", "train.steps=100"])
    now = build_recipe(before.model_dump(), [f"train.steps={steps}"])
    said = moved_full_phase(before, now, done)
    assert said.endswith(expected)
    assert bool(said) == bool(expected)
    for changes in (["attention.full_attention_final_fraction=0"], ["attention.pattern=full"]):
        one, other = build_recipe(before.model_dump(), changes), build_recipe(now.model_dump(), changes)
        assert moved_full_phase(one, other, done) == ""


@pytest.mark.parametrize(
    ("steps", "fraction", "expected"),
    [(100, 0.07, 7), (100, 0.29, 29), (30, 0.1, 3), (10, 0.01, 1), (10, 0, 0), (3, 1, 3)],
)
def test_steps_of_the_final_phase_are_counted_as_written(steps: int, fraction: float, expected: int) -> None:
    values = {"run_dir": "r", "model": {"name_or_path": "m"}, "context": {"context_length": 64}}
    settings = [f"train.steps={steps}", f"attention.full_attention_final_fraction={fraction}"]
    assert full_attention_steps(build_recipe(values, settings)) == expected


def test_full_attention_in_training_keeps_documents_apart(tmp_path: Path, tiny_model_folder: Path) -> None:
    """A group as long as the row is full attention; without the document bounds it would not be equal."""
    recipe = make_recipe(tmp_path, tiny_model_folder, "base", steps=2)
    full = with_attention(recipe, tmp_path / "full", pattern="full")
    one_group = with_attention(recipe, tmp_path / "one-group", group_size=128)
    train(full, QUIET)
    train(one_group, QUIET)
    for first, second in zip(rows(full), rows(one_group), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)


def test_what_attention_does_is_said(tmp_path: Path, tiny_model_folder: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder, "base", steps=2)
    annealed = with_attention(recipe, tmp_path / "annealed", full_attention_final_fraction=0.5)
    out = io.StringIO()
    train(annealed, Console(file=out, width=200))
    said = [line for line in out.getvalue().splitlines() if line.startswith("attention in training")]
    assert said == [
        "attention in training: sparse in layers 0-1 (groups of 32, 2 sink tokens, shifted in half of the heads)",
        "attention in training: full in layers 0-1",
    ]


def test_micro_batches_and_accumulation_are_the_same_step(tmp_path: Path, tiny_model_folder: Path) -> None:
    one = make_recipe(tmp_path, tiny_model_folder, "one", steps=2, micro_batch_size=1, grad_accum_steps=4)
    other = make_recipe(tmp_path, tiny_model_folder, "other", steps=2, micro_batch_size=4, grad_accum_steps=1)
    train(one, QUIET)
    train(other, QUIET)
    # Losses and gradient norms, not weights: Adam turns the sign of a vanishing gradient into a full step.
    for first, second in zip(rows(one), rows(other), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3)


def test_checkpointing_changes_nothing(tmp_path: Path, tiny_model_folder: Path) -> None:
    with_it = make_recipe(tmp_path, tiny_model_folder, "with", steps=2)
    without = make_recipe(tmp_path, tiny_model_folder, "without", steps=2, activation_checkpointing=False)
    first, second = weights(train(with_it, QUIET)), weights(train(without, QUIET))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-5, msg=name)


def test_memory_levers_change_nothing_but_rounding(tmp_path: Path, tiny_model_folder: Path) -> None:
    plain = make_recipe(tmp_path, tiny_model_folder, "plain", steps=2, activation_checkpointing=False)
    levers = make_recipe(
        tmp_path, tiny_model_folder, "levers", steps=2, activation_checkpointing_every=2, mlp_tile_tokens=30
    )
    expected, found = weights(train(plain, QUIET)), weights(train(levers, QUIET))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    for first, second in zip(rows(plain), rows(levers), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)


def test_a_trained_table_is_held_once(tmp_path: Path, tiny_model_folder: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder, steps=1)
    out = io.StringIO()
    train(recipe, Console(file=out, width=200))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    frozen = base.num_parameters() - base.get_input_embeddings().weight.numel()
    assert f"beside {frozen:,} frozen ones" in out.getvalue()


def with_rows(recipe: Recipe, rows: str) -> Recipe:
    return recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"embedding_rows": rows})})


@pytest.mark.parametrize("tied", [True, False])
def test_occurring_embedding_rows_are_trained_resumed_saved_and_merged(tmp_path: Path, tied: bool) -> None:
    source = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    recipe = with_rows(make_recipe(tmp_path, source), "occurring")
    run = RunFolder(recipe.run_path)
    occurring = open_shard(run.train_shard, None).occurring_tokens().tolist()
    assert 10 < len(occurring) < 40
    trained = weights(train(recipe, QUIET))
    (delta,) = [tensor for name, tensor in trained.items() if "embed_tokens" in name]
    assert delta.shape == (len(occurring), 72)

    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    resumed = weights(train(recipe, QUIET, resume=True))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in trained.items())

    merge_adapter(run.adapter, run.merged)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (source, run.merged))
    old, new = before.get_input_embeddings().weight, after.get_input_embeddings().weight
    others = [row for row in range(len(old)) if row not in occurring]
    torch.testing.assert_close(new[occurring], delta)
    assert (new[occurring] - old[occurring]).abs().max() > 1e-3
    assert torch.equal(new[others], old[others])
    assert (after.get_output_embeddings().weight is new) is tied

    if not tied:  # every other row has no gradient, so the runs are the same run
        whole = make_recipe(tmp_path, source, "whole")
        train(whole, QUIET)
        for first, second in zip(rows(whole), rows(recipe), strict=True):
            assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
            assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3)


def test_running_out_of_memory_names_a_lever_and_the_run_goes_on_with_it(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder)
    expected = weights(train(make_recipe(tmp_path, tiny_model_folder, "undisturbed"), QUIET))

    def too_much(loss: torch.Tensor) -> torch.Tensor:
        return loss + torch.empty(1 << 50)

    with monkeypatch.context() as patched:
        spoil_loss(patched, 8, too_much)
        with pytest.raises(LongLoraError, match="out of memory on cpu in step 4.*planned were .* most of it.*intact"):
            train(recipe, QUIET)
    run = RunFolder(recipe.run_path)
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-2"]
    tiled = recipe.model_copy(update={"train": recipe.train.model_copy(update={"mlp_tile_tokens": 30})})
    resumed = weights(train(tiled, QUIET, resume=True))
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_running_out_of_memory_while_saving_is_not_called_a_full_disk(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder)

    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch, "save", no_memory)
    with pytest.raises(LongLoraError, match="out of memory .* Tried to allocate"):
        train(recipe, QUIET)
    assert not list(RunFolder(recipe.run_path).checkpoints.glob("checkpoint-*"))


@pytest.mark.parametrize("tile", [None, 30])
def test_nf4_weights_are_trained_on_and_merged_into_the_unquantized_model(tmp_path: Path, tile: int | None) -> None:
    """bitsandbytes has CPU kernels since 0.49: `pip install 'longlora[qlora]'` to run this."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
    source = save_tiny_model(tmp_path / "base", hidden_size=128, intermediate_size=256, **heads)
    recipe = make_recipe(tmp_path, source, steps=8, mlp_tile_tokens=tile)
    model = recipe.model.model_copy(update={"quantization": "nf4", "dtype": "bfloat16"})
    recipe = recipe.model_copy(update={"model": model})
    base, _ = load_for_training(model, load_config(model), torch.device("cpu"))
    kinds = {type(module) for module in base.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {bitsandbytes.nn.Linear4bit, torch.nn.Linear}, "all linear layers but the head"
    assert base.get_input_embeddings().weight.dtype is torch.bfloat16
    trained = weights(train(recipe, QUIET))
    assert all(tensor.abs().max() > 0 for name, tensor in trained.items()), "every LoRA B has been trained"
    logged = rows(recipe)
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.3
    run = RunFolder(recipe.run_path)
    merge_adapter(run.adapter, run.merged)
    merged = AutoModelForCausalLM.from_pretrained(run.merged)
    assert getattr(merged.config, "quantization_config", None) is None
    assert merged.dtype is torch.bfloat16


def test_training_uses_the_sparse_pattern_and_bfloat16_works(tmp_path: Path, tiny_model_folder: Path) -> None:
    sparse = make_recipe(tmp_path, tiny_model_folder, "sparse", steps=1)
    full = with_attention(sparse, tmp_path / "full", pattern="full")
    full = full.model_copy(update={"model": full.model.model_copy(update={"dtype": "bfloat16"})})
    train(sparse, QUIET)
    train(full, QUIET)
    assert rows(sparse)[0]["loss"] != pytest.approx(rows(full)[0]["loss"], rel=1e-4)
    assert all(tensor.isfinite().all() for tensor in weights(RunFolder(full.run_path).adapter).values())


def test_a_run_that_lost_only_its_adapter_is_resumed_without_another_step(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder, steps=4)
    expected = weights(train(recipe, QUIET))
    run = RunFolder(recipe.run_path)
    shutil.rmtree(run.adapter)
    resumed = weights(train(recipe, QUIET, resume=True))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())
    assert [row["step"] for row in rows(recipe)] == [1, 2, 3, 4]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again(tmp_path: Path, tiny_model_folder: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder, steps=1)
    (RunFolder(recipe.run_path).checkpoints / "checkpoint-2").mkdir(parents=True)
    train(recipe, QUIET)


def spoil_loss(
    monkeypatch: pytest.MonkeyPatch, micro_batch: int, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Put `spoil` on the loss of one micro batch, counted from 1 over the whole run."""
    original = loss_model.chunked_loss
    calls = itertools.count(1)

    def spoiled(*args: object) -> torch.Tensor:
        loss = original(*args)
        return spoil(loss) if next(calls) == micro_batch else loss

    monkeypatch.setattr(loss_model, "chunked_loss", spoiled)


def test_a_gradient_that_is_no_number_stops_the_run(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder, max_skipped_steps=0)

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: object, *upstream: torch.Tensor) -> torch.Tensor:
            return upstream[0] * float("nan")

    spoil_loss(monkeypatch, 12, Poison.apply)
    with pytest.raises(LongLoraError, match="step 6: gradient norm is nan, from"):
        train(recipe, QUIET)
    assert not RunFolder(recipe.run_path).adapter.exists()


def test_a_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder, max_skipped_steps=0)
    spoil_loss(monkeypatch, 7, lambda loss: loss * float("nan"))
    with pytest.raises(LongLoraError, match="step 4: loss is nan, .* with a lower train.learning_rate"):
        train(recipe, QUIET)
    run = RunFolder(recipe.run_path)
    assert not run.adapter.exists()
    saved = weights(run.checkpoints / "checkpoint-2")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_a_full_disk_leaves_the_last_whole_checkpoint(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder)
    expected = weights(train(make_recipe(tmp_path, tiny_model_folder, "undisturbed"), QUIET))
    save = torch.save

    def full_disk(value: object, path: object, *args: object, **kwargs: object) -> None:
        if "checkpoint-4" in str(path):
            Path(str(path)).write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file")
        save(value, path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        with pytest.raises(LongLoraError, match="checkpoint-4 cannot be written .* free space and resume"):
            train(recipe, QUIET)
    run = RunFolder(recipe.run_path)
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-2"]
    resumed = weights(train(recipe, QUIET, resume=True))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())


def test_what_is_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model_folder, steps=1)
    with pytest.raises(LongLoraError, match="no whole checkpoint"):
        train(recipe, QUIET, resume=True)
    train(recipe, QUIET)
    with pytest.raises(LongLoraError, match="already holds adapter/"):
        train(recipe, QUIET)
    with pytest.raises(LongLoraError, match="the run is finished"):
        train(recipe, QUIET, resume=True)
