"""A whole model under sequence parallelism, as a rank of a process group computes it; see `halo_cases.py`.

Rows are cut as a trainer has to: labels shifted and positions counted before the cut, padding at the end, the loss
divided by the number of labels of all ranks, gradients of parameters added up over the ranks.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from halo_cases import relative_error
from tiny import llama_config
from torch import Tensor
from transformers import LlamaForCausalLM

from longlora import use_s2
from longlora.attention import registry
from longlora.attention.backends import Plans
from longlora.attention.halo import halo_attention
from longlora.attention.halo_plan import halo_plan, stretch_length
from longlora.attention.pattern import Pattern, S2Pattern

TOKENS, BOUNDS = 93, [0, 20, 61, 93]
PATTERN = S2Pattern(8, 2)


def errors_of_model(rank: int, world: int) -> dict[str, float]:
    """Loss, and the worst parameter's gradient, against the model in one process; with recomputed layers as well."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).train()
    use_s2(model, group_size=PATTERN.group_size, sink_tokens=PATTERN.sink_tokens)
    whole = _row(model.config.vocab_size)
    labels = int((whole[1] != -100).sum())
    stretch = stretch_length(TOKENS, world, PATTERN)
    own = [F.pad(x, (0, stretch * world - TOKENS), value=fill) for x, fill in zip(whole, (0, -100, 0), strict=True)]
    own = [x[:, rank * stretch : (rank + 1) * stretch] for x in own]
    errors = {}
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss, grads = _step(model, *whole, labels)
        with mock.patch.object(registry, "attend", partial(_attend, rank, world, stretch)):
            share, shares = _step(model, *own, labels)
        for x in (share, *shares.values()):
            dist.all_reduce(x)
        assert set(shares) == set(grads)
        errors[f"loss, recomputed: {recomputed}"] = relative_error(share, loss)
        errors[f"gradients, recomputed: {recomputed}"] = max(
            relative_error(shares[name], grads[name]) for name in grads
        )
    return errors


def _row(vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels of the next token and positions, [1, T] each."""
    ids = torch.randint(5, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    labels[:, [bound - 1 for bound in BOUNDS[1:]]] = -100
    positions = torch.cat([torch.arange(stop - start) for start, stop in pairwise(BOUNDS)])
    return ids, labels, positions[None]


def _step(
    model: LlamaForCausalLM, ids: Tensor, labels: Tensor, positions: Tensor, count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    loss = F.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="sum") / count
    loss.backward()
    grads = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    return loss.detach().clone(), grads


def _attend(
    rank: int, world: int, stretch: int, q: Tensor, k: Tensor, v: Tensor, bounds_B: Any, pattern: Pattern,
    *, plans: Plans, **options: Any,
) -> Tensor:  # fmt: skip
    """`attend` where the row is cut: the bounds of the stretch are not asked for, those of the whole row are known."""
    heads = (q.shape[1], k.shape[1])
    plan = plans.get(halo_plan, (tuple(BOUNDS),), stretch * world, pattern, heads, rank, world)
    return halo_attention(q, k, v, plan, plans=plans, **options)
