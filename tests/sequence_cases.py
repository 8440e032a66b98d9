"""A step of training with rows that are cut across processes, as each of them computes it; see `halo_cases.py`.

Data, batches, loss and attention are those of `longlora train`: shard, `PackedDataset`, `RowOrder`, `StretchCollator`,
`LossModel` and DDP over all processes. What one process computes of the same rows is the truth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from architectures import ARCHITECTURES
from halo_cases import relative_error
from tiny import llama_config
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, PreTrainedModel

from longlora import use_s2
from longlora.attention.sequence_support import least_stretch, require_cuttable
from longlora.data.order import RowOrder
from longlora.data.packing import PackedDataset
from longlora.data.shards import TokenShard
from longlora.data.stretches import StretchCollator
from longlora.training.distributed import Ranks
from longlora.training.loss_model import LossModel, weight_of_batches
from longlora.training.sequence import sequence_group

PACKED = (61, 5, 9, 90, 33, 1, 70, 12, 45, 80)
"""Lengths of documents that fill rows of 93 tokens: some are cut, some rows hold several."""


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    name: str
    attention: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = PACKED
    context: int = 93
    rows: int = 1
    """In a micro batch."""
    micro_batches: int = 2
    """In a step, of all data ranks together."""
    model: str = "llama"
    weighted: bool = False
    recomputed: bool = False
    epoch: int = 0
    last: bool = False
    """The last step of the epoch, which may have rows left for some ranks only; else the first."""

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        if self.model == "llama":
            model: PreTrainedModel = LlamaForCausalLM(llama_config(max_position_embeddings=256))
        else:
            model = next(each for each in ARCHITECTURES if each.name == self.model).build()
        if self.recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        use_s2(model, **{"group_size": 8, "sink_tokens": 2, **self.attention})
        return model.train()

    def dataset(self) -> PackedDataset:
        offsets = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        tokens = np.random.default_rng(1).integers(5, 128, offsets[-1], dtype=np.int32)
        mask = (np.arange(offsets[-1]) % 3 > 0).astype(np.uint8) if self.weighted else None
        names = tuple(map(str, range(len(self.lengths))))
        shard = TokenShard(Path("memory"), tokens, offsets, names, "abc", mask)
        return PackedDataset(shard, self.context, weigh_documents=self.weighted)

    def batches(self, ranks: Ranks, least: int) -> list[dict[str, Any]]:
        """Of one process in one step."""
        dataset, here = self.dataset(), ranks.data_world
        order = RowOrder(len(dataset), self.rows, 7, ranks.data_rank, here)
        order.set_epoch(self.epoch)
        steps = self.micro_batches // here
        every = list(order)
        chosen = every[(len(every) - 1) // steps * steps :] if self.last else every[:steps]
        collate = StretchCollator(2, ranks.sequence_rank, ranks.sequence_world, least, weighted=self.weighted)
        return [collate([dataset[row] for row in rows]) for rows in chosen]


def cases() -> list[Case]:
    return [
        Case("packed documents, sinks, odd tails, 9 and 3 heads"),
        Case("rows of different lengths in a micro batch", rows=2),
        Case("one document, no sinks", {"sink_tokens": 0}, lengths=(93, 93)),
        Case("cut on bounds of groups", lengths=(96, 96), context=96),
        Case("rows far shorter than the context", lengths=(7, 3, 60, 5, 30), context=200, rows=5, micro_batches=1),
        Case("shift between layers", {"shift": "layers"}),
        Case("recomputed in the backward pass", recomputed=True),
        Case("examples that weigh the same", lengths=(60, 5, 9, 90, 33), weighted=True),
        Case("a window in some layers", model="gemma3_text", lengths=(93, 20, 50)),
        # One document a row: by itself the model keeps documents apart in training only.
        Case("learned sinks and a window", model="gpt_oss", lengths=(93, 50)),
        Case("full attention in one layer", {"full_attention_layers": [1]}),
        Case("full attention", {"full_attention_layers": "all"}, rows=2),
        Case("rows left for some ranks only", rows=2, micro_batches=4, last=True, epoch=1),
    ]


def everything(rank: int, world: int, sequence: int, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Errors of all cases against one process, relative, on a mesh with `sequence` ranks to a row."""
    ranks = Ranks(rank, world, rank, sequence, world)
    group = sequence_group(ranks)
    chosen = [case for case in cases() if names is None or case.name in names]
    return {case.name: errors_of_case(case, ranks, group) for case in chosen if case.micro_batches >= ranks.data_world}


def errors_of_case(case: Case, ranks: Ranks, group: dist.ProcessGroup | None) -> dict[str, float]:
    """Of the loss, of the worst gradient, and of the loss that is measured in evaluation."""
    model = case.build()
    least = least_stretch(require_cuttable(model), case.context, ranks.sequence_world)
    alone, own = case.batches(Ranks(), least), case.batches(ranks, least)
    count = weight_of_batches(own)
    dist.all_reduce(count)
    assert count.item() == weight_of_batches(alone).item()
    seen = torch.tensor(sum(batch["stretch"].own_tokens for batch in own))
    dist.all_reduce(seen)
    assert seen.item() == sum(batch["stretch"].own_tokens for batch in alone)

    loss_model = LossModel(model, 20, torch.float32, group)
    expected, grads = _step([loss_model], alone, weight_of_batches(alone), scale=1)
    model.zero_grad()
    parallel = DistributedDataParallel(loss_model)
    loss, shares = _step([parallel, parallel.no_sync], own, count, scale=ranks.world)
    dist.all_reduce(loss)
    assert set(shares) == set(grads)
    worst = max(relative_error(shares[name], grads[name]) for name in grads)
    found = {"loss": relative_error(loss / ranks.world, expected), "gradients": worst}
    model.eval()
    measured = torch.tensor([loss_model.measure(**batch) for batch in own], dtype=torch.float64).sum(0)
    dist.all_reduce(measured)
    truth = torch.tensor([loss_model.measure(**batch) for batch in alone], dtype=torch.float64).sum(0)
    return found | {"measured": relative_error(measured / ranks.sequence_world, truth)}


def _step(
    model: list[Any], batches: list[dict[str, Any]], count: Tensor, scale: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step; the model, and what keeps it from adding up gradients before the last batch."""
    no_sync = model[1] if len(model) > 1 else contextlib.nullcontext
    total = torch.zeros(())
    for number, batch in enumerate(batches):
        with contextlib.nullcontext() if number == len(batches) - 1 else no_sync():
            loss = model[0](**batch, num_items_in_batch=count)["loss"] * scale  # as Trainer does, for DDP's mean
            loss.backward()
        total += loss.detach()
    named = model[0].named_parameters()
    return total, {name.removeprefix("module."): p.grad.clone() for name, p in named if p.grad is not None}
