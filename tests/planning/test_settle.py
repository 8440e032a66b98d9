"""Before weights are loaded: a run that does not fit is refused, and ``memory: auto`` picks the cheapest levers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from planning_cases import recipe, small
from transformers import PreTrainedConfig

from longlora.config import Recipe
from longlora.errors import ModelError, PlanError
from longlora.planning import settle
from longlora.planning.levers import levers, with_levers, with_settings
from longlora.planning.longest import cheapest_levers, longest_context
from longlora.planning.machines import Machine, gpu, this_machine
from longlora.planning.memory import Memory, peak_memory
from longlora.planning.outline import outline
from longlora.planning.settle import adopt_levers, settle_memory

CONFIG = small(num_hidden_layers=4, intermediate_size=400)
CONTEXT = 16384


_MADE: dict[str, Memory] = {}


def rehearsed(chosen: Recipe, config: PreTrainedConfig, machine: Machine) -> Memory:
    """`settle._peak`, remembered, because each takes a second."""
    assert config is CONFIG
    key = with_settings(chosen, {"memory": "check", "train.steps": 1}).model_dump_json()
    if key not in _MADE:
        _MADE[key] = peak_memory(config, chosen, outline(config, chosen), machine)
    return _MADE[key]


@pytest.fixture(autouse=True)
def _remember(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "_peak", rehearsed)


def peak(chosen: Recipe) -> int:
    return rehearsed(chosen, CONFIG, this_machine()).peak


def machine(size: int) -> Machine:
    return replace(this_machine(), memory_bytes=size)


def auto(**settings: Any) -> Recipe:
    return with_settings(recipe(CONTEXT, **settings), {"memory": "auto"})


def test_a_run_that_does_not_fit_is_refused_unless_told_otherwise() -> None:
    chosen = recipe(CONTEXT, **{"train.activation_checkpointing": False})
    needed = peak(chosen)
    assert settle_memory(chosen, CONFIG, machine(needed)).recipe == chosen
    with pytest.raises(PlanError, match=rf"{CONTEXT} needs .* GB and .* has .*set train.*memory=unchecked") as caught:
        settle_memory(chosen, CONFIG, machine(needed - 1))
    assert "\n" not in str(caught.value)
    unchecked = with_settings(chosen, {"memory": "unchecked"})
    settled = settle_memory(unchecked, CONFIG, machine(0))
    assert (settled.recipe, settled.memory, settled.line) == (unchecked, None, "")


def test_auto_picks_no_more_than_it_takes() -> None:
    bare = recipe(CONTEXT, **{"train.activation_checkpointing": False})
    plenty = settle_memory(auto(), CONFIG, machine(peak(bare)))
    assert plenty.recipe == bare, "nothing, not even the checkpointing that is on by default"
    assert "picked no lever" in plenty.line
    sizes = {}
    for settings in (
        {"train.activation_checkpointing_every": 4},
        {"train.activation_checkpointing_every": 1},
        {"train.activation_checkpointing_every": 1, "train.mlp_tile_tokens": 2048},
    ):
        wanted = with_settings(bare, {"train.activation_checkpointing": True} | settings)
        settled = settle_memory(auto(), CONFIG, machine(peak(wanted)))
        assert settled.recipe == wanted
        assert settled.memory is not None
        assert settled.memory.peak == peak(wanted)
        assert all(f"{key}={value}" in settled.line for key, value in settings.items() if value != 1)
        sizes[str(settings)] = settled.memory.peak
    assert len(set(sizes.values())) == 3
    with pytest.raises(PlanError, match="needs .* GB and"):
        settle_memory(auto(), CONFIG, machine(this_machine().process_bytes))


def test_auto_drops_a_lever_that_a_later_one_made_needless() -> None:
    chosen = auto(**{"train.loss_chunk_tokens": 1024})
    wanted = with_settings(chosen, {"memory": "check", "train.activation_checkpointing": True})
    settled = settle_memory(chosen, CONFIG, machine(peak(wanted)))
    assert settled.recipe == wanted, "chunks of 256 come first in the list, and bring nothing here"


def test_full_fine_tuning_has_no_lever_for_frozen_weights() -> None:
    keys = [
        {key for lever in levers(recipe(**{"adapter.method": method}), cuda=True) for key in lever.settings}
        for method in ("lora", "full")
    ]
    assert keys[0] - keys[1] == {"model.quantization", "adapter.embedding_rows"}
    assert "train.optimizer" in keys[1]
    fit = longest_context(recipe(**{"adapter.method": "full"}), CONFIG, gpu("l4"))
    assert fit.with_levers >= fit.as_it_is > 0


def test_a_resumed_run_keeps_what_was_picked() -> None:
    picked = settle_memory(auto(), CONFIG, machine(peak(recipe(CONTEXT)))).recipe
    again = with_settings(auto(), {"train.steps": 5})
    adopted = adopt_levers(again, picked)
    assert adopted == with_settings(picked, {"train.steps": 5})
    assert adopt_levers(recipe(), picked) == recipe()


def test_a_model_that_cannot_be_planned_is_trained_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def unplanned(*_: object) -> None:
        raise ModelError("no such thing")

    monkeypatch.setattr(settle, "_peak", unplanned)
    settled = settle_memory(recipe(), CONFIG, machine(1))
    assert settled.memory is None
    assert "not planned: no such thing" in settled.line


def test_a_lever_that_another_stands_on_stays() -> None:
    """Activations can be offloaded only where they are checkpointed."""
    chosen = recipe(CONTEXT, **{"train.activation_checkpointing": False})
    pulled = cheapest_levers(chosen, gpu("l4"), lambda tried: tried.train.activation_offload)
    settled = with_levers(chosen, pulled).train
    assert (settled.activation_offload, settled.activation_checkpointing) == (True, True)


def test_main_memory_that_is_too_small_is_what_is_said() -> None:
    chosen = recipe(CONTEXT, **{"train.activation_offload": True})
    memory = rehearsed(chosen, CONFIG, this_machine())
    assert memory.offloaded > 0
    short = replace(gpu("l4"), host_bytes=memory.offloaded - 1)
    with pytest.raises(
        PlanError, match=r"keeps .* GB of activations in main memory, .* train.activation_offload=false"
    ):
        settle_memory(chosen, CONFIG, short)


def test_more_layers_to_a_checkpoint_than_there_are_offload_nothing() -> None:
    settings = {"train.activation_offload": True, "train.activation_checkpointing_every": 8}
    assert rehearsed(recipe(CONTEXT, **settings), CONFIG, this_machine()).offloaded == 0
