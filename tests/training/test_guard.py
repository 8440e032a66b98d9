"""Steps that must not reach the weights: which are left out, what is said of them, and that the run goes on right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from guard_jobs import (
    Spoil,
    assert_equal,
    bad_gradient,
    checkpoint,
    documents_of,
    infinite_loss_alone,
    logged,
    nan_loss,
    optimizer_states,
    rows_of_step,
    saved_weights,
    spoil,
    spoken,
)
from launch_cases import copied, prepared_run, trained
from rich.console import Console

from longlora.artifacts import RunFolder
from longlora.errors import ModelError
from longlora.evaluation.report.training_log import read_training
from longlora.training import trainer
from longlora.training.trainer import train

pytestmark = [pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (nan_loss, "loss is nan, in {bad}"),
        (infinite_loss_alone, "loss is inf, in {bad}"),
        (bad_gradient, "gradient norm is nan, from {all}"),
    ],
)
def test_a_bad_step_is_left_out(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, how: Spoil, reason: str
) -> None:
    """With weight decay, a rate that still rises, and the bad micro batch before a good one of the same step."""
    recipe = prepared_run(
        tmp_path, tiny_model_folder, train__save_steps=1, train__weight_decay=0.1, train__warmup_steps=4,
        train__save_total_limit=4,
    )  # fmt: skip
    rows = rows_of_step(recipe, 3)
    spoil(monkeypatch, rows[:1], how)
    (warning,) = spoken(recipe)
    named = reason.format(bad=documents_of(recipe, rows[:1]), all=documents_of(recipe, rows))
    assert warning == (
        f"WARNING: step 3 is left out: {named}; weights and optimizer stay as they were "
        "(1 of train.max_skipped_steps=3)"
    )
    assert_equal(saved_weights(recipe, 3), saved_weights(recipe, 2))
    before, after = optimizer_states(recipe, 2), optimizer_states(recipe, 3)
    assert before.keys() == after.keys()
    for index, state in before.items():
        assert_equal(after[index], state)
    assert all(tensor.isfinite().all() for tensor in trained(recipe).values())

    found = logged(recipe)
    assert [row["skipped_steps"] for row in found] == [0, 0, 1, 0]
    assert found[2]["loss"] is None
    assert all(row["loss"] > 1 for row in (found[0], found[1], found[3])), "the sum for the log is mended"
    assert (found[2]["grad_norm"] is None) == (how is not infinite_loss_alone)
    assert [row["learning_rate"] for row in found] == pytest.approx([0, 0.003 / 4, 0.003 / 2, 0.003 * 3 / 4])
    history = json.loads((checkpoint(recipe, 4) / "trainer_state.json").read_text())["log_history"]
    assert [row["loss"] for row in history] == [row["loss"] for row in found]
    assert [row.step for row in read_training(RunFolder(recipe.run_path))] == [1, 2, 4]


def test_gradients_that_are_not_clipped_are_seen_as_well(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder)
    original = trainer.training_arguments

    def unclipped(*args: Any, **options: Any) -> Any:
        arguments = original(*args, **options)
        arguments.max_grad_norm = 0
        return arguments

    monkeypatch.setattr(trainer, "training_arguments", unclipped)
    spoil(monkeypatch, rows_of_step(recipe, 2)[1:], bad_gradient)
    (warning,) = spoken(recipe)
    assert "step 2 is left out: gradient norm is nan" in warning
    assert all(tensor.isfinite().all() for tensor in trained(recipe).values())


def test_more_bad_steps_than_are_borne_stop_the_run(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a resume comes in between; and a higher limit goes on."""
    recipe = prepared_run(tmp_path, tiny_model_folder, train__max_skipped_steps=1)
    spoil(monkeypatch, [rows_of_step(recipe, 2)[0], rows_of_step(recipe, 3)[1]], nan_loss)
    last = checkpoint(recipe, 2)
    named = documents_of(recipe, rows_of_step(recipe, 3)[1:])
    with pytest.raises(ModelError) as stopped:
        train(recipe, Console(quiet=True))
    assert str(stopped.value) == (
        f"step 3: loss is nan, in {named}; it was not taken; steps left out before: 1, train.max_skipped_steps=1; "
        f"the last whole checkpoint is {last}; train without these documents or with a lower train.learning_rate "
        "(now 0.003) in another run_dir, or resume with a higher train.max_skipped_steps"
    )
    assert all(tensor.isfinite().all() for tensor in saved_weights(recipe, 2).values())
    with pytest.raises(ModelError, match="left out before: 1"):
        train(recipe, Console(quiet=True), resume=True)
    more = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_skipped_steps": 2})})
    assert "(2 of train.max_skipped_steps=2)" in spoken(more, resume=True)[0]


def test_zero_stops_at_the_first(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = prepared_run(tmp_path, tiny_model_folder, train__max_skipped_steps=0)
    spoil(monkeypatch, rows_of_step(recipe, 1), nan_loss)
    with pytest.raises(ModelError, match=r"step 1: loss is nan, .* before: 0, .* there is no whole checkpoint"):
        train(recipe, Console(quiet=True))
    assert not RunFolder(recipe.run_path).adapter.exists()


def test_a_run_resumed_after_bad_steps_is_the_uninterrupted_one(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is bad, so that the first checkpoint has no states; rows of the log are means of three steps."""
    changes = {
        "train__steps": 6, "train__save_steps": 1, "train__save_total_limit": 9, "train__logging_steps": 3,
        "train__warmup_steps": 5,
    }  # fmt: skip
    whole = prepared_run(tmp_path, tiny_model_folder, "whole", **changes)
    spoil(monkeypatch, [rows_of_step(whole, 1)[0], rows_of_step(whole, 5)[1]], nan_loss)
    train(whole, Console(quiet=True))
    assert optimizer_states(whole, 1) == {}
    counted = ("step", "loss", "grad_norm", "learning_rate", "tokens", "skipped_steps")
    wanted = [[row[name] for name in counted] for row in logged(whole)]
    assert [row[-1] for row in wanted] == [1, 1]
    for step in (1, 5):
        again = copied(whole, tmp_path / f"from {step}", keep_step=step)
        train(again, Console(quiet=True), resume=True)
        assert_equal(trained(again), trained(whole))
        assert [[row[name] for name in counted] for row in logged(again)] == wanted


def test_a_row_of_the_log_is_the_mean_of_the_steps_that_were_taken(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = prepared_run(tmp_path, tiny_model_folder, "each")
    pairs = prepared_run(tmp_path, tiny_model_folder, "pairs", train__logging_steps=2)
    spoil(monkeypatch, rows_of_step(each, 3)[1:], nan_loss)
    train(each, Console(quiet=True))
    train(pairs, Console(quiet=True))
    single = [row["loss"] for row in logged(each)]
    assert [row["loss"] for row in logged(pairs)] == pytest.approx([(single[0] + single[1]) / 2, single[3]], rel=1e-6)
    assert [row["skipped_steps"] for row in logged(pairs)] == [0, 1]
