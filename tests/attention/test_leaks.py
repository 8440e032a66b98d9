"""Which outputs change when one token changes: those that the definition names and no others, on each path."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from attention_cases import PATHS, qkv, run
from torch import Tensor

from longlora.attention.pattern import FULL, Pattern, S2Pattern, WindowPattern, may_attend, pattern_shift, shifted_heads


def visible(bounds: list[int], length: int, heads: int, pattern: Pattern) -> Tensor:
    """[key, query, head]: whether the query sees the key, by the definition alone."""
    seen = torch.zeros(length, length, heads, dtype=torch.bool)
    border = heads - shifted_heads(heads, pattern_shift(pattern))
    for start, stop in pairwise(bounds):
        for query in range(stop - start):
            for key in range(stop - start):
                for shifted, part in ((False, slice(border)), (True, slice(border, heads))):
                    seen[start + key, start + query, part] = may_attend(
                        query, key, stop - start, pattern, shifted=shifted
                    )
    return seen


def changed(path: str, inputs: list[Tensor], bounds: list[int], pattern: Pattern, **extras: object) -> Tensor:
    """[token, query, head]: whether the output changes, in any bit, when query, key and value of the token do."""
    T = inputs[0].shape[2]
    many = [x.detach().expand(T, -1, -1, -1).clone() for x in inputs]
    # Of the same batch: a row's place in it decides how some CPUs round the last bit.
    before = run(path, [x.clone() for x in many], [bounds] * T, pattern, **extras)
    for x in many:
        x.diagonal(dim1=0, dim2=2).add_(3.0)
    return (run(path, many, [bounds] * T, pattern, **extras) != before).any(-1)


PATTERNS = [
    S2Pattern(8, 0), S2Pattern(8, 0, "all"), S2Pattern(8, 0, "none"), S2Pattern(8, 2),
    S2Pattern(8, 6), S2Pattern(8, 6, "all"), S2Pattern(8, 6, "none"), S2Pattern(64, 6), WindowPattern(5), FULL,
]  # fmt: skip


@pytest.mark.parametrize("path", [*PATHS, "soft cap"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("H", "K", "D_v"), [(9, 3, 4), (4, 1, 7)])
@pytest.mark.parametrize(
    "bounds",
    [
        [0, 27],
        [0, 4, 5, 6, 25],  # documents shorter than the sinks and of one token, and padding
    ],
    ids=str,
)
def test_a_token_changes_what_may_see_it(
    bounds: list[int], H: int, K: int, D_v: int, pattern: Pattern, path: str
) -> None:
    q, k, _ = qkv(1, H, K, 27)
    v = qkv(1, H, K, 27, D_v, seed=1)[2]
    extras = {"softcap": 5.0} if path == "soft cap" else {}
    found = changed("any device" if path == "soft cap" else path, [q, k, v], bounds, pattern, **extras)
    assert torch.equal(found, visible(bounds, 27, H, pattern))


def test_the_definition_is_causal() -> None:
    for pattern in PATTERNS:
        assert not visible([0, 27], 27, 2, pattern).permute(2, 1, 0).triu(1).any()
