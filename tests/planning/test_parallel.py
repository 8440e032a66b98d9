"""Plans for several devices: what each holds, computes and sends, by hand for a small model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from planning_cases import recipe, small
from transformers import PreTrainedConfig

from longlora.config import Recipe
from longlora.errors import ModelError, PlanError
from longlora.planning.communication import Transfer, waited_for
from longlora.planning.longest import longest_context
from longlora.planning.machines import Machine, gpu, this_machine, with_memory
from longlora.planning.memory import Memory, peak_memory
from longlora.planning.mesh import Mesh, mesh_of, on_one_device
from longlora.planning.outline import Block, Outline, outline
from longlora.planning.plan import Plan, plan_run, require_fits
from longlora.planning.sharding import divide
from longlora.planning.traffic import halo_traffic, ulysses_traffic

CONFIG = small(num_hidden_layers=3, tie_word_embeddings=False)
CONTEXT = 8192


def parallel(sequence: int = 1, shard: str = "none", context: int = CONTEXT, **settings: Any) -> Recipe:
    return recipe(context, **{"parallel.sequence": sequence, "parallel.shard": shard}, **settings)


def plan(devices: int, sequence: int = 1, shard: str = "none", **settings: Any) -> Plan:
    return plan_run(parallel(sequence, shard, **settings), CONFIG, gpu("a100-80g", devices))


def model(settings: Recipe | None = None, config: PreTrainedConfig = CONFIG) -> Outline:
    return outline(config, settings or parallel())


def whole_gradients() -> int:
    """Those of embeddings, and of one layer on their way."""
    made = model()
    return 4 * made.outside.trained + 8 * made.block.trained


def test_parts_of_the_model() -> None:
    made = model()
    # Projections 64x64, 64x32 twice, 64x64; MLP 3 x 64x96. LoRA of rank 8 on all four projections; two norms.
    assert made.block == Block(frozen=12_288 + 18_432, trained=8 * (128 + 96 + 96 + 128) + 128, quantizable=30_720)
    # Trained embeddings and last norm, frozen head.
    assert made.outside == Block(frozen=512 * 64, trained=512 * 64 + 64, quantizable=0)
    assert 3 * made.block.trained + made.outside.trained == made.trained
    assert 3 * made.block.frozen + made.outside.frozen == made.total - 512 * 64 - 7 * 64


def test_fsdp2_divides_everything_and_gathers_two_layers_and_the_rest() -> None:
    alone, eight = plan(1).memory, plan(8, shard="fsdp2").memory
    for name in ("frozen_weights", "frozen_copies", "trained_weights", "optimizer"):
        assert getattr(eight, name) == pytest.approx(getattr(alone, name) / 8, abs=1), name
    assert eight.saved_activations == alone.saved_activations
    assert eight.temporary == alone.temporary
    made = model()
    layer = 2 * made.block.frozen + 4 * made.block.trained
    outside = 2 * made.outside.frozen + 4 * made.outside.trained
    assert "gradients" in eight.moment
    assert eight.gathered == outside + 2 * layer + whole_gradients()


def test_on_a_cpu_the_whole_model_is_read_before_it_is_divided() -> None:
    wide = small(num_hidden_layers=24, intermediate_size=8192)
    settings = parallel(shard="fsdp2", context=256, **{"train.mlp_tile_tokens": 64})
    made = peak_memory(wide, settings, outline(wide, settings), this_machine(64))
    assert "reading" in made.moment
    assert made.trained_weights == 4 * outline(wide, settings).trained
    assert "reading" not in peak_memory(wide, settings, outline(wide, settings), gpu("l4", 64)).moment


def test_zero2_divides_gradients_and_states_and_keeps_masters() -> None:
    alone, eight = plan(1).memory, plan(8, shard="zero2").memory
    assert (eight.frozen_weights, eight.trained_weights) == (alone.frozen_weights, alone.trained_weights)
    assert eight.gradients == pytest.approx(alone.gradients / 8, abs=1)
    trained = model().trained
    assert eight.optimizer == pytest.approx((alone.optimizer + 4 * trained) / 8, abs=1)
    assert eight.gathered == whole_gradients(), "until they are summed"


def test_zero3_holds_what_fsdp2_does_and_what_it_has_not_released() -> None:
    zero, fsdp = (plan(8, shard=shard).memory for shard in ("zero3", "fsdp2"))
    assert zero.frozen_weights == fsdp.frozen_weights
    made = model()
    every = 3 * (2 * made.block.frozen + 4 * made.block.trained) + 2 * made.outside.frozen + 4 * made.outside.trained
    assert zero.gathered == every + whole_gradients(), "a small model is never released"


def test_weights_in_4_bits_are_not_divided() -> None:
    held = {"frozen": 1000.0 + 0.516 * 92_160, "copied": 0.0, "trained": 80.0, "gradients": 80.0, "saved": 0.0}
    settings = parallel(shard="fsdp2", **{"model.quantization": "nf4"})
    divide(held | {"temporary": 0.0}, "forward", settings, model(), mesh := Mesh(8, 1, "fsdp2", 8))  # type: ignore[arg-type]
    divide(held, "forward", settings, model(), mesh)  # type: ignore[arg-type]
    assert held["frozen"] == pytest.approx(1000 / 8 + 0.516 * 92_160)
    assert (held["trained"], held["gradients"]) == (10, 10)


def test_a_cut_row_costs_each_device_its_part() -> None:
    one, four = plan(4), plan(4, sequence=4)
    assert four.step.total == pytest.approx(one.step.total / 4)
    assert four.forward == one.forward, "of a whole row"
    assert (one.tokens_per_step, four.tokens_per_step) == (4 * 8 * CONTEXT, 8 * CONTEXT)
    assert four.memory.saved_activations == pytest.approx(one.memory.saved_activations / 4, rel=0.02)
    assert four.memory.frozen_weights == one.memory.frozen_weights
    assert four.memory.peak < one.memory.peak
    # Queries, keys and values of a layer with sinks in front of every group, and one group from the left.
    assert four.memory.messages == 2 * (CONTEXT // 4 + 256 + 4) * (4 * 16 + 2 * 2 * 16)


def test_a_device_plans_for_its_stretch_in_the_same_groups() -> None:
    ratio = {"attention.group_size": None, "attention.group_size_ratio": 0.125}
    for settings in (parallel(4), parallel(4, **ratio)):
        here = on_one_device(settings)
        assert here.context.context_length == CONTEXT // 4
        group = settings.attention.resolve_group_size(CONTEXT)
        assert here.attention.resolve_group_size(here.context.context_length) == group
    assert on_one_device(parallel()) == parallel()


def test_more_devices_never_take_more_memory() -> None:
    def peaks(*meshes: tuple[int, int, str]) -> list[int]:
        machine = [gpu("a100-80g", devices) for devices, _, _ in meshes]
        made = [parallel(sequence, shard) for _, sequence, shard in meshes]
        return [
            peak_memory(CONFIG, each, model(each), there).peak - there.process_bytes
            for each, there in zip(made, machine, strict=True)
        ]

    weights = peaks((2, 1, "fsdp2"), (8, 1, "fsdp2"), (64, 1, "fsdp2"))
    rows = peaks((8, 2, "fsdp2"), (8, 4, "fsdp2"), (8, 8, "fsdp2"))
    assert weights == sorted(weights, reverse=True)
    assert rows == sorted(rows, reverse=True)


def test_messages_by_hand() -> None:
    made = model()
    ddp, fsdp = plan(8), plan(8, shard="fsdp2")
    assert [each.name for each in ddp.messages] == ["gradients"]
    assert ddp.messages[0].bytes == pytest.approx(2 * 7 / 8 * 4 * made.trained)
    gradients, weights = fsdp.messages
    assert gradients.bytes == pytest.approx(8 * 7 / 8 * 4 * made.trained), "a part after each of 8 micro batches"
    layer = 2 * made.block.frozen + 4 * made.block.trained
    outside = 2 * made.outside.frozen + 4 * made.outside.trained
    assert weights.bytes == pytest.approx(8 * 7 / 8 * (2 * 3 * layer + outside))
    assert weights.seconds == pytest.approx(weights.bytes / (0.7 * 300e9))
    # On two nodes all goes through eight network cards of 25 GB/s.
    wide = plan(16, shard="fsdp2").messages[1]
    assert wide.seconds == pytest.approx(wide.bytes / (0.7 * 8 * 25e9))


@pytest.mark.parametrize("pattern", ["s2", "full"])
def test_messages_of_attention(pattern: str) -> None:
    made = plan(4, sequence=4, **{"attention.pattern": pattern})
    (across,) = [each for each in made.messages if each.name != "gradients"]
    layer = made_layer = model(parallel(**{"attention.pattern": pattern})).layers[0]
    heads = (made_layer.heads, made_layer.kv_heads)
    if pattern == "s2":
        one = halo_traffic(CONTEXT, 4, heads, 16, layer.pattern, 2)
    else:
        one = ulysses_traffic(CONTEXT, 4, heads, 16, 2)
    # Eight rows, three layers; forward twice because of checkpointing.
    assert across.bytes == 8 * 3 * (2 * one.forward + one.backward)
    assert across.overlapped is (pattern == "s2")


def test_a_halo_does_not_grow_and_what_overlaps_is_not_waited_for() -> None:
    short, long = (plan(8, sequence=8, context=context).messages[1] for context in (CONTEXT, 4 * CONTEXT))
    assert short.bytes == long.bytes > 0
    messages = (Transfer("a", 1.0, 2.0, True), Transfer("b", 1.0, 3.0, True), Transfer("c", 1.0, 0.5, False))
    assert waited_for(messages, 10.0) == 0.5
    assert waited_for(messages, 4.0) == 1.5
    assert waited_for((), 0.0) == 0


def test_the_final_phase_with_full_attention_counts_its_messages() -> None:
    sparse, full, half = (
        plan(4, sequence=4, **{"train.steps": 100, **more}).hours
        for more in (
            {},
            {"attention.pattern": "full"},
            {"attention.full_attention_final_fraction": 0.5},
        )
    )
    assert half == pytest.approx((sparse + full) / 2)


def test_meshes_and_nodes() -> None:
    made = mesh_of(parallel(16, "fsdp2"), gpu("h100-80g", 64))
    assert made == Mesh(4, 16, "fsdp2", 8)
    assert (made.devices, made.nodes, made.weight_shares, made.state_shares) == (64, 8, 64, 64)
    assert mesh_of(parallel(shard="fsdp2"), gpu("h100-80g")).shard == "none", "nobody to share with"
    assert mesh_of(parallel(4), this_machine()).devices == 4, "as many processes as share a row"
    with pytest.raises(PlanError, match=r"parallel.sequence=3 does not divide the 8 devices .* 1, 2, 4, 8, or plan"):
        mesh_of(parallel(3), gpu("h100-80g", 8))
    with pytest.raises(ModelError, match="shorter than group_size=256"):
        plan(64, sequence=64)
    with pytest.raises(ModelError, match="takes a query head for each"):
        plan(8, sequence=8, **{"attention.pattern": "full"})


def test_a_plan_for_a_mesh_goes_to_json_and_back() -> None:
    made = plan(16, sequence=4, shard="fsdp2")
    assert Plan.from_json(made.to_json()) == made
    values = json.loads(made.to_json())
    assert values["mesh"] == {"data": 4, "sequence": 4, "shard": "fsdp2", "per_node": 8}
    assert values["sums"]["bytes_sent"] == sum(each.bytes for each in made.messages)
    assert made.memory.peak == sum(made.memory.parts.values())
    assert made.host_needed == 8 * 2 * model().total


def test_processes_of_one_machine_share_its_memory() -> None:
    one, four = this_machine(), this_machine(4)
    assert four.count == 4
    assert four.memory_bytes < one.memory_bytes / 2
    assert this_machine(8, 4).count == 8
    assert this_machine(8, 4).memory_bytes == pytest.approx(four.memory_bytes, rel=0.2)


def test_what_does_not_fit_is_told_to_divide_more() -> None:
    config = small(num_hidden_layers=4, tie_word_embeddings=False)
    lean = {"train.optimizer": "adamw_8bit", "train.activation_offload": True, "train.mlp_tile_tokens": 512}
    settings = parallel(context=2**20, **lean, **{"model.quantization": "nf4"})

    def peak(changed: Recipe, machine: Machine) -> Memory:
        return peak_memory(config, changed, outline(config, changed), machine)

    machine = gpu("a100-80g", 8)
    cut = settings.model_copy(update={"parallel": settings.parallel.model_copy(update={"sequence": 4})})
    enough = with_memory(machine, 1.05 * peak(cut, machine).peak / 1e9)
    assert peak(settings, enough).peak > enough.memory_bytes
    found = longest_context(settings, config, enough)
    assert found.with_levers < 2**20 <= found.across
    assert found.parallel["parallel.sequence"] in (2, 4)
    with pytest.raises(PlanError, match=r"set .*parallel.sequence=\d.* with which \d+ tokens fit"):
        require_fits(plan_run(settings, config, enough))


def test_longest_context_on_a_mesh_fits_and_a_longer_one_does_not() -> None:
    settings = parallel(4)
    machine = with_memory(replace(gpu("a100-80g", 4), process_bytes=0), 2.0)
    found = longest_context(settings, CONFIG, machine).as_it_is

    def peak(context: int) -> int:
        there = parallel(4, context=context)
        return peak_memory(CONFIG, there, model(there), machine).peak

    assert found % (4 * 256) == 0
    assert peak(found) <= machine.memory_bytes < peak(round(1.03 * found) + 4096)
