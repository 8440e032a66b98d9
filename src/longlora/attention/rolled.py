"""The paper's Algorithm 1, for comparison only: it leaks the future."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longlora.attention.pattern import shifted_heads
from longlora.errors import ModelError


def rolled_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, group_size: int, scaling: float | None = None
) -> Tensor:
    """S2-Attn by rolling the second half of the heads, as in the paper's Algorithm 1: the ``wraparound`` mode.

    THIS LEAKS. After the roll the last group of the shifted heads holds the last half group followed by the first
    half group, under a mask that is causal in the rolled order: the first half group sees the end of the sequence.
    It is here to measure what the leak does; train with `grouped_attention`.

    Args:
        q_BHTD: queries [B, H, T, D]; k_BKTD, v_BKTD: keys and values [B, K, T, D], repeated to H heads here.
        group_size: tokens in a group; even and a divisor of T.

    Returns:
        Output [B, T, H, D].

    Raises:
        ModelError: T is not a multiple of `group_size`.
    """
    B, H, T, _ = q_BHTD.shape
    if T % group_size:
        raise ModelError(
            f"wraparound: {T} tokens are not a multiple of group_size={group_size}; "
            "the paper's Algorithm 1 needs that, turn wraparound off for other lengths"
        )
    repeat = H // k_BKTD.shape[1]
    half = group_size // 2
    border = H - shifted_heads(H)

    def shift(x_BHTD: Tensor, by: int) -> Tensor:
        return torch.cat([x_BHTD[:, :border], x_BHTD[:, border:].roll(by, dims=2)], dim=1)

    def group(x_BHTD: Tensor) -> Tensor:
        x_BNHSD = shift(x_BHTD, -half).unflatten(2, (T // group_size, group_size)).transpose(1, 2)
        return x_BNHSD.reshape(-1, H, group_size, x_BHTD.shape[-1])

    k_BHTD, v_BHTD = k_BKTD.repeat_interleave(repeat, 1), v_BKTD.repeat_interleave(repeat, 1)
    out = F.scaled_dot_product_attention(group(q_BHTD), group(k_BHTD), group(v_BHTD), is_causal=True, scale=scaling)
    out_BHTD = out.unflatten(0, (B, T // group_size)).transpose(1, 2).reshape(B, H, T, -1)
    return shift(out_BHTD, half).transpose(1, 2)
