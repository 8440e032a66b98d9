"""One rank of several by itself, its messages replaced by zeros: the order of its work, its memory, its gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from attention_cases import qkv
from torch import Tensor

from longlora.attention import halo, halo_exchange
from longlora.attention.halo import halo_attention
from longlora.attention.halo_plan import Block, halo_plan
from longlora.attention.pattern import Pattern, S2Pattern

Events = list[str]
BUDGETS = {0: (3, 3.3), 4: (6, 3)}
"""By sink tokens, most bytes at one time in forward and backward, in units of the queries: T x T scores are 128."""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Events:
    """No process group; the list fills with what is posted (to and from how many), waited for and computed."""
    events: Events = []
    mail, attend = halo_exchange._Mail, halo.attend

    class Waited(halo_exchange._Posted):
        def wait(self) -> dict[int, Tensor]:
            events.append("wait")
            return super().wait()

    def post(
        self: Any, outgoing: Iterable[tuple[int, list[Tensor]]], expected: Iterable[tuple[int, Block]]
    ) -> halo_exchange._Posted:
        numbers: dict[int, int] = {}
        for peer, block in expected:
            numbers[peer] = numbers.get(peer, 0) + block.vectors * sum(self._widths)
        events.append(f"post {len({peer for peer, _ in outgoing})}, {len(numbers)}")
        return Waited([], {peer: torch.zeros(size, dtype=self._like.dtype) for peer, size in numbers.items()}, [])

    def attending(q: Tensor, *arguments: Any, **options: Any) -> Tensor:
        events.append(f"{q.shape[1]} heads")
        out = attend(q, *arguments, **options)
        if out.requires_grad:
            out.register_hook(lambda _: events.append(f"{q.shape[1]} heads"))
        return out

    monkeypatch.setattr(mail, "_post", post)
    monkeypatch.setattr(halo, "_require_group", lambda *_: None)
    monkeypatch.setattr(halo, "attend", attending)
    return events


def test_attention_is_computed_while_messages_travel(alone: Events) -> None:
    """Forward first what needs nothing (a document in between, one that begins here), then unshifted, at last shifted
    heads of the document from the left; backward in the opposite order."""
    plan = halo_plan([[0, 44, 50, 96]], 96, S2Pattern(8, 2), (6, 2), 1, 3)
    q, k, v = qkv(1, 6, 2, 32, dtype=torch.float32)
    between, opening, unshifted, shifted = ["6 heads"], 5 * ["3 heads"], 2 * ["3 heads"], 2 * ["3 heads"]
    post = ["post 1, 1"]
    out = halo_attention(q, k, v, plan)
    assert alone == [*post, *post, *between, *opening, "wait", *unshifted, "wait", *shifted]
    alone.clear()
    out.sum().backward()
    assert alone == [*shifted, *post, *unshifted, *post, *opening, *between, "wait", "wait"]


@pytest.mark.parametrize("rank", [0, 3])
def test_first_and_last_rank(alone: Events, rank: int) -> None:
    """The first receives only gradients, the last sends only these; stages come in the opposite order."""
    plan = halo_plan([[0, 64]], 64, S2Pattern(8, 2), (4, 2), rank, 4)
    q, k, v = qkv(1, 4, 2, 16, dtype=torch.float32)
    halo_attention(q, k, v, plan).sum().backward()
    # Sinks of the first rank go to 3 others; halo and sinks come from 2, without halo from 1.
    first = ["post 3, 0", "post 3, 0", "post 0, 3", "post 0, 3"]
    last = ["post 0, 1", "post 0, 2", "post 2, 0", "post 1, 0"]
    assert [event for event in alone if event.startswith("post")] == (last if rank else first)
    assert alone.count("wait") == 4


def test_no_gradients_no_messages_home(alone: Events) -> None:
    plan = halo_plan([[0, 64]], 64, S2Pattern(8, 2), (4, 2), 1, 4)
    with torch.no_grad():
        out = halo_attention(*qkv(1, 4, 2, 16, dtype=torch.float32), plan)
    assert not out.requires_grad
    assert [event for event in alone if event.startswith("post")] == ["post 0, 1", "post 1, 1"]


def peak_bytes(tokens: int, pattern: Pattern) -> tuple[int, int]:
    """Held at most by forward and backward on rank 1 of 4, in float32."""
    plan = halo_plan([[0, 4 * tokens]], 4 * tokens, pattern, (4, 1), 1, 4)
    q, k, v = (x.detach().float().requires_grad_() for x in qkv(1, 4, 1, tokens, D=8))
    with torch.profiler.profile(profile_memory=True) as forward:
        out = halo_attention(q, k, v, plan)
    grad = torch.zeros_like(out)
    with torch.profiler.profile(profile_memory=True) as backward:
        torch.autograd.grad(out, (q, k, v), grad)
    return peak(forward), peak(backward)


def peak(profile: torch.profiler.profile) -> int:
    held = most = 0
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("sinks", [0, 4])
def test_memory_grows_with_the_stretch_and_not_its_square(alone: Events, sinks: int) -> None:
    short, long = (peak_bytes(tokens, S2Pattern(64, sinks)) for tokens in (1024, 4096))
    queries = 4096 * 4 * 8 * 4
    for few, many, budget in zip(short, long, BUDGETS[sinks], strict=True):
        assert many < 4.2 * few
        assert many < budget * queries, f"{many / queries:.2f} times the queries"
