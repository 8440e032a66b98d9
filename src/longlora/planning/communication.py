"""Messages of a training step: bytes that a device sends, and the seconds they take at the rates of the links.

Counted for the device that sends most, for one optimizer step:

- gradients of what is trained, in float32: all-reduced once (plain data parallel), or each device gets its part of the
  sum, after every micro batch (ZeRO-2, ZeRO-3, FSDP2); after ZeRO-2's update the weights are gathered;
- weights, where they are divided: gathered in the forward and in the backward pass of every micro batch;
- halo and all-to-all of every attention layer where rows are cut: in the forward pass, again where a checkpointed layer
  is computed again, and in the backward pass.

A collective of n devices is taken to send (n - 1) / n of the whole, twice for an all-reduce, at the rate of the slowest
link: to other nodes all devices of a node send together. Messages start in no time. Gradients, gathered weights and
halos travel while something is computed, and count as far as they take longer than layers and scores; all-to-all is
waited for. These are assumptions: no machine with several GPUs was at hand.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from longlora.attention.pattern import FULL
from longlora.config import Recipe
from longlora.planning.machines import Links, Machine
from longlora.planning.mesh import Mesh
from longlora.planning.outline import AttentionLayer, Outline
from longlora.planning.sharding import weight_bytes, width_of
from longlora.planning.traffic import LayerTraffic, halo_traffic, ulysses_traffic

_FLOAT = 4


@dataclass(frozen=True)
class Transfer:
    """Messages of one kind in an optimizer step."""

    name: str
    bytes: float
    """Sent by the device that sends most."""
    seconds: float
    overlapped: bool
    """Whether they travel while something is computed."""


def transfers(recipe: Recipe, model: Outline, mesh: Mesh, machine: Machine) -> tuple[Transfer, ...]:
    """All messages of a step; none where there is one device."""
    if mesh.devices == 1:
        return ()
    micro = recipe.train.grad_accum_steps
    made = [_gradients(model, mesh, machine.links, micro)]
    if mesh.weight_shares > 1:
        whole = len(model.layers) * weight_bytes(model.block, recipe) * 2 + weight_bytes(model.outside, recipe)
        size = micro * whole * _share(mesh.devices)
        made.append(Transfer("weights, gathered", size, size / _collective_rate(mesh.devices, machine.links), True))
    elif mesh.shard == "zero2":
        size = _FLOAT * model.trained * _share(mesh.devices)
        made.append(Transfer("weights, updated", size, size / _collective_rate(mesh.devices, machine.links), False))
    if mesh.sequence > 1:
        made += _attention(recipe, model, mesh, machine.links)
    return tuple(made)


def waited_for(messages: tuple[Transfer, ...], computing: float) -> float:
    """Seconds of a step in which messages travel and nothing is computed.

    Args:
        computing: seconds of the step during which messages can travel.
    """
    alone = sum(each.seconds for each in messages if not each.overlapped)
    beside = sum(each.seconds for each in messages if each.overlapped)
    return alone + max(0.0, beside - computing)


def _gradients(model: Outline, mesh: Mesh, links: Links, micro: int) -> Transfer:
    times = 2 if mesh.shard == "none" else micro
    size = times * _FLOAT * model.trained * _share(mesh.devices)
    return Transfer("gradients", size, size / _collective_rate(mesh.devices, links), True)


def _attention(recipe: Recipe, model: Outline, mesh: Mesh, links: Links) -> list[Transfer]:
    """Halo of sparse layers and windows; all-to-all of those with full attention."""
    train = recipe.train
    rows = train.micro_batch_size * train.grad_accum_steps
    again = 1 / train.activation_checkpointing_every if train.activation_checkpointing else 0.0
    sizes = {"halo": 0.0, "all-to-all": 0.0}
    for layer, count in Counter(model.layers).items():
        way = "all-to-all" if layer.pattern == FULL else "halo"
        one = layer_traffic(layer, recipe.context.context_length, mesh.sequence, width_of(recipe))
        sizes[way] += count * rows * ((1 + again) * one.forward + one.backward)
    return [
        Transfer(way, size, size / _peer_rate(mesh.sequence, links, all_to_all=way == "all-to-all"), way == "halo")
        for way, size in sizes.items()
        if size
    ]


@lru_cache(maxsize=64)
def layer_traffic(layer: AttentionLayer, tokens: int, ranks: int, width: int) -> LayerTraffic:
    """Bytes for one row in one layer: halo by its pattern, or all-to-all for full attention.

    Raises:
        ModelError: a stretch is shorter than a group or a window.
    """
    heads = (layer.heads, layer.kv_heads)
    head_dim = (layer.width + layer.value_width) // 2
    if layer.pattern == FULL:
        return ulysses_traffic(tokens, ranks, heads, head_dim, width)
    return halo_traffic(tokens, ranks, heads, head_dim, layer.pattern, width)


def _share(devices: int) -> float:
    return (devices - 1) / devices


def _collective_rate(devices: int, links: Links) -> float:
    """Bytes/s of each device in a ring through all of them, which leaves a node over all its ways out at once."""
    if devices <= links.devices:
        return links.within
    return min(links.within, links.between * links.devices)


def _peer_rate(ranks: int, links: Links, *, all_to_all: bool) -> float:
    """Bytes/s of the device with the slowest way to its peers in a row."""
    if ranks <= links.devices:
        return links.within
    if not all_to_all:
        return links.between
    outside = (ranks - links.devices) / (ranks - 1)
    return min(links.between / outside, links.within)
