"""Intervals against published values and against independent closed forms."""

from __future__ import annotations

import math
import random

import pytest

from longlora.evaluation.report.statistics import (
    log_probability_interval,
    mean_interval,
    normal_interval,
    paired_difference,
    t_quantile,
    token_weighted_mean,
    weighted_mean_interval,
    wilson_interval,
)


def t_inside(t: float, degrees: int) -> float:
    """P(|T| < t) by the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(degrees))
    total, term = 0.0, 1.0
    if degrees % 2:
        term = math.cos(theta)
        for k in range(1, (degrees - 1) // 2 + 1):
            total += term
            term *= math.cos(theta) ** 2 * (2 * k) / (2 * k + 1)
        return 2 / math.pi * (theta + math.sin(theta) * total)
    for k in range(1, degrees // 2 + 1):
        total += term
        term *= math.cos(theta) ** 2 * (2 * k - 1) / (2 * k)
    return math.sin(theta) * total


@pytest.mark.parametrize("degrees", [*range(1, 41), 60, 100, 120, 500])
def test_t_quantile_encloses_95_percent(degrees: int) -> None:
    assert t_inside(t_quantile(degrees), degrees) == pytest.approx(0.95, abs=1e-6)


@pytest.mark.parametrize(
    ("degrees", "table"), [(1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (11, 2.201), (30, 2.042), (120, 1.980)]
)
def test_t_quantile_matches_printed_tables(degrees: int, table: float) -> None:
    assert t_quantile(degrees) == pytest.approx(table, abs=5e-4)


def test_t_quantile_needs_a_degree_of_freedom() -> None:
    with pytest.raises(ValueError, match="degrees_of_freedom=0"):
        t_quantile(0)


# 81 of 263 is the worked example of Newcombe (1998), table I.
@pytest.mark.parametrize(
    ("correct", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_newcombe(correct: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(correct, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_stays_inside() -> None:
    for trials in range(1, 30):
        for correct in range(trials + 1):
            low, high = wilson_interval(correct, trials)
            other_low, other_high = wilson_interval(trials - correct, trials)
            assert 0 <= low <= correct / trials <= high <= 1
            assert (low, high) == pytest.approx((1 - other_high, 1 - other_low))
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=5e-5)


@pytest.mark.parametrize(("correct", "trials"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_impossible_counts(correct: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"correct={correct}"):
        wilson_interval(correct, trials)


def test_mean_interval_by_hand() -> None:
    # Standard deviation of 1, 2, 3, 4, 5 is sqrt(2.5); t(4) = 2.7764.
    half = 2.7764451 * math.sqrt(2.5 / 5)
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - half, 3 + half))


def test_interval_of_log_probabilities_does_not_go_above_zero() -> None:
    mean, low, _ = mean_interval([-0.1, -0.3])
    assert log_probability_interval([-0.1, -0.3]) == (mean, low, 0.0)
    assert log_probability_interval([-5.0, -5.1, -5.2]) == mean_interval([-5.0, -5.1, -5.2])
    assert log_probability_interval([-5.0]) == (-5.0, None, None)


def test_mean_interval_of_equal_values_has_no_width() -> None:
    assert mean_interval([2.5, 2.5, 2.5]) == (2.5, 2.5, 2.5)


def test_mean_interval_of_one_and_of_no_value() -> None:
    assert mean_interval([1.5]) == (1.5, None, None)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_mean_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    generator = random.Random(0)
    covered = 0
    for _ in range(4000):
        _, low, high = mean_interval([generator.gauss(1, 2) for _ in range(4)])
        assert low is not None
        assert high is not None
        covered += low <= 1 <= high
    assert covered / 4000 == pytest.approx(0.95, abs=0.015)


def test_paired_difference_removes_what_pairs_share() -> None:
    a, b = [1.0, 5.0, 9.0], [0.5, 4.0, 8.5]
    assert paired_difference(a, b) == mean_interval([0.5, 1.0, 0.5])
    with pytest.raises(ValueError, match="2 and 3"):
        paired_difference([1, 2], [1, 2, 3])


def test_paired_difference_with_weights_is_the_difference_of_the_weighted_means() -> None:
    a, b, weights = [1.0, 5.0, 9.0], [0.5, 4.0, 8.75], [3, 1, 1]
    found = paired_difference(a, b, weights)
    assert found.mean == pytest.approx(token_weighted_mean(a, weights) - token_weighted_mean(b, weights))
    assert found == weighted_mean_interval([0.5, 1.0, 0.25], weights)


def test_token_weighted_mean() -> None:
    assert token_weighted_mean([2.0, 4.0], [300, 100]) == pytest.approx(2.5)
    with pytest.raises(ValueError, match="at least one token"):
        token_weighted_mean([], [])
    with pytest.raises(ValueError, match="1 losses and 2"):
        token_weighted_mean([1.0], [1, 2])


def test_wilson_of_partial_scores_lies_between_those_of_whole_answers() -> None:
    lower, between, upper = (wilson_interval(correct, 10) for correct in (3, 3.5, 4))
    assert lower[0] < between[0] < upper[0]
    assert lower[1] < between[1] < upper[1]


def test_weighted_interval_with_equal_weights_is_the_ordinary_one() -> None:
    values = [1.0, 2.5, 2.0, 7.0]
    assert weighted_mean_interval(values, [5] * 4) == pytest.approx(mean_interval(values))


def test_weighted_interval_by_hand() -> None:
    # Mean (3 * 1 + 1 * 5) / 4 = 2; residuals weighted by weight / 2: -1.5 and 1.5; t(1) = 12.7062.
    half = 12.7062047 * math.sqrt((1.5**2 + 1.5**2) / 1 / 2)
    assert weighted_mean_interval([1.0, 5.0], [3, 1]) == pytest.approx((2.0, 2.0 - half, 2.0 + half))
    assert weighted_mean_interval([1.0], [3]) == (1.0, None, None)


def test_weighted_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    generator = random.Random(0)
    covered = 0
    for _ in range(2000):
        weights = [generator.randint(50, 150) for _ in range(20)]
        _, low, high = weighted_mean_interval([generator.gauss(1, 2) for _ in weights], weights)
        assert low is not None
        assert high is not None
        covered += low <= 1 <= high
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_normal_interval() -> None:
    assert normal_interval(0.5, 0.1) == pytest.approx((0.5, 0.304, 0.696), abs=1e-4)
    assert normal_interval(0.5, None) == (0.5, None, None)
