"""Full attention of new tokens behind a KV cache on the CPU: no mask, no copies of keys for the heads that share them.

torch aligns its causal flag at the first query and the first key; behind a cache it has to be at the last ones. So
transformers makes a mask of all pairs, with which torch's kernel computes every score, also those that are thrown away.
Here two calls do the same: one over the cache, where nothing is hidden, and one over the new tokens, causal. Each
returns the logarithm of its sum of exponentials, by which the two are put together, exactly but for rounding.

B batch, T new tokens, S tokens with the cache, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from longlora.attention.layers import text_decoder

CACHED_ATTENTION = "longlora_cached"
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@contextlib.contextmanager
def cached_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside it `model` reads long texts in chunks as described; only sdpa on a CPU is replaced."""
    decoder = text_decoder(model)
    if decoder.device.type != "cpu" or decoder.config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(CACHED_ATTENTION, _attention)
    AttentionMaskInterface.register(CACHED_ATTENTION, _mask)
    decoder.set_attn_implementation(CACHED_ATTENTION)
    try:
        yield
    finally:
        decoder.set_attn_implementation("sdpa")


def _mask(
    *args: Any, mask_function: Any = causal_mask_function, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """No mask where all is plainly causal: no padding, no window, no packed documents."""
    if attention_mask is None and mask_function is causal_mask_function:
        return None
    return sdpa_mask(*args, mask_function=mask_function, attention_mask=attention_mask, **kwargs)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """q [B, H, T, D], k and v [B, K, S, D] -> [B, T, H, D]."""
    new, cached = query.shape[2], key.shape[2] - query.shape[2]
    plain = attention_mask is None and not dropout and value.shape[-1] == query.shape[-1]
    if not plain or new == 1 or cached == 0:
        if attention_mask is None and new > 1 and cached:
            attention_mask = torch.ones(new, new + cached, dtype=torch.bool).tril(cached)
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    B, H, T, D = query.shape
    q_XRTD = query.unflatten(1, (key.shape[1], -1)).flatten(0, 1)
    k_XRSD, v_XRSD = (x.flatten(0, 1)[:, None].expand(-1, q_XRTD.shape[1], -1, -1) for x in (key, value))
    before_XRTD, before_sum = _flash(q_XRTD, k_XRSD[:, :, :cached], v_XRSD[:, :, :cached], 0.0, False, scale=scaling)
    within_XRTD, within_sum = _flash(q_XRTD, k_XRSD[:, :, cached:], v_XRSD[:, :, cached:], 0.0, True, scale=scaling)
    # exp(before) / (exp(before) + exp(within)), without overflow
    share_XRT1 = torch.sigmoid(before_sum - within_sum)[..., None]
    out_XRTD = torch.lerp(within_XRTD.float(), before_XRTD.float(), share_XRT1.float()).to(query.dtype)
    return out_XRTD.reshape(B, H, T, D).transpose(1, 2), None
