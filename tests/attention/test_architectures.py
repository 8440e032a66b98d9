"""S2-Attn on every decoder-only architecture of transformers: it keeps its promises, or refuses by name.

The checks are those of ``longlora check``; gradients are compared with `reference.py` besides.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from architectures import ARCHITECTURES, OTHERS, Architecture, refusal, support
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longlora.attention import registry
from longlora.attention.pattern import S2Pattern
from longlora.attention.reference import reference_attention
from longlora.attention.registry import use_full, use_s2

DOCS = Path(__file__).parents[2] / "docs"
# An older transformers lacks some of them.
KNOWN = [architecture for architecture in ARCHITECTURES if architecture.known]
WORKING = [architecture for architecture in KNOWN if architecture.refused is None]
REFUSED = [architecture for architecture in KNOWN if architecture.refused is not None]


pytestmark = pytest.mark.usefixtures("one_thread")


def names(architecture: Architecture) -> str:
    return architecture.name


def tokens(length: int) -> Tensor:
    return torch.randint(3, 128, (1, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def reference_in_place(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Let the registry compute attention by its definition; returns the patterns that were asked for."""
    asked: list[object] = []

    def attend(q, k, v, bounds_B, pattern, *, backend, scaling, dropout, softcap, sink_logits_H, **_):
        assert not dropout
        asked.append(pattern)
        return reference_attention(
            q, k, v, bounds_B, pattern, scaling=scaling, softcap=softcap, sink_logits_H=sink_logits_H
        )

    monkeypatch.setattr(registry, "attend", attend)
    return asked


def gradients(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Of the loss, for all parameters that have one; in training mode."""
    torch.manual_seed(0)  # routers with noise
    model.train().zero_grad(set_to_none=True)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", WORKING, ids=names)
def test_checks_pass(architecture: Architecture) -> None:
    """No leak, sparse in effect, one group is full attention, packing, padding, evaluation, gradients."""
    found = support(architecture)
    assert found.refused is None
    failed = {result.name: result.detail for result in found.results if result.passed is False}
    # What is declared must fail indeed, or the table says too little.
    assert failed.keys() == architecture.not_applicable.keys(), failed


@pytest.mark.parametrize("architecture", WORKING, ids=names)
def test_gradients_are_those_of_the_reference(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all parameters, in float64; norms and some softmaxes compute in float32 all the same."""
    model, ids = architecture.build().double(), tokens(35)
    full = gradients(model, ids)
    use_s2(model, group_size=16, sink_tokens=2)
    fast = gradients(model, ids)
    asked = reference_in_place(monkeypatch)
    slow = gradients(model, ids)
    assert any(isinstance(pattern, S2Pattern) for pattern in asked)
    assert fast.keys() == slow.keys() == full.keys()
    for name, expected in slow.items():
        assert torch.isfinite(fast[name]).all(), name
        error, size = (fast[name] - expected).abs().max().item(), expected.abs().max().item()
        assert error <= 1e-4 * size + 1e-9, f"{name}: {error:.2g} of {size:.2g}"
    assert any((fast[name] - full[name]).abs().max() > 1e-3 * full[name].abs().max() for name in full)


@pytest.mark.parametrize("architecture", REFUSED, ids=names)
def test_refused_by_name_and_unharmed(architecture: Architecture) -> None:
    model, ids = architecture.build(), tokens(40)
    before, implementation = logits(model, ids), model.config._attn_implementation
    error = refusal(model)
    assert error is not None
    assert architecture.refused in error
    # Also where only the step in training told.
    torch.testing.assert_close(logits(model, ids), before)
    use_full(model)
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(logits(model, ids), before)


def make_architectures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_architectures", DOCS / "make_architectures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_page_is_what_the_checks_say_now() -> None:
    """Letter by letter for the transformers it was made with; another one may know fewer model types."""
    script = make_architectures()
    stored = script.PAGE.read_text(encoding="utf-8")
    rows = [line for line in stored.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [architecture.name for architecture in ARCHITECTURES]
    assert [" refused" in row for row in rows] == [architecture.refused is not None for architecture in ARCHITECTURES]
    if script.tools() in stored:
        assert stored == script.architectures_markdown(), "run `python docs/make_architectures.py`"


def test_every_model_type_is_in_the_table_or_left_out_for_a_reason() -> None:
    listed = [architecture.name for architecture in ARCHITECTURES]
    assert listed == sorted(set(listed))
    others = {name for group in OTHERS.values() for name in group}
    types = {architecture.model_type for architecture in ARCHITECTURES}
    assert not types & others
    script = make_architectures()
    if script.tools() in script.PAGE.read_text(encoding="utf-8"):
        assert types | others == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("name", ["afmoe", "gpt_oss", "llama", "opt"])
def test_full_attention_in_evaluation_keeps_documents_apart(name: str) -> None:
    """Also where the architecture gives no positions to its mask."""
    model = next(each for each in ARCHITECTURES if each.model_type == name and not each.variant).build()
    use_s2(model, group_size=8, sink_tokens=2)
    ids = torch.randint(3, 100, (1, 50), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 20:]
        alone = model(input_ids=ids[:, 20:], position_ids=positions[:, 20:], use_cache=False).logits
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
