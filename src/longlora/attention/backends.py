"""Which code computes the pattern: one contract, three backends, and the choice between them.

In: queries, keys, values, document bounds and a pattern. Out: the output [B, T, H, D of the values].

| backend | device | what it can't do |
|---|---|---|
| `grouped` | any | - |
| `varlen` | NVIDIA, compute capability 8.0 | float32, dropout, soft caps, learned sinks, head dim over 256, 193-224 * |
| `flex` | NVIDIA, compute capability 8.0; ROCm | dropout, head dim under 16, over 128 * |

`*`: on cards with little shared memory.
`_obstacles` is this table, and the only place that knows it: the backends themselves check that tensors fit their plan.

UNVERIFIED ON HARDWARE: what cards can't do is read from torch's sources and issues.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from longlora.attention.grouped import grouped_attention
from longlora.attention.layout import Layout
from longlora.attention.pattern import Pattern
from longlora.errors import ModelError

Backend = Literal["auto", "grouped", "varlen", "flex"]

_log = logging.getLogger(__name__)
_probing: ContextVar[bool] = ContextVar("probing", default=False)

# torch's flash kernels demand 8.0. torch compiles with Triton from 7.0 on, but bfloat16 from 8.0 on only, and below 8.0
# FlexAttention has no tiles of its own: the common ones can need more than the 64 KiB of shared memory of a T4.
_LOWEST_CAPABILITY = (8, 0)
# Cards with 99 KiB of shared memory a block, where others have 163 or more. On them the flash kernels have no backward
# for head dims from 193 to 224 (torch's `sdp_utils.cpp`), and flex none over 128 (pytorch issues 180278 and 198224).
_SMALL_CARDS = {(8, 6), (8, 9), (12, 0), (12, 1)}


class Plans:
    """Index tensors of the CUDA backends, made once for a layout and used by all layers that have it."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def get(self, make: Callable[..., Any], *key: Any) -> Any:
        """``make(*key)``, from memory where it was made before."""
        if (make, key) not in self._made:
            self._made[make, key] = make(*key)
        return self._made[make, key]


def attend(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    bounds_B: Sequence[Sequence[int]],
    pattern: Pattern,
    *,
    backend: Backend = "auto",
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sink_logits_H: Tensor | None = None,
    plans: Plans | None = None,
    full_attention: str | None = None,
) -> Tensor:
    """Attention by `pattern` with the chosen backend; arguments and output are those of `grouped_attention`.

    Args:
        plans: what earlier layers prepared; keep one for each batch, or it grows.
        full_attention: transformers' name of the model's full attention; a flash-attn build computes `varlen` as well.

    Raises:
        ModelError: the bounds are wrong, or a backend was demanded that can't do this.
    """
    device = q_BHTD.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else q_BHTD.dtype
    chosen = choose_backend(
        backend, device, dtype,
        head_dims=(q_BHTD.shape[-1], v_BKTD.shape[-1]), dropout=dropout > 0, softcap=softcap is not None,
        learned_sinks=sink_logits_H is not None,
    )  # fmt: skip
    if chosen == "grouped":
        return grouped_attention(
            q_BHTD, k_BKTD, v_BKTD, bounds_B, pattern, scaling=scaling, dropout=dropout, softcap=softcap,
            sink_logits_H=sink_logits_H,
        )  # fmt: skip
    plans, layout = plans or Plans(), Layout.of(q_BHTD, k_BKTD, bounds_B, pattern)
    if chosen == "varlen":
        from longlora.attention.varlen import varlen_attention, varlen_plan

        plan = plans.get(varlen_plan, layout, full_attention)
        return varlen_attention(q_BHTD, k_BKTD, v_BKTD, plan, scaling=scaling)
    from longlora.attention.flex import flex_plan, flex_s2_attention  # pulls in torch's compiler

    plan = plans.get(flex_plan, layout)
    return flex_s2_attention(
        q_BHTD, k_BKTD, v_BKTD, plan, scaling=scaling, softcap=softcap, sink_logits_H=sink_logits_H
    )


def choose_backend(
    wanted: Backend,
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dims: tuple[int, int] | None = None,
    dropout: bool = False,
    softcap: bool = False,
    learned_sinks: bool = False,
) -> Backend:
    """The backend for tensors of `device` and `dtype` (that of autocast where it is on); a choice is logged once.

    Args:
        head_dims: of keys and of values, where they are known.

    Raises:
        ModelError: the backend that is `wanted` is unknown or can't do this.
    """
    if wanted not in get_args(Backend):
        raise ModelError(f"backend={wanted!r} is unknown: give one of {', '.join(get_args(Backend))}")
    capability = _capability(device)
    obstacles = _obstacles(device, capability, dtype, head_dims or (16, 16), dropout, softcap, learned_sinks)
    if wanted != "auto":
        if obstacles[wanted]:
            card = f" of compute capability {capability[0]}.{capability[1]}" if capability else ""
            raise ModelError(
                f"backend={wanted} {obstacles[wanted]}, and this is {_short(dtype)} on {device.type}{card}"
                f"{', with dropout' if dropout else ''}: set the backend to grouped or auto"
            )
        return wanted
    chosen: Backend = next(name for name in ("varlen", "flex", "grouped") if not obstacles[name])  # type: ignore[assignment]
    if not _probing.get():
        _log_once(chosen, device.type, _short(dtype))
    return chosen


def _obstacles(
    device: torch.device,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dims: tuple[int, int],
    dropout: bool,
    softcap: bool,
    learned_sinks: bool,
) -> dict[Backend, str]:
    """What keeps each backend from it, in the words of an error; empty where nothing does."""
    no_cuda = (device.type != "cuda", "needs a CUDA device")
    too_old = (capability is not None and capability < _LOWEST_CAPABILITY, "needs compute capability 8.0")
    small, widest = capability in _SMALL_CARDS, max(head_dims)
    return {
        "grouped": "",
        "varlen": _first(
            no_cuda,
            # There the causal mask is aligned to the top left, where sinks need the bottom right; windows are ignored.
            (torch.version.hip is not None, "needs an NVIDIA card, torch's kernel for ROCm has other masks"),
            too_old,
            (dtype not in (torch.bfloat16, torch.float16), "needs bfloat16 or float16"),
            (dropout, "has no attention dropout"),
            (softcap, "has no soft cap"),
            (learned_sinks, "has no learned sinks"),
            (widest > 256, f"takes head dims up to 256, not {widest}"),
            (small and 192 < widest <= 224, f"has no backward for head dim {widest} on this card"),
        ),
        "flex": _first(
            no_cuda,
            too_old,
            (dropout, "has no attention dropout"),
            (min(head_dims) < 16, f"takes head dims from 16 on, not {min(head_dims)}"),
            (small and widest > 128, f"takes head dims up to 128 on this card, not {widest}"),
        ),
    }


def _capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA compute capability; None on ROCm, which numbers its cards otherwise, and where there is no card to ask."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def _first(*obstacles: tuple[bool, str]) -> str:
    return next((reason for applies, reason in obstacles if applies), "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def unlogged() -> Iterator[None]:
    """Choose without a word: what a probe takes, in types of its own, is not what the run takes."""
    token = _probing.set(True)
    try:
        yield
    finally:
        _probing.reset(token)


@cache
def _log_once(backend: str, device: str, dtype: str) -> None:
    _log.info("S2-Attn backend: %s (%s on %s)", backend, dtype, device)
