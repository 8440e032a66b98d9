"""Bytes that are alive in a step, by what they are for, and their largest sum in each phase; tensors may be fake."""

from __future__ import annotations

import weakref
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longlora.model.trainable import TrainedModel

Kind = Literal["frozen", "copied", "trained", "gradients", "saved", "temporary"]
"""What a storage is for: `copied` are the originals of embeddings and norms that PEFT keeps beside the trained ones,
`saved` is what the forward pass leaves for the backward pass."""
Phase = Literal["forward", "loss", "backward"]
Bytes = dict[Kind, float]
Peaks = dict[Phase, Bytes]


class _Entry:
    """One storage: its bytes and what it is for."""

    __slots__ = ("kind", "size")

    def __init__(self, size: int, kind: Kind) -> None:
        self.size, self.kind = size, kind


class Ledger(TorchDispatchMode):
    """Counts the storages that are alive, by kind, and remembers the largest sum in each phase."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase: Phase = "forward"
        self.peaks: Peaks = {}
        self._live: Bytes = dict.fromkeys(get_args(Kind), 0.0)
        self._entries: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()

    def own(self, model: TrainedModel, *, with_gradients: bool) -> None:
        """Enter the weights, and the gradients that an earlier micro batch left behind."""
        for name, parameter in model.named_parameters():
            kind: Kind = "copied" if ".original_module." in name else "frozen"
            self._enter(parameter, "trained" if parameter.requires_grad else kind)
            if parameter.requires_grad:
                if with_gradients:
                    parameter.grad = torch.empty_like(parameter)
                    self._enter(parameter.grad, "gradients")
                parameter.register_post_accumulate_grad_hook(self._gradient)
        for buffer in model.buffers():
            self._enter(buffer, "frozen")

    def keep(self) -> None:
        """Everything temporary that is still alive was saved for the backward pass."""
        for entry in self._entries.values():
            self._move(entry, "temporary", "saved")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:  # most calls are this one
            return made
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._enter(tensor, "temporary")
        return made

    def _gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if entry := self._entries.get(parameter.grad.untyped_storage()):
            self._move(entry, entry.kind, "gradients")

    def _move(self, entry: _Entry, source: Kind, target: Kind) -> None:
        if entry.kind == source:
            self._live[source] -= entry.size
            self._live[target] += entry.size
            entry.kind = target

    def _enter(self, tensor: Tensor, kind: Kind) -> None:
        storage = tensor.untyped_storage()
        if entry := self._entries.get(storage):
            if kind != "temporary":
                self._move(entry, "temporary", kind)
            return
        entry = _Entry(storage.nbytes(), kind)
        self._entries[storage] = entry
        self._live[kind] += entry.size
        weakref.finalize(storage, self._leave, entry)
        if sum(self._live.values()) > sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = dict(self._live)

    def _leave(self, entry: _Entry) -> None:
        self._live[entry.kind] -= entry.size
