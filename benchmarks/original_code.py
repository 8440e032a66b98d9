"""Runs the original code's attention as it stands: what it imports and is not there is put in its place.

Nothing of the original is kept here; its files are read from the path that a user gives and executed unchanged.

- flash-attn: its varlen function is one causal attention in float64 for each pair of bounds. Bounds for which the
  kernel promises nothing (falling, past the end, longer than its limit) raise `UndefinedError` and are not guessed.
- transformers 4.34: a layer of the installed version under the names of that time, with RoPE's old arguments.

B batch, T tokens, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXModel, LlamaConfig, LlamaModel


class UndefinedError(Exception):
    """The original asks flash-attn for something that its contract leaves undefined."""


def varlen_qkvpacked(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float, softmax_scale: float | None, causal: bool
) -> Tensor:
    """Stand-in of flash-attn 2's: [all tokens, 3, H, D] -> [all tokens, H, D]."""
    out = []
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        if stop < start or stop > len(qkv) or stop - start > max_seqlen:
            raise UndefinedError(f"cu_seqlens {start}, {stop} of {len(qkv)} tokens, at most {max_seqlen} in a sequence")
        q, k, v = qkv[start:stop].double().permute(1, 2, 0, 3)
        out.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(0, 1))
    return torch.cat(out).to(qkv.dtype)


def unpad_input(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Stand-in of flash-attn 2's: real tokens of all rows, their places, bounds of the rows, the longest row."""
    indices, lengths = mask.flatten().nonzero().flatten(), mask.sum(1)
    return x.flatten(0, 1)[indices], indices, F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max())


def pad_input(x: Tensor, indices: Tensor, rows: int, tokens: int) -> Tensor:
    """Stand-in of flash-attn 2's: the tokens back in their places, zeros elsewhere."""
    places = x.new_zeros(rows * tokens, *x.shape[1:])
    return places.index_copy(0, indices, x).view(rows, tokens, *x.shape[1:])


def rotate_as_before(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE with the arguments of transformers 4.34: tables [1, 1, T, D] and positions [B, T]."""
    cos, sin = (table[0, 0][position_ids][:, None] for table in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return rotate(q), rotate(k)


def load_original(path: Path) -> ModuleType:
    """Execute one file of the original; nothing is written beside it.

    Raises:
        ImportError: it imports a package that is not here and has no stand-in (einops).
    """
    other = dict.fromkeys(["flash_attn_func", "flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func"])
    kernels = other | {"flash_attn_varlen_qkvpacked_func": varlen_qkvpacked}
    contents: dict[str, dict[str, Any]] = {
        "flash_attn": kernels | {"__version__": "2"},
        "flash_attn.flash_attn_interface": kernels,
        "flash_attn.bert_padding": {"unpad_input": unpad_input, "pad_input": pad_input},
    }
    stand_ins = {name: ModuleType(name) for name in contents}
    for name, module in stand_ins.items():
        vars(module).update(contents[name])
    original = ModuleType(path.stem)
    with mock.patch.dict("sys.modules", stand_ins):
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(original))
    if not is_neox(original):  # which brings a function of its own
        vars(original)["apply_rotary_pos_emb"] = rotate_as_before
    return original


def is_neox(original: ModuleType) -> bool:
    """Whether this is the file for GPT-NeoX, by what it defines."""
    return hasattr(original, "get_forward_function")


def forward_of(original: ModuleType, flash: bool) -> Callable[..., Any]:
    """The function that the original puts in place of a layer's ``forward`` for training."""
    forward: Callable[..., Any]
    if is_neox(original):
        forward = original.get_forward_function(use_flash_attn=flash)
    else:
        forward = original.forward_flashattn if flash else original.forward_noflashattn
    return forward


def model_of(neox: bool, heads: tuple[int, int, int]) -> LlamaModel | GPTNeoXModel:
    """One layer with random weights that make scores of about 1, and the identity after its attention."""
    H, K, D = heads
    common: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": H * D, "num_attention_heads": H, "num_hidden_layers": 1,
        "intermediate_size": 8, "max_position_embeddings": 32768, "initializer_range": (H * D) ** -0.5,
    }  # fmt: skip
    torch.manual_seed(0)
    if neox:
        model = GPTNeoXModel(GPTNeoXConfig(**common, attention_dropout=0.0, hidden_dropout=0.0)).train()
        nn.init.eye_(model.layers[0].attention.dense.weight)
        return model
    model = LlamaModel(LlamaConfig(**common, num_key_value_heads=K)).train()
    nn.init.eye_(model.layers[0].self_attn.o_proj.weight)
    return model


def old_layer(model: LlamaModel | GPTNeoXModel, heads: tuple[int, int, int]) -> SimpleNamespace:
    """The first attention layer of `model`, with its weights, under the names that it had in transformers 4.34."""
    H, K, D = heads

    def tables(x: Tensor, seq_len: int) -> list[Tensor]:
        return [table[:, None] for table in model.rotary_emb(x, torch.arange(seq_len)[None])]

    common: dict[str, Any] = {"training": True, "head_dim": D, "hidden_size": H * D, "rotary_emb": tables}
    if isinstance(model, LlamaModel):
        own = model.layers[0].self_attn
        linear = {name: getattr(own, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        counts = {"num_heads": H, "num_key_value_heads": K, "num_key_value_groups": H // K}
        return SimpleNamespace(**common, **linear, **counts, config=SimpleNamespace(pretraining_tp=1))
    own = model.layers[0].attention
    return SimpleNamespace(
        **common, num_attention_heads=H, head_size=D, rotary_ndims=own.rotary_ndims, dense=own.dense,
        query_key_value=own.query_key_value, _attn=_neox_attention,
        _merge_heads=lambda x_BHTD, *_: x_BHTD.transpose(1, 2).flatten(2),
    )  # fmt: skip


def _neox_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, head_mask: None) -> tuple[Tensor, None]:
    """What the GPT-NeoX layer of transformers 4.34 computes without FlashAttention, in [B, H, T, D]."""
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(later, torch.finfo(q.dtype).min)
    return torch.softmax(scores + mask, -1) @ v, None


def mask_for(original: ModuleType, flash: bool, real_BT: Tensor) -> Tensor:
    """The mask that the original's model gives a layer: real tokens [B, T], or numbers to add to scores."""
    if flash and not is_neox(original):
        return real_BT
    T = real_BT.shape[1]
    seen = real_BT[:, None, None] & (is_neox(original) or torch.ones(T, T, dtype=torch.bool).tril())
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
