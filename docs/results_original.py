"""The section of results.md on the original's attention beside ours: rows of benchmarks/compare_original.py."""

from __future__ import annotations

from collections import Counter

from results_rows import Row, every, origin, table

_OUTCOMES = ("agree", "differ", "undefined in flash-attn", "original fails", "ours refuses")


def original() -> list[str]:
    """The section; empty without rows."""
    rows = every("original")
    if not rows:
        return []
    compared, timed = (
        [row for row in rows if row["outcome"] != "timed"],
        [row for row in rows if row["original / ours"]],
    )
    agreeing = [row for row in compared if row["outcome"] == "agree"]
    worst = max(max(float(row["output_rel"]), float(row["gradient_rel"])) for row in agreeing)
    return [
        "## The original's code beside ours",
        "`python benchmarks/compare_original.py --original CHECKOUT`: the attention files of the paper's repository, "
        "as they are, and ours on the same weights and tokens, float32, no sink tokens; values and gradients. No GPU: "
        "flash-attn's part is computed by a stand-in in float64, and *undefined* is what it is given bounds for that "
        f"fall or leave the tensor. {origin(rows)}.",
        _comparison(compared),
        f"Where they agree, the largest difference is {worst:.1e} of the largest number. Where they do not, and why: "
        "[differences.md](differences.md); which tokens and heads: `benchmarks/results/original.csv`. Against the "
        "default mode the paths without FlashAttention differ in the first half group of the shifted heads: the leak.",
        "Time of attention alone on this CPU, forward and backward, the original's path without FlashAttention over "
        "ours, groups of T/4, medians of interleaved calls beside other jobs:",
        _times(timed),
    ]


def _comparison(rows: list[Row]) -> str:
    found: dict[tuple[str, str, str], Counter[str]] = {}
    for row in rows:
        found.setdefault((row["file"], row["path"], row["ours"]), Counter())[row["outcome"]] += 1
    unknown = {row["outcome"] for row in rows} - set(_OUTCOMES)
    assert not unknown, f"outcomes without a column: {unknown}"
    lines = ([*place, *(str(counts[outcome]) for outcome in _OUTCOMES)] for place, counts in found.items())
    return table(["file", "path", "our mode", *_OUTCOMES], lines, texts=3)


def _times(rows: list[Row]) -> str:
    lines = [[f"{int(row['tokens']):,}", row["dtype"], row["ours"], row["original / ours"]] for row in rows]
    return table(["tokens", "type", "our mode", "original / ours"], lines, texts=0)
