"""Fixtures of the CUDA backends' tests on the CPU."""

from __future__ import annotations

from typing import Any

import attention_cases
import pytest
import torch.nn.attention.flex_attention as torch_flex
import torch.nn.attention.varlen as torch_varlen
from torch import Tensor
from transformers import modeling_flash_attention_utils

from longlora.attention import flex


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Emulations in the place of torch's kernel and of flash-attn builds; the list fills with their calls.

    A call is the name of the kernel, and its numbers of query and key heads. A name that ends in 3 also returns the
    logsumexp, as some builds do.
    """
    calls = []

    def torch_kernel(q: Tensor, k: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(("torch", q.shape[1], k.shape[1]))
        return attention_cases.varlen_attn(q, k, *args, **options)

    def load(name: str) -> Any:
        def kernel(q: Tensor, k: Tensor, *args: Any, **options: Any) -> Any:
            calls.append((name, q.shape[1], k.shape[1]))
            out = attention_cases.flash_attn_varlen_func(q, k, *args, **options)
            return (out, "logsumexp") if name.endswith("3") else out

        return (None, kernel, None, None, None), (None, None)

    monkeypatch.setattr(torch_varlen, "varlen_attn", torch_kernel)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", load)
    return calls


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's own formula, T x T, whose backward exists on the CPU: only a check in front says otherwise."""
    monkeypatch.setattr(flex, "_kernel", torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
