"""Which code computes the pattern: one contract, three backends, and the choice between them.

In: queries, keys, values, document bounds and a pattern. Out: the output [B, T, H, D of the values].

| backend | device | what it can't do |
|---|---|---|
| `grouped` | any | - |
| `varlen` | CUDA | float32, dropout, soft-capped scores, learned sinks, head dims over 256 |
| `flex` | CUDA | dropout, head dims under 16 |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from longlora.attention.grouped import grouped_attention
from longlora.attention.pattern import Pattern, check_bounds
from longlora.errors import ModelError

Backend = Literal["auto", "grouped", "varlen", "flex"]

_log = logging.getLogger(__name__)


class Plans:
    """Index tensors of the CUDA backends, made once for a batch and used by all layers with the same pattern."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def get(self, make: Callable[..., Any], bounds_B: Sequence[Sequence[int]], *key: Any) -> Any:
        """``make(bounds_B, *key)``, from memory where it was made before."""
        if (make, key) not in self._made:
            self._made[make, key] = make(bounds_B, *key)
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
) -> Tensor:
    """Attention by `pattern` with the chosen backend; arguments and output are those of `grouped_attention`.

    Args:
        plans: what earlier layers of the same batch prepared; the bounds must be the same.

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
    _, H, T, _ = q_BHTD.shape
    for bounds in bounds_B:
        check_bounds(bounds, T)
    plans = plans or Plans()
    key = (T, H, k_BKTD.shape[1], pattern, q_BHTD.device)
    if chosen == "varlen":
        from longlora.attention.varlen import varlen_attention, varlen_plan

        return varlen_attention(q_BHTD, k_BKTD, v_BKTD, plans.get(varlen_plan, bounds_B, *key), scaling=scaling)
    from longlora.attention.flex import flex_plan, flex_s2_attention  # pulls in torch's compiler

    plan = plans.get(flex_plan, bounds_B, *key)
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
    obstacles = {
        "grouped": "",
        "varlen": _first(
            (device.type != "cuda", "needs a CUDA device"),
            (dtype not in (torch.bfloat16, torch.float16), "needs bfloat16 or float16"),
            (dropout, "has no attention dropout"),
            (softcap, "has no soft cap"),
            (learned_sinks, "has no learned sinks"),
            (head_dims is not None and max(head_dims) > 256, "takes head dims up to 256"),
        ),
        "flex": _first(
            (device.type != "cuda", "needs a CUDA device"),
            (dropout, "has no attention dropout"),
            (head_dims is not None and min(head_dims) < 16, "takes head dims from 16 on"),
        ),
    }
    if wanted != "auto":
        if obstacles[wanted]:
            short = str(dtype).removeprefix("torch.")
            raise ModelError(
                f"backend={wanted} {obstacles[wanted]}, and this is {short} on {device.type}"
                f"{', with dropout' if dropout else ''}: set the backend to grouped or auto"
            )
        return wanted
    chosen: Backend = next(name for name in ("varlen", "flex", "grouped") if not obstacles[name])  # type: ignore[assignment]
    _log_once(chosen, device.type, str(dtype).removeprefix("torch."))
    return chosen


def _first(*obstacles: tuple[bool, str]) -> str:
    return next((reason for applies, reason in obstacles if applies), "")


@cache
def _log_once(backend: str, device: str, dtype: str) -> None:
    _log.info("S2-Attn backend: %s (%s on %s)", backend, dtype, device)
