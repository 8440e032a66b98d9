"""Attention with soft-capped scores (Gemma 2), by blocks of queries.

N segments, S tokens per segment, H query heads, K key/value heads, R query heads to a key/value head, D head dim.

No fused kernel caps scores, so they have to be held: those of one block at a time, which backward computes again. A
block is some queries of one segment against all keys they can see, or several short segments, so that its scores are
at most `_SCORES` numbers: the largest tensors here don't grow with the sequence until a block is down to `_MIN_ROWS`.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longlora.attention.masks import causal_mask

# Scores of one block over all heads, 32 MiB in float32: larger ones outgrow caches and what malloc keeps (2**24 took
# half as long again in float32 with head dim 64), smaller ones add up more gradients of keys (2**22 took a quarter more
# in bfloat16 with head dim 256; 3072 tokens, one CPU core). And the rows below which calls cost more than they save.
_SCORES, _MIN_ROWS = 2**23, 64
# A segment is at least this many blocks, as long as they have enough rows: a block has no keys after its last query, so
# that of the scores above the diagonal a quarter is computed.
_BLOCKS = 4


def soft_capped_attention(
    q_NHSD: Tensor,
    k_NKSD: Tensor,
    v_NKSD: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention inside segments with scores ``softcap * tanh(scaling * q @ k / softcap)``; [N, H, S, D of the values].

    Args:
        q_NHSD: queries; a number after the D of the keys is the score of its head's learned sink, which isn't capped.
        k_NKSD, v_NKSD: keys and values; the queries are the last ones of them.
        mask: [queries, keys], 0 or -inf; causal if None.
    """
    _, H, S, _ = q_NHSD.shape
    keys = k_NKSD.shape[2]
    rows = min(S, max(_MIN_ROWS, min(-(-S // _BLOCKS), _SCORES // (H * keys))))
    together = max(1, _SCORES // (H * rows * keys))
    outputs = []
    for q, k, v in zip(q_NHSD.split(together), k_NKSD.split(together), v_NKSD.split(together), strict=True):
        blocks = q.split(rows, dim=2)
        stops = accumulate(block.shape[2] for block in blocks)
        made = []
        for block, stop in zip(blocks, stops, strict=True):
            hidden = S - stop  # keys after the last query
            k_seen, v_seen = (x[:, :, :-hidden] if hidden else x for x in (k, v))
            mask_rows = None if mask is None else mask[stop - block.shape[2] : stop, : keys - hidden]
            made.append(
                checkpoint(
                    _block, block, k_seen, v_seen, mask_rows, scaling, softcap, dropout,
                    use_reentrant=False, preserve_rng_state=dropout > 0,
                )
            )  # fmt: skip
        outputs.append(made[0] if len(made) == 1 else torch.cat(made, dim=2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _block(
    q_NHSD: Tensor, k_NKSD: Tensor, v_NKSD: Tensor, mask: Tensor | None, scaling: float, softcap: float, dropout: float
) -> Tensor:
    """In place where autograd allows it: at most three tensors of scores at a time."""
    N, K, keys, D = k_NKSD.shape
    H, S = q_NHSD.shape[1:3]
    mask = causal_mask(S, keys, q_NHSD) if mask is None else mask
    q_NHSD, sink_NHS1 = q_NHSD.split([D, q_NHSD.shape[-1] - D], dim=-1)
    # The R queries to a key are rows of one product: by broadcasting, matmul would copy keys and values for each.
    capped = (q_NHSD.reshape(N, K, -1, D) @ k_NKSD.transpose(-1, -2)).mul_(scaling / softcap).tanh_()
    scores_NHSS = (capped * softcap).view(N, H, S, keys).add_(mask)
    if sink_NHS1.shape[-1]:
        scores_NHSS = torch.cat([scores_NHSS, sink_NHS1.to(scores_NHSS.dtype)], dim=-1)
    weights = scores_NHSS.softmax(-1, dtype=torch.promote_types(q_NHSD.dtype, torch.float32)).to(v_NKSD.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    return (weights[..., :keys].reshape(N, K, -1, keys) @ v_NKSD).view(N, H, S, -1)
