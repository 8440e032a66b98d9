"""What one device keeps of weights, gradients and states that are divided among all, and what it holds besides.

Read in the sources of torch 2.13 (FSDP2) and DeepSpeed 0.19.8:

- FSDP2 gathers a decoder layer before it is used. Forward, the flat buffer that a layer arrived in is kept until the
  next one has arrived (`comm_ctx.all_gather_state`); backward, the next layer is fetched while one is at work: two
  layers at a time. What is in no layer is gathered once and stays (the root is not resharded after forward), and so
  do its gradients until the end of the backward pass. A layer's gradients are there once more on their way.
- ZeRO-3 fetches module by module, and releases what is not used again within `max_reuse_distance`, so that up to
  `max_live_parameters` stay; both are 10^9 unless they are set. Weights that are stored in float32 are their own
  masters.
- ZeRO-2 keeps all weights; a float32 master copy of those that a device updates; its part of the gradients; and
  buckets in which gradients are summed. The gradient of embeddings is whole until it is (ZeRO-3 as well).
- Weights that bitsandbytes keeps as integers are left out of what FSDP2 divides (accelerate).

UNVERIFIED ON HARDWARE: processes on a CPU were measured (`benchmarks/bench_plan.py`), GPUs were not.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from longlora.attention.pattern import FULL, S2Pattern, WindowPattern
from longlora.attention.ulysses import deal_heads
from longlora.config import Recipe
from longlora.planning.ledger import Bytes, Phase
from longlora.planning.machines import Machine
from longlora.planning.mesh import Mesh, on_one_device
from longlora.planning.outline import AttentionLayer, Block, Outline

NF4_BYTES = 0.5 + 0.016
"""Of a weight, with the scales of blocks of 64, themselves in 8 bits (QLoRA, section 3)."""
_FLOAT = 4
_LAYERS_AT_A_TIME = 2
_LIVE_PARAMETERS = 10**9
# Buffers of NCCL for one group of processes: an assumption. Gloo's are small.
_NCCL_BYTES = 400 * 2**20


def width_of(recipe: Recipe) -> int:
    """Bytes of a frozen weight and of an activation."""
    return 2 if recipe.model.dtype == "bfloat16" else _FLOAT


def divide(held: Bytes, phase: Phase, recipe: Recipe, model: Outline, mesh: Mesh) -> float:
    """Leave in `held`, that of a device alone, what it keeps as one of `mesh`; returns what it gathers besides."""
    if mesh.devices == 1:
        return 0.0
    if mesh.shard == "none":
        held["gradients"] += _FLOAT * model.trained  # once more, in the buckets of data parallel training
        return 0.0
    held["gradients"] /= mesh.state_shares
    if mesh.shard == "zero2":
        return _whole_gradients(phase, model)
    whole = NF4_BYTES * model.quantizable if recipe.model.quantization != "none" else 0.0
    held["frozen"] = whole + (held["frozen"] - whole) / mesh.weight_shares
    held["copied"] /= mesh.weight_shares
    held["trained"] /= mesh.weight_shares
    return _gathered_weights(phase, recipe, model, mesh) + _whole_gradients(phase, model)


def master_bytes(model: Outline, mesh: Mesh) -> int:
    """The copy of the trained weights that ZeRO-2 updates."""
    return _FLOAT * model.trained // mesh.devices if mesh.shard == "zero2" else 0


def message_bytes(recipe: Recipe, model: Outline, mesh: Mesh, config: PreTrainedConfig) -> int:
    """Buffers beside the tensors of a process alone: buckets of gradients, and copies for attention across devices."""
    buckets = 0
    if mesh.shard in ("zero2", "zero3"):
        # "auto" in transformers: hidden size squared; two of them where messages overlap with the backward pass.
        hidden = int(config.get_text_config(decoder=True).hidden_size)
        buckets = 2 * _FLOAT * min(hidden**2, model.trained)
    if mesh.sequence == 1:
        return buckets
    layers = [*model.layers]
    if recipe.attention.full_attention_final_fraction:
        layers += [AttentionLayer(each.heads, each.kv_heads, each.width, each.value_width, FULL) for each in layers]
    return buckets + max((_copies(layer, recipe, mesh) for layer in layers), default=0)


def library_bytes(mesh: Mesh, machine: Machine) -> int:
    """What the library of messages holds: for the group of all processes, and for that of a row."""
    groups = (mesh.devices > 1) + (1 < mesh.sequence < mesh.devices)
    return groups * _NCCL_BYTES if machine.cuda else 0


def weight_bytes(block: Block, recipe: Recipe) -> float:
    """Of a part of the model as it travels; 4-bit weights stay where they are."""
    quantized = block.quantizable if recipe.model.quantization != "none" else 0
    return (block.frozen - quantized) * width_of(recipe) + _FLOAT * block.trained


def _gathered_weights(phase: Phase, recipe: Recipe, model: Outline, mesh: Mesh) -> float:
    block, outside = (weight_bytes(each, recipe) for each in (model.block, model.outside))
    at_a_time = 1 if phase == "loss" else _LAYERS_AT_A_TIME
    gathered = outside + at_a_time * block
    if mesh.shard == "zero3":
        gathered = max(gathered, min(len(model.layers) * block + outside, _LIVE_PARAMETERS * width_of(recipe)))
    return gathered


def _whole_gradients(phase: Phase, model: Outline) -> float:
    if phase != "backward":
        return 0.0
    return float(_FLOAT * (model.outside.trained + 2 * model.block.trained))


def _copies(layer: AttentionLayer, recipe: Recipe, mesh: Mesh) -> int:
    """Copies of queries, keys and values of one layer that attention across devices makes.

    Halo: with sink tokens every group gets a copy of them in front, so all are copied; without, the halo alone, which
    is at most a group. Ulysses: all are there a second time, by heads, and the output too.
    """
    tokens = on_one_device(recipe).context.context_length
    width = width_of(recipe) * recipe.train.micro_batch_size
    if layer.pattern == FULL:
        places = sum(deal_heads(layer.heads, layer.kv_heads, mesh.sequence).places)
        return width * tokens * mesh.sequence * places * (layer.width + layer.value_width)
    keys = layer.kv_heads * (layer.width + layer.value_width)
    front = _front(layer.pattern)
    copied = tokens if isinstance(layer.pattern, S2Pattern) and layer.pattern.sink_tokens else 0
    return width * (copied + front) * (layer.heads * layer.width + keys)


def _front(pattern: S2Pattern | WindowPattern) -> int:
    """Tokens at most that a stretch needs of others."""
    return pattern.size if isinstance(pattern, WindowPattern) else pattern.group_size + pattern.sink_tokens
