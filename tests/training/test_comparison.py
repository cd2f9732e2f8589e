"""Paired statistics against closed forms."""

import math

import numpy as np
import pytest
import torch

from wrinklefree.training.comparison import (
    STUDENT_T_95,
    Interval,
    gap_closure,
    gap_closure_over_seeds,
    mcnemar_p,
    over_seeds,
    paired_difference,
    ratio_interval,
)


def test_bootstrap_interval_of_a_constant_ratio_is_that_ratio() -> None:
    interval = ratio_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert interval.low == interval.high == pytest.approx(2.0)


def test_bootstrap_interval_covers_about_two_standard_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, generator=generator).tolist()
    interval = ratio_interval(values, [1.0] * 400)
    assert interval.high - interval.low == pytest.approx(4 / 400**0.5, rel=0.15)


def test_gap_closure_is_the_share_of_the_gap() -> None:
    weights = [1.0, 2.0, 1.0, 2.0]
    control = [1.0, 2.0, 1.0, 2.0]
    baseline = [2.0, 4.0, 2.0, 4.0]
    student = [1.25, 2.5, 1.25, 2.5]
    assert gap_closure(baseline, student, control, weights, smallest_gap=0.03).value == pytest.approx(0.75)


def test_gap_closure_is_undefined_where_there_is_no_gap() -> None:
    ones = [1.0] * 100
    small = gap_closure([1.01] * 100, ones, ones, ones, smallest_gap=0.03)
    assert small.value is None
    assert "below 0.03" in small.reason
    noise = [1.1 + (3 if i % 2 else -3) for i in range(100)]
    noisy = gap_closure(noise, ones, ones, ones, smallest_gap=0.03)
    assert noisy.value is None
    assert "3 standard errors" in noisy.reason


def test_paired_difference_ignores_what_both_share() -> None:
    """Items vary by far more than the models differ; pairing leaves the difference alone."""
    items = np.random.default_rng(0).normal(0, 100, 200)
    difference = paired_difference(items + 1.0, items, np.ones(200))
    assert difference.value == pytest.approx(1.0)
    assert difference.interval.low == pytest.approx(1.0)
    assert difference.interval.high == pytest.approx(1.0)
    assert difference.excludes_zero
    assert difference.mcnemar is None


def test_paired_difference_of_hits_counts_what_only_one_got_right() -> None:
    first, second = [1.0, 1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 0.0]
    difference = paired_difference(first, second, [1.0] * 5)
    assert difference.value == pytest.approx(0.4)
    assert (difference.only_first, difference.only_second) == (3, 1)
    # Four coin flips, at most one tail or at most one head: 2 * (1 + 4) / 16.
    assert difference.mcnemar == pytest.approx(10 / 16)


def test_items_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3 items"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 1.0])


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"), [(0, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 1024), (0, 3, 0.25), (2, 8, 112 / 1024)]
)
def test_mcnemar_is_a_two_sided_binomial_test(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar_p(only_first, only_second) == pytest.approx(p)


def test_mcnemar_of_many_items_does_not_overflow() -> None:
    assert 0 < mcnemar_p(4000, 4300) < 0.01


def test_the_interval_over_seeds_is_student_t() -> None:
    mean, interval = over_seeds([1.0, 2.0, 3.0], [Interval(0, 0)] * 3)
    half = STUDENT_T_95[1] / math.sqrt(3)
    assert mean == 2.0
    assert (interval.low, interval.high) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_one_seed_keeps_the_interval_over_items() -> None:
    assert over_seeds([0.5], [Interval(0.4, 0.6)]) == (0.5, Interval(0.4, 0.6))


def test_gap_closure_over_seeds_is_the_ratio_of_means() -> None:
    """A gap that differs as much between seeds as it is large is undefined; else sums of gains over sums of gaps."""
    control = np.ones((2, 50))
    baseline = control + np.array([[1.0], [2.2]])
    student = baseline - np.array([[0.5], [1.6]])
    closure = gap_closure_over_seeds(baseline, student, control, np.ones(50), smallest_gap=0.03)
    assert closure.value is None
    assert "3 standard errors" in closure.reason, "gaps of 1 and 2.2 have a standard error of 0.6"
    close = control + np.array([[1.9], [2.0]])
    closure = gap_closure_over_seeds(close, close - np.array([[0.5], [1.6]]), control, np.ones(50), smallest_gap=0.03)
    assert closure.value == pytest.approx(2.1 / 3.9)
    half = STUDENT_T_95[0] * abs(0.5 / 1.9 - 0.8) / 2
    assert closure.interval is not None
    assert closure.interval.high - closure.value == pytest.approx(half)


def test_gap_closure_of_one_seed_has_a_bootstrap_interval() -> None:
    generator = np.random.default_rng(1)
    control = generator.normal(1.0, 0.1, 300)
    baseline = control + generator.normal(1.0, 0.1, 300)
    student = baseline - 0.6 + generator.normal(0, 0.1, 300)
    closure = gap_closure(baseline, student, control, np.ones(300), smallest_gap=0.03)
    assert closure.value is not None
    assert closure.interval is not None
    assert closure.interval.low < closure.value < closure.interval.high
    assert closure.value == pytest.approx(0.6, abs=0.05)
