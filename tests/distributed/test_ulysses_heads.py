"""Full attention across ranks, without processes: which heads each computes, and what is refused before a run."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest

from longlora.attention import ulysses
from longlora.attention.ulysses import HeadDeal, deal_heads, require_ulysses
from longlora.errors import ModelError

HEADS = [(9, 3), (4, 2), (8, 1), (32, 8), (14, 2), (15, 5), (6, 6)]


@pytest.mark.parametrize(("heads", "world"), [pair for pair in product(HEADS, range(1, 17)) if pair[0][0] >= pair[1]])
def test_every_query_head_is_with_a_copy_of_its_key_head(heads: tuple[int, int], world: int) -> None:
    deal = deal_heads(*heads, world)
    copies = [head for head in range(heads[1]) for _ in range(deal.copies)]  # as `repeat_interleave` makes them
    assert sum(deal.query_heads) == heads[0]
    assert sum(deal.kv_heads) == len(copies)
    query = key = 0
    for queries, keys in zip(deal.query_heads, deal.kv_heads, strict=True):
        assert queries >= 1
        assert queries % keys == 0
        for local in range(queries):
            assert copies[key + local // (queries // keys)] == (query + local) // (heads[0] // heads[1])
        query, key = query + queries, key + keys


@pytest.mark.parametrize(
    ("heads", "world", "deal"),
    [
        ((32, 8), 8, HeadDeal(1, (4,) * 8, (1,) * 8)),
        ((32, 8), 16, HeadDeal(2, (2,) * 16, (1,) * 16)),
        ((9, 3), 4, HeadDeal(3, (3, 2, 2, 2), (3, 2, 2, 2))),
        ((4, 4), 3, HeadDeal(1, (2, 1, 1), (2, 1, 1))),
    ],
)
def test_copies_are_as_few_as_the_busiest_rank_allows(heads: tuple[int, int], world: int, deal: HeadDeal) -> None:
    assert deal_heads(*heads, world) == deal


def test_more_ranks_than_query_heads_are_refused() -> None:
    with pytest.raises(
        ModelError, match="full attention on 16 sequence ranks.* has 9: set parallel.sequence to at most 9"
    ):
        require_ulysses(9, 3, 16)


def test_one_rank_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ulysses, "_import_deepspeed", lambda purpose: pytest.fail(purpose))
    require_ulysses(9, 3, 1)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed"),
            "no deepspeed here: pip install 'longlora",
        ),
        (ModuleNotFoundError("No module named 'einops'", name="einops"), "there is no einops here"),
        (RuntimeError("no compiler"), r"can't be loaded here \(no compiler\): reinstall it"),
    ],
)
def test_a_library_that_is_not_there_or_broken_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, message: str
) -> None:
    def load(name: str) -> ModuleType:
        raise raised

    ulysses._import_deepspeed.cache_clear()
    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(ModelError, match=message) as refused:
        require_ulysses(8, 2, 4)
    assert "full attention on 4 sequence ranks" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_deepspeed_is_loaded_when_asked_for_and_says_nothing(tmp_path: Path) -> None:
    """Nor does it compile anything on a CPU, which it would say."""
    pytest.importorskip("deepspeed")
    program = f"""
import sys
import torch.distributed as dist
from longlora.attention.ulysses import _start_communication, require_ulysses

assert "deepspeed" not in sys.modules
require_ulysses(8, 2, 4)
assert "deepspeed" in sys.modules
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
_start_communication()
dist.destroy_process_group()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
