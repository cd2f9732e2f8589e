"""What the trials say, in figures: the best configuration, the noise, what each knob moves, optimizers, the Pareto front."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from benchmark.config.settings import OPTIMIZER, Knob, Settings
from benchmark.core.metrics import BenchmarkMetrics, TrialRecord
from wrinklefree.training.comparison import STUDENT_T_95

Measure = Callable[[BenchmarkMetrics], float]
MEASURES: dict[str, Measure] = {
    "tokens/s per GB": lambda metrics: metrics.efficiency,
    "tokens/s": lambda metrics: metrics.tokens_per_second,
    "peak memory": lambda metrics: metrics.peak_gigabytes,
    "loss": lambda metrics: metrics.loss,
}
OBJECTIVE, LOSS = "tokens/s per GB", "loss"


@dataclass(frozen=True)
class Spread:
    """Several measurements of the same thing."""

    count: int
    mean: float
    deviation: float
    """Sample standard deviation; NaN for fewer than two."""

    @property
    def share(self) -> float:
        """The deviation relative to the mean."""
        return self.deviation / self.mean


def spread(values: Sequence[float]) -> Spread:
    """Mean and deviation; of none, NaN."""
    if not values:
        return Spread(0, math.nan, math.nan)
    return Spread(len(values), fmean(values), stdev(values) if len(values) > 1 else math.nan)


@dataclass(frozen=True)
class Effect:
    """What moving a knob from its low to its high end does to a measure, all other knobs held."""

    knob: str
    measure: str
    change: float
    """Relative to the measure's mean over the trials."""
    low: float
    high: float
    """Ends of the 95% interval; NaN where there are too few trials."""
    from_value: Any
    to_value: Any
    trials: int
    noise: float
    """Deviation of the default's repeats, relative to their mean."""

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval excludes 0, and the change is more than two repeats of the same usually differ by."""
        certain = self.low > 0 or self.high < 0
        return certain and not abs(self.change) <= 2 * self.noise


@dataclass(frozen=True)
class Comparison:
    """The best configuration against the default, measured again by turns."""

    pairs: int
    ratio: float
    low: float
    high: float
    """Ends of the 95% interval of the mean ratio."""


def measured(records: Sequence[TrialRecord]) -> list[tuple[TrialRecord, BenchmarkMetrics]]:
    """The records with figures."""
    return [(record, record.metrics) for record in records if record.metrics is not None]


def best_record(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The one of the highest efficiency."""
    found = measured(records)
    return max(found, key=lambda pair: pair[1].efficiency)[0] if found else None


def pareto_front(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those that no other one beats in efficiency and loss at once, by falling efficiency."""
    found = sorted(measured(records), key=lambda pair: (-pair[1].efficiency, pair[1].loss))
    front: list[TrialRecord] = []
    lowest = math.inf
    for record, metrics in found:
        if metrics.loss < lowest:
            front.append(record)
            lowest = metrics.loss
    return front


def default_noise(records: Sequence[TrialRecord]) -> dict[str, Spread]:
    """Measure -> spread of the default's repeats."""
    found = [metrics for _, metrics in measured([record for record in records if record.kind == "default"])]
    return {name: spread([measure(metrics) for metrics in found]) for name, measure in MEASURES.items()}


def by_optimizer(records: Sequence[TrialRecord], settings: Settings) -> dict[str, list[BenchmarkMetrics]]:
    """Optimizer -> figures of the searched trials."""
    groups: dict[str, list[BenchmarkMetrics]] = {name: [] for name in settings.benchmark.optimizers}
    for record, metrics in measured([record for record in records if record.kind == "search"]):
        groups[str(record.parameters.get(OPTIMIZER, settings.benchmark.optimizers[0]))].append(metrics)
    return groups


def compare_best(records: Sequence[TrialRecord], measure: Measure) -> Comparison | None:
    """Best over default from the confirmation's pairs; None without one."""
    confirmed = [record for record in records if record.kind == "confirm"]
    pairs = [
        (best.metrics, default.metrics)
        for best, default in zip(confirmed[::2], confirmed[1::2], strict=False)
        if best.metrics is not None and default.metrics is not None
    ]
    if not pairs:
        return None
    logs = [math.log(measure(best) / measure(default)) for best, default in pairs]
    mean = fmean(logs)
    if len(logs) < 2:
        return Comparison(1, math.exp(mean), math.nan, math.nan)
    half = student_t(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return Comparison(len(logs), math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def effects(records: Sequence[TrialRecord], settings: Settings, measure: str) -> list[Effect]:
    """What each knob does, by least squares over the searched trials, the largest first.

    The logarithm of the measure is a sum of one term for each knob: linear in its value (in the logarithm of the value
    where the knob says so), or one for each value of a choice. A knob that another one switched off counts as at the mean
    of the others, so that it says nothing there. With few trials the intervals are wide: that is the point.
    """
    found = measured([record for record in records if record.kind == "search"])
    columns = [column for name, knob in settings.knobs.items() for column in _columns(name, knob, found)]
    columns = [column for column in columns if np.ptp(column.values) > 0]
    trials, unknowns = len(found), len(columns) + 1
    noise = default_noise(records)[measure].share
    if not columns or trials <= unknowns:
        return []
    target = np.log([MEASURES[measure](metrics) for _, metrics in found])
    design = np.column_stack([np.ones(trials), *(column.values - column.values.mean() for column in columns)])
    solution, _, rank, _ = np.linalg.lstsq(design, target, rcond=None)
    if rank < unknowns:
        return []
    residual = target - design @ solution
    variance = float(residual @ residual) / (trials - unknowns)
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * variance)
    half = student_t(trials - unknowns)
    made = [
        Effect(
            knob=column.knob, measure=measure, change=math.expm1(slope), low=math.expm1(slope - half * error),
            high=math.expm1(slope + half * error), from_value=column.start, to_value=column.end, trials=trials,
            noise=noise,
        )
        for column, slope, error in zip(columns, solution[1:].tolist(), errors[1:].tolist(), strict=True)
    ]  # fmt: skip
    return sorted(made, key=lambda effect: -abs(math.log1p(effect.change)))


@dataclass(frozen=True)
class _Column:
    """A knob's place in the design: 0 at its start, 1 at its end."""

    knob: str
    values: "np.ndarray[Any, np.dtype[np.float64]]"
    start: Any
    end: Any


def _columns(name: str, knob: Knob, found: Sequence[tuple[TrialRecord, BenchmarkMetrics]]) -> list[_Column]:
    given = [record.parameters.get(name) for record, _ in found]
    present = [value for value in given if value is not None]
    if not present:
        return []
    if knob.values is not None and not knob.numeric:
        first, *others = knob.values
        return [_Column(name, np.array([float(value == other) for value in given]), first, other) for other in others]
    low = float(knob.low if knob.low is not None else min(knob.values or ()))
    high = float(knob.high if knob.high is not None else max(knob.values or ()))
    scale: Callable[[float], float] = math.log if knob.log or (knob.values is not None and low > 0) else float
    places = [
        None if value is None else (scale(float(value)) - scale(low)) / (scale(high) - scale(low)) for value in given
    ]
    mean = fmean([place for place in places if place is not None])
    return [
        _Column(
            name, np.array([mean if place is None else place for place in places]), knob.low or low, knob.high or high
        )
    ]


def student_t(degrees: int) -> float:
    """Two-sided 95% quantile of Student's t."""
    return STUDENT_T_95[min(degrees, len(STUDENT_T_95)) - 1]


def as_tree(comparison: Comparison | None) -> Mapping[str, float] | None:
    """For JSON."""
    return None if comparison is None else {k: getattr(comparison, k) for k in ("pairs", "ratio", "low", "high")}
