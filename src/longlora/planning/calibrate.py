"""What this machine reaches on this very model: a step of a few of its layers with random weights, timed.

Two sizes of the model are timed, and attention scores alone. The difference of the sizes is what a layer costs with its
norms, RoPE and casts; what is left is embeddings, head and loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from longlora.attention.backends import attend
from longlora.attention.pattern import WindowPattern
from longlora.config import Recipe, build_recipe
from longlora.memory.chunked_loss import chunked_loss
from longlora.model.adapters import cast_to_compute_dtype
from longlora.model.attention import apply_attention
from longlora.model.build import device_for_run
from longlora.model.head import OutputHead, hidden_states
from longlora.model.levers import apply_memory_levers
from longlora.model.trainable import make_trainable
from longlora.planning.flops import Flops, score_flops, step_flops
from longlora.planning.machines import Machine
from longlora.planning.outline import AttentionLayer, Outline, outline
from longlora.planning.rehearsal import layer_period, with_layers

_FEW, _MORE = 1, 3
_REPEATS = 2
_SHORTEST = 256


@dataclass(frozen=True)
class _Probe:
    """How much is timed: long against what starting it takes, short against a person's patience."""

    layer_flops: float
    tokens: int
    """At most."""
    bytes: int
    """Of each array that memory is timed with; more than any cache."""


# A fraction of a second on a CPU with matrix units, seconds on one without.
_PROBES = {"cpu": _Probe(3e11, 2048, 1 << 26), "cuda": _Probe(5e13, 16384, 1 << 30)}
_LEAST_SECONDS = 1e-6


def calibrate(config: PreTrainedConfig, recipe: Recipe, machine: Machine) -> Machine:
    """`machine`, which is the present one, with rates measured in a few seconds on `recipe` and its model.

    Raises:
        ModelError: the model cannot be built.
    """
    tokens = _tokens(config, recipe)
    short = _at_length(recipe, tokens)
    counts = _layer_counts(config, short)
    few, more = (outline(with_layers(config, count), short) for count in counts)
    few_seconds, more_seconds = (_step_seconds(with_layers(config, count), short, tokens) for count in counts)
    flops = [step_flops(model, short.train, tokens).by_part for model in (few, more)]
    layers = counts[1] - counts[0]
    layer_seconds = max((more_seconds - few_seconds) / layers, _LEAST_SECONDS)
    score_rate = _score_rate(_costliest(outline(config, recipe), recipe), recipe)
    short_rate = _score_rate(more.layers[0], short) if more.layers else score_rate
    per_layer = [(_inside(flops[1], part) - _inside(flops[0], part)) / layers for part in ("scores", "linear")]
    linear_seconds = max(layer_seconds - per_layer[0] / short_rate, 0.1 * layer_seconds)
    head_seconds = max(few_seconds - counts[0] * layer_seconds, _LEAST_SECONDS)
    # Measured by one process; on a CPU others take their part of its cores.
    sharing = 1 if machine.cuda else machine.processes
    shared = f", shared by {sharing} processes" if sharing > 1 else ""
    return replace(
        machine,
        linear_flops=max(per_layer[1], 1.0) / linear_seconds / sharing,
        score_flops=score_rate / sharing,
        head_flops=max(flops[0].output_head, 1.0) / head_seconds / sharing,
        bandwidth=_bandwidth() / sharing,
        basis=f"measured on {counts[0]} and {counts[1]} layers of the model at {tokens} tokens{shared}",
    )


def _layer_counts(config: PreTrainedConfig, recipe: Recipe) -> tuple[int, int]:
    """Layers of the two models: one and three, or whole periods where layers are of several kinds."""
    text: Any = config.get_text_config(decoder=True)
    if len(set(getattr(text, "layer_types", None) or ())) <= 1:
        return _FEW, _MORE
    period = layer_period(config, recipe)
    return period, 2 * period


def _inside(flops: Flops, part: str) -> float:
    if part == "scores":
        return flops.attention_scores
    return flops.attention_projections + flops.mlp + flops.lora


def _tokens(config: PreTrainedConfig, recipe: Recipe) -> int:
    """As many as make a layer's work measurable, at most the context."""
    model: Outline = outline(with_layers(config, 1), _at_length(recipe, recipe.context.context_length))
    per_token = 6 * max(model.projections_used + model.mlp_used, 1)
    probe = _PROBES[device_for_run().type]
    wanted = int(probe.layer_flops / per_token)
    return min(recipe.context.context_length, max(_SHORTEST, min(probe.tokens, wanted)))


def _at_length(recipe: Recipe, tokens: int) -> Recipe:
    """The same recipe with `tokens` tokens, one micro batch, and no layer unlike the others."""
    values = recipe.model_dump()
    values["context"] |= {"context_length": tokens, "rope_factor": None}
    values["attention"] |= {
        "group_size": recipe.attention.resolve_group_size(recipe.context.context_length),
        "group_size_ratio": None,
        "full_attention_layers": [],
    }
    # One micro batch; the levers stay, as they are part of what a layer costs.
    values["train"] |= {"micro_batch_size": 1, "grad_accum_steps": 1, "activation_checkpointing_every": 1}
    values["model"]["quantization"] = "none"
    values["adapter"]["embedding_rows"] = "all"
    return build_recipe(values)


def _step_seconds(config: PreTrainedConfig, recipe: Recipe, tokens: int) -> float:
    """Forward and backward of one micro batch."""
    device, dtype = device_for_run(), getattr(torch, recipe.model.dtype)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).to(device)
    model = make_trainable(base, recipe.adapter)
    cast_to_compute_dtype(model, dtype)
    apply_memory_levers(model, recipe)
    apply_attention(model, recipe.attention, tokens)
    model.train()
    head = OutputHead(base)
    ids = torch.randint(base.get_input_embeddings().weight.shape[0], (1, tokens), device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.model.dtype == "bfloat16"):
            hidden = hidden_states(base, ids)
            loss = chunked_loss(hidden.flatten(0, 1), ids.flatten(), head, recipe.train.loss_chunk_tokens)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return _seconds(step, device)


def _costliest(model: Outline, recipe: Recipe) -> AttentionLayer:
    return max(model.layers, key=lambda layer: score_flops(layer, recipe.context.context_length))


def _score_rate(layer: AttentionLayer, recipe: Recipe) -> float:
    """FLOP/s of attention by the pattern of `layer`, forward and backward, up to a probe's tokens or two groups."""
    device, dtype = device_for_run(), getattr(torch, recipe.model.dtype)
    own = layer.pattern.size if isinstance(layer.pattern, WindowPattern) else layer.pattern.group_size
    most = _PROBES[device.type].tokens
    tokens = min(recipe.context.context_length, max(most, 2 * min(own, most)))
    shapes = [(layer.heads, layer.width), (layer.heads, layer.width), (layer.heads, layer.value_width)]
    q, k, v = (
        torch.randn(1, heads, tokens, width, dtype=dtype, device=device).requires_grad_() for heads, width in shapes
    )

    def once() -> None:
        out = attend(q, k, v, [[0, tokens]], layer.pattern, backend=recipe.attention.backend)
        out.backward(torch.ones_like(out))

    work = score_flops(layer, tokens) * (1 + 5 / 2)
    return max(work, 1.0) / _seconds(once, device)


def _bandwidth() -> float:
    device = device_for_run()
    size = _PROBES[device.type].bytes
    a, b = (torch.zeros(size // 4, device=device) for _ in range(2))
    return 3 * size / _seconds(lambda: a.add_(b), device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The best of a few, after one to warm up."""
    seconds_of(call, device)
    return min(seconds_of(call, device) for _ in range(_REPEATS))


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with all that it began on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
