"""Comparing models that were scored on the same items: paired differences, McNemar's test, gap closure, means over seeds.

Two models that read the same documents differ by far less noise than either has by itself, so every comparison here is
paired by item. Over seeds the seeds are the sample, and Student's t the interval: a bootstrap over documents knows nothing
of what another pretraining seed would have changed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_SAMPLES = 2000
SMALLEST_GAP_BITS = 0.03
"""Bits per byte between baseline and control below which gap closure is undefined."""
SMALLEST_GAP_ACCURACY = 0.05
STUDENT_T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""97.5% quantiles of Student's t for 1, 2, ... degrees of freedom."""

Values = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95% interval: a percentile bootstrap, or Student's t over seeds."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How much one model's score is above another's on the same items."""

    value: float
    interval: Interval
    mcnemar: float | None = None
    """Two-sided exact p-value on the items that only one of the two got right; None where items are not right or wrong."""
    only_first: int = 0
    """Items that only the first model got right."""
    only_second: int = 0

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.interval.low > 0 or self.interval.high < 0


@dataclass(frozen=True)
class GapClosure:
    """How much of the gap between a baseline and its control a student closes."""

    value: float | None
    """1: as good as the control; None: undefined, see `reason`."""
    reason: str
    interval: Interval | None = None


def ratio_interval(numerators: Values, denominators: Values, *, seed: int = 0) -> Interval:
    """95% bootstrap interval of sum(numerators) / sum(denominators), resampling pairs."""
    generator = np.random.default_rng(seed)
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    picks = generator.integers(0, len(top), size=(BOOTSTRAP_SAMPLES, len(top)))
    samples = top[picks].sum(axis=1) / bottom[picks].sum(axis=1)
    low, high = np.percentile(samples, [2.5, 97.5])
    return Interval(float(low), float(high))


def paired_difference(first: Values, second: Values, weights: Values) -> Difference:
    """sum(first - second) / sum(weights) with a bootstrap over items; McNemar where every item is 0 or 1 of weight 1.

    Raises:
        ValueError: the two were not scored on equally many items.
    """
    a, b, weight = (np.asarray(values, dtype=np.float64) for values in (first, second, weights))
    if not len(a) == len(b) == len(weight):
        raise ValueError(f"{len(a)} and {len(b)} items of {len(weight)} weights cannot be paired")
    value, interval = float((a - b).sum() / weight.sum()), ratio_interval(a - b, weight)
    if not (np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all() and (weight == 1).all()):
        return Difference(value, interval)
    only_first, only_second = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    return Difference(value, interval, mcnemar_p(only_first, only_second), only_first, only_second)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value: were the items on which two models differ a fair coin's?"""
    total, extreme = only_first + only_second, min(only_first, only_second)
    if total == 0:
        return 1.0
    logs = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) - total * math.log(2)
        for k in range(extreme + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def over_seeds(values: Sequence[float], intervals: Sequence[Interval]) -> tuple[float, Interval]:
    """Mean and 95% interval: the item bootstrap's for one seed, Student's t over several (what seeds differ by)."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, intervals[0]
    error = standard_error(values)
    half = STUDENT_T_95[min(len(values) - 2, len(STUDENT_T_95) - 1)] * error
    return mean, Interval(mean - half, mean + half)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of independent values; 0 of a single one."""
    return float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0


def gap_closure(
    baseline: Values, student: Values, control: Values, weights: Values, *, smallest_gap: float
) -> GapClosure:  # fmt: skip
    """(baseline - student) / (baseline - control) for means of paired per-item values, weighted by `weights`.

    Lower is better: pass errors, not accuracies. Undefined when the gap is below `smallest_gap` or 3 standard errors of
    the paired difference, where any ratio would be noise.
    """
    return gap_closure_over_seeds([baseline], [student], [control], weights, smallest_gap=smallest_gap)


def gap_closure_over_seeds(
    baseline: Sequence[Values], student: Sequence[Values], control: Sequence[Values], weights: Values, *,
    smallest_gap: float,
) -> GapClosure:  # fmt: skip
    """Gap closure of means over seeds. Arguments are per seed, then per item; lower is better.

    The gap's standard error is the larger of the one over items and the one over seeds. The interval is Student's t over
    the seeds' own closures, or a bootstrap over items when there is one seed.
    """
    base, mine, best = (np.asarray(values, dtype=np.float64) for values in (baseline, student, control))
    weight = np.asarray(weights, dtype=np.float64)
    gaps = (base - best).sum(axis=1) / weight.sum()
    gains = (base - mine).sum(axis=1) / weight.sum()
    gap = float(gaps.mean())
    error = max(_error_over_items((base - best).mean(axis=0), weight), standard_error(gaps.tolist()))
    if gap < smallest_gap:
        return GapClosure(None, f"undefined: the gap is {gap:.4f}, below {smallest_gap:g}")
    if gap < 3 * error:
        return GapClosure(None, f"undefined: the gap is {gap:.4f}, below 3 standard errors ({3 * error:.4f})")
    value = float(gains.mean()) / gap
    if len(gaps) == 1:
        interval = ratio_interval((base - mine)[0], (base - best)[0])
    else:
        closures = (gains / gaps).tolist()
        center, interval = over_seeds(closures, [])
        interval = Interval(interval.low - center + value, interval.high - center + value)
    return GapClosure(value, f"gap {gap:.4f}, standard error {error:.4f}", interval)


def _error_over_items(differences: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Standard error of sum(differences) / sum(weights) over items."""
    total = weights.sum()
    residual = differences - differences.sum() / total * weights
    return float(np.sqrt((residual**2).sum() * len(weights) / max(len(weights) - 1, 1)) / total)
