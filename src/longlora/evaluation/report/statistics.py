"""Means and 95 % intervals for small samples. Pure Python: no scipy, no numpy.

In: plain numbers. Out: means with their intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

NORMAL_QUANTILE = 1.959963984540054  # 0.975 quantile of the normal distribution
# 0.975 quantiles of Student's t for 1 to 10 degrees of freedom; the expansion below takes over from 11 on.
_T = (12.7062047, 4.3026527, 3.1824463, 2.7764451, 2.5705818, 2.4469119, 2.3646243, 2.3060041, 2.2621572, 2.2281389)


class MeanInterval(NamedTuple):
    """A mean and its 95 % interval, in the unit of the values; `low` and `high` are None for a single value."""

    mean: float
    low: float | None
    high: float | None


def wilson_interval(correct: float, trials: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion, as fractions between 0 and 1.

    `correct` may be a sum of scores between 0 and 1: at the same mean they vary at most as much as right and wrong do,
    so that the interval is then rather too wide than too narrow.

    Raises:
        ValueError: no trials, or `correct` is not between 0 and `trials`.
    """
    if trials < 1 or not 0 <= correct <= trials:
        raise ValueError(f"correct={correct} of trials={trials}: need 0 <= correct <= trials and trials >= 1")
    share = correct / trials
    scale = 1 + NORMAL_QUANTILE**2 / trials
    centre = (share + NORMAL_QUANTILE**2 / (2 * trials)) / scale
    half = NORMAL_QUANTILE / scale * math.sqrt(share * (1 - share) / trials + NORMAL_QUANTILE**2 / (4 * trials**2))
    # At the ends the bound is exactly 0 or 1, which rounding would miss by 1e-17.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == trials else centre + half
    return low, high


def t_quantile(degrees_of_freedom: int) -> float:
    """0.975 quantile of Student's t (two-sided 95 %); absolute error below 1e-5.

    Raises:
        ValueError: less than one degree of freedom.
    """
    if degrees_of_freedom < 1:
        raise ValueError(f"degrees_of_freedom={degrees_of_freedom}: need at least 1")
    if degrees_of_freedom <= len(_T):
        return _T[degrees_of_freedom - 1]
    # Cornish-Fisher expansion in 1/n (Abramowitz and Stegun 26.7.5).
    n, z = degrees_of_freedom, NORMAL_QUANTILE
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / n + second / n**2 + third / n**3 + fourth / n**4


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Mean of independent `values` with its 95 % Student t interval; a single value has no interval.

    Raises:
        ValueError: `values` is empty.
    """
    count = len(values)
    if count == 0:
        raise ValueError("the mean of no values is not defined")
    mean = math.fsum(values) / count
    if count == 1:
        return MeanInterval(mean, None, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = t_quantile(count - 1) * math.sqrt(variance / count)
    return MeanInterval(mean, mean - half, mean + half)


def log_probability_interval(values: Sequence[float]) -> MeanInterval:
    """`mean_interval` of log-probabilities: their mean is never above 0, so neither is the interval.

    Raises:
        ValueError: `values` is empty.
    """
    mean, low, high = mean_interval(values)
    return MeanInterval(mean, low, None if high is None else min(high, 0.0))


def weighted_mean_interval(values: Sequence[float], weights: Sequence[int]) -> MeanInterval:
    """Mean of `values` weighted by `weights`, with its 95 % t interval over the items (linearised ratio estimator).

    With equal weights it is `mean_interval`.

    Raises:
        ValueError: the sequences differ in length, or the weights sum to 0.
    """
    mean = token_weighted_mean(values, weights)
    count = len(values)
    if count == 1:
        return MeanInterval(mean, None, None)
    average = sum(weights) / count
    squares = math.fsum((weight * (value - mean) / average) ** 2 for value, weight in zip(values, weights, strict=True))
    half = t_quantile(count - 1) * math.sqrt(squares / (count - 1) / count)
    return MeanInterval(mean, mean - half, mean + half)


def normal_interval(mean: float, standard_error: float | None) -> MeanInterval:
    """A mean with the 95 % interval that its standard error gives in a large sample; None: no interval."""
    if standard_error is None:
        return MeanInterval(mean, None, None)
    return MeanInterval(mean, mean - NORMAL_QUANTILE * standard_error, mean + NORMAL_QUANTILE * standard_error)


def paired_difference(a: Sequence[float], b: Sequence[float], weights: Sequence[int] | None = None) -> MeanInterval:
    """Mean of ``a[i] - b[i]``, weighted by `weights` if there are any, with its 95 % t interval over the pairs.

    Raises:
        ValueError: the sequences are empty or differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return mean_interval(differences) if weights is None else weighted_mean_interval(differences, weights)


class _Scored(Protocol):
    @property
    def loss(self) -> float: ...
    @property
    def tokens(self) -> int: ...


def loss_difference(a: Sequence[_Scored], b: Sequence[_Scored]) -> MeanInterval:
    """Token-weighted mean loss of `a` less that of `b` over the same tokens, with its t interval over documents."""
    return paired_difference([row.loss for row in a], [row.loss for row in b], [row.tokens for row in a])


def token_weighted_mean(losses: Sequence[float], tokens: Sequence[int]) -> float:
    """Mean loss per token over documents: each document's mean loss weighted by its scored tokens.

    Raises:
        ValueError: the sequences differ in length, or there are no tokens.
    """
    if len(losses) != len(tokens):
        raise ValueError(f"{len(losses)} losses and {len(tokens)} token counts cannot be paired")
    total = sum(tokens)
    if total <= 0:
        raise ValueError("a token-weighted mean needs at least one token")
    return math.fsum(loss * count for loss, count in zip(losses, tokens, strict=True)) / total
