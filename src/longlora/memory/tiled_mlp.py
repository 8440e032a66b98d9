"""The MLPs of a model in tiles of tokens, so that the intermediate activations of the whole sequence never exist.

N tokens of all rows together, n of one tile, C hidden size. What an MLP computes between its layers is several times
wider than the residual stream: 131,072 tokens of Llama 3 8B in 16 bits are 3.8 GB, four times over. Here the forward
pass keeps the input alone, and the backward pass computes one tile again and differentiates it, then the next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longlora.errors import ModelError

_MLP_NAMES = ("mlp", "feed_forward", "ffn", "feedforward", "ff", "block_sparse_moe", "moe")
_PROBE_TOKENS = 8
_PROBE_TILE = 3


def tile_mlps(model: PreTrainedModel, tile_tokens: int, *, probe: bool = True) -> int:
    """Compute the MLP of each decoder layer in tiles of `tile_tokens` from now on; returns how many there are.

    Names and weights stay as they are: only the `forward` of each MLP instance is replaced. Call it inside autocast
    where the model is trained in mixed precision, because every MLP is tried out first, unless `probe` is false.

    Raises:
        ModelError: an MLP is a mixture of experts, or does not treat each token by itself.
    """
    mlps = _mlps(model)
    inputs = _probe_inputs(model, list(mlps.values())) if probe else None
    for name, mlp in mlps.items():
        reason = _experts(mlp) or (inputs is not None and _why_not(mlp, inputs.get(mlp))) or None
        if reason:
            raise ModelError(
                f"train.mlp_tile_tokens={tile_tokens}: {name} ({type(mlp).__name__}) {reason}; leave it out"
            )
    for mlp in mlps.values():
        module: Any = mlp
        # Bound methods, so that a copy of the model computes with its own weights; on the instance, so that hooks,
        # PEFT's names and the saved keys stay what they are.
        module.untiled_forward, module.tile_tokens = module.forward, tile_tokens
        module.forward = MethodType(_tiled_forward, module)
    return len(mlps)


def _mlps(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The MLP of each decoder layer, by name."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    stacks = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not stacks:
        raise ModelError(f"train.mlp_tile_tokens: {type(model).__name__} has no list of {count} layers; leave it out")
    stack, layers = stacks[0]
    found = {}
    for index, layer in enumerate(layers):
        names = [name for name in _MLP_NAMES if isinstance(getattr(layer, name, None), nn.Module)]
        if len(names) != 1:
            raise ModelError(
                f"train.mlp_tile_tokens: {stack}.{index} ({type(layer).__name__}) has no MLP module of its own; "
                "leave it out"
            )
        found[f"{stack}.{index}.{names[0]}"] = getattr(layer, names[0])
    return found


@torch.no_grad()
def _probe_inputs(model: PreTrainedModel, mlps: list[nn.Module]) -> dict[nn.Module, tuple[tuple[Any, ...], Any]]:
    """What each MLP is called with in a forward pass over a few tokens: arguments and keyword arguments."""
    seen: dict[nn.Module, tuple[tuple[Any, ...], Any]] = {}
    hooks = [
        mlp.register_forward_pre_hook(lambda m, args, kwargs: seen.update({m: (args, kwargs)}), with_kwargs=True)
        for mlp in mlps
    ]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(_PROBE_TOKENS, device=model.device) * 7919 % vocabulary)[None]
    was_training = model.training
    model.eval()
    try:
        model.base_model(input_ids=tokens, use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return seen


def _experts(mlp: nn.Module) -> str | None:
    names = [type(module).__name__.lower() for module in mlp.modules()]
    # Dense MLPs of such architectures are called SomeMoeMLP.
    if any("moe" in n and not n.endswith("mlp") for n in names) or any(hasattr(m, "experts") for m in mlp.modules()):
        return "is a mixture of experts, whose router counts the tokens it is given together"
    return None


@torch.no_grad()
def _why_not(mlp: nn.Module, called_with: tuple[tuple[Any, ...], Any] | None) -> str | None:
    """Why `mlp` cannot be computed in tiles, or None. It is tried with dropout off."""
    if called_with is None:
        return "is not called in a forward pass"
    args, kwargs = called_with
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].dim() != 3:
        return "is called with more than hidden states [batch, tokens, channels]"
    was_training = mlp.training
    mlp.eval()
    try:
        whole = mlp(args[0])
        if not isinstance(whole, Tensor) or whole.shape != args[0].shape:
            return "does not give one tensor of the shape of its input"
        tiles = torch.cat([mlp(tile) for tile in args[0].split(_PROBE_TILE, dim=1)], dim=1)
    finally:
        mlp.train(was_training)
    tolerance = 1e-4 if whole.dtype in (torch.float32, torch.float64) else 2e-2
    if not torch.allclose(tiles, whole, rtol=0, atol=tolerance * whole.abs().max().item()):
        return "does not treat each token by itself"
    return None


def _tiled_forward(mlp: Any, hidden_BTC: Tensor) -> Tensor:
    hidden_1NC = hidden_BTC.flatten(0, -2)[None]
    forward, tile_tokens = mlp.untiled_forward, mlp.tile_tokens
    if hidden_1NC.shape[1] <= tile_tokens:
        return forward(hidden_BTC)  # type: ignore[no-any-return]
    if not torch.is_grad_enabled():
        return _in_tiles(hidden_1NC, forward, tile_tokens).view(hidden_BTC.shape)
    parameters = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    keep = _Kept()
    hidden_1NC = _Keep.apply(hidden_1NC, keep)  # type: ignore[no-untyped-call]
    output = _TiledMlp.apply(hidden_1NC, keep, forward, tile_tokens, *parameters)  # type: ignore[no-untyped-call]
    return output.view(hidden_BTC.shape)  # type: ignore[no-any-return]


def _in_tiles(hidden_1NC: Tensor, forward: Callable[[Tensor], Tensor], tile_tokens: int) -> Tensor:
    output: Tensor | None = None
    for start in range(0, hidden_1NC.shape[1], tile_tokens):
        part = slice(start, start + tile_tokens)
        tile = forward(hidden_1NC[:, part])
        if output is None:  # its data type is known only now
            output = tile.new_empty(hidden_1NC.shape)
        output[:, part] = tile
    assert output is not None
    return output


class _Kept:
    """Where the backward pass of the MLP finds its input."""

    node: Any = None


class _Keep(torch.autograd.Function):
    """Identity that saves its input, before the MLP is computed.

    Under activation checkpointing the layer is computed again up to the last tensor that was saved. Saved by the MLP's
    own node, that would be after the MLP, which would be computed three times instead of twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden_1NC: Tensor, keep: _Kept) -> Tensor:
        ctx.save_for_backward(hidden_1NC)
        keep.node = ctx
        return hidden_1NC.view_as(hidden_1NC)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None]:
        return grad_outputs[0], None


class _TiledMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_1NC: Tensor,
        keep: _Kept,
        forward: Callable[[Tensor], Tensor],
        tile_tokens: int,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.keep, ctx.mlp, ctx.tile_tokens, ctx.parameters = keep, forward, tile_tokens, parameters
        ctx.precision = _precision(hidden_1NC.device.type)
        ctx.random = _random_state(hidden_1NC.device)
        # No cache: a weight cast here, without a gradient, must not be found by a later cast that needs one.
        with ctx.precision():
            return _in_tiles(hidden_1NC, forward, tile_tokens)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (hidden_1NC,) = ctx.keep.node.saved_tensors
        needed = [bool(wanted) for wanted in ctx.needs_input_grad[4:]]
        parameters = [p for p, wanted in zip(ctx.parameters, needed, strict=True) if wanted]
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        hidden_grad_1NC = torch.empty_like(hidden_1NC) if ctx.needs_input_grad[0] else None
        with _replayed(ctx.random, hidden_1NC.device):
            for start in range(0, hidden_1NC.shape[1], ctx.tile_tokens):
                part = slice(start, start + ctx.tile_tokens)
                tile = hidden_1NC[:, part].detach().requires_grad_(hidden_grad_1NC is not None)
                with torch.enable_grad(), ctx.precision():
                    output = ctx.mlp(tile)
                wanted = [*([tile] if hidden_grad_1NC is not None else []), *parameters]
                grads = list(torch.autograd.grad(output, wanted, grad_outputs[0][:, part], allow_unused=True))
                if hidden_grad_1NC is not None:
                    hidden_grad_1NC[:, part] = grads.pop(0)
                for total, grad in zip(sums, grads, strict=True):
                    if grad is not None:
                        total += grad
        remaining = iter(sums)
        parameter_grads = [next(remaining) if wanted else None for wanted in needed]
        return hidden_grad_1NC, None, None, None, *parameter_grads


def _precision(device_type: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """The autocast that is on now, to be entered again in the backward pass."""
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _replayed(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """The random numbers of the forward pass once more, for dropout."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
