"""From scores to mixture weights: evidence, a tempered target around the prior, a damped step, exact bounds.

Per update, with m_s the mean score of source s over its groups and e_s^2 that mean's squared standard error:

1. averages: M_s <- gamma m_s + (1 - gamma) M_s and E_s^2 <- gamma^2 e_s^2 + (1 - gamma)^2 E_s^2, both corrected for
   their start at zero; E_s is then the standard error of M_s, so agreement over updates counts as evidence;
2. z_s = (M_s - sum_r prior_r M_r) / its standard error. Groups, not sources, give the error: two sources would always
   be one deviation from their mean;
3. evidence: z_s moved towards 0 by `threshold` (below it nothing counts) and cut at +-`evidence_limit`, because a z
   grows with the number of groups and says how sure a difference is, not how large;
4. target = softmax(log prior + evidence / temperature);
5. weights <- (1 - learning_rate) weights + learning_rate target, projected onto {min <= w <= max, sum w = 1}.

Without evidence the target is the prior, so weights that once moved return to it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cheapertraining.errors import CheaperTrainingError

SUM_TOLERANCE = 1e-6
"""How far given weights may be from a sum of 1; they are then divided by their sum."""


@dataclass(frozen=True)
class MixtureUpdate:
    """What one update saw and did, by source."""

    scores: dict[str, float]
    """Mean score over groups, this update's."""
    z: dict[str, float]
    """Averaged score's distance from the mixture's, in standard errors."""
    target: dict[str, float]
    weights: dict[str, float]


class MixtureWeightCalculator:
    """Weights of data sources that follow influence scores.

    Args:
        prior: Source -> weight; positive, sum 1. Where weights start, and where they return without evidence.
        gamma_val: Share of the newest scores in the running averages, in (0, 1]. 1 forgets every earlier update.
        temperature: Divides the evidence. Towards infinity the target is the prior, towards 0 the best source takes all.
        learning_rate: Share of the way from the weights to the target that one update goes, in (0, 1].
        threshold: Standard errors by which a source must differ before that counts. At 2, chance moved a weight of four
            identical sources by up to 0.25 in 6000 updates (0.010 on average), at 3 by up to 0.11 (0.0005).
        evidence_limit: Largest evidence of a source; no two sources' target ratios differ from their prior ratio by
            more than exp(2 * evidence_limit / temperature).
        min_weight: Lower bound of every weight.
        max_weight: Upper bound of every weight.

    Raises:
        CheaperTrainingError: for a prior or a knob outside these ranges, or bounds that no weights satisfy.
    """

    def __init__(
        self,
        prior: Mapping[str, float],
        *,
        gamma_val: float = 0.1,
        temperature: float = 1.0,
        learning_rate: float = 0.2,
        threshold: float = 3.0,
        evidence_limit: float = 2.0,
        min_weight: float = 0.0,
        max_weight: float = 1.0,
    ) -> None:
        self.prior = checked_weights(prior, positive=True)
        _require(0 < gamma_val <= 1, "gamma_val", gamma_val, "in (0, 1]")
        _require(temperature > 0, "temperature", temperature, "positive")
        _require(0 < learning_rate <= 1, "learning_rate", learning_rate, "in (0, 1]")
        _require(threshold >= 0, "threshold", threshold, "at least 0")
        _require(evidence_limit > 0, "evidence_limit", evidence_limit, "positive")
        self.gamma_val, self.temperature, self.learning_rate = gamma_val, temperature, learning_rate
        self.threshold, self.evidence_limit = threshold, evidence_limit
        self.min_weight, self.max_weight = min_weight, max_weight
        start = project_to_bounds(list(self.prior.values()), min_weight, max_weight)
        self._weights = dict(zip(self.prior, start, strict=True))
        self._mean = dict.fromkeys(self.prior, 0.0)
        self._variance = dict.fromkeys(self.prior, 0.0)
        self._updates = 0

    @property
    def weights(self) -> dict[str, float]:
        """The current weights; they sum to 1."""
        return dict(self._weights)

    @property
    def updates(self) -> int:
        """Updates so far."""
        return self._updates

    def update(self, scores: Mapping[str, Sequence[float]]) -> MixtureUpdate:
        """Move the weights once.

        Args:
            scores: Source -> benefit of each of its groups; at least two groups, higher is better.

        Raises:
            CheaperTrainingError: when a source is missing or unknown, has fewer than two groups, or a score is not
                finite. Nothing has moved then.
        """
        self._check_scores(scores)
        means: dict[str, float] = {}
        for name in self.prior:
            values = [float(value) for value in scores[name]]
            means[name] = mean = math.fsum(values) / len(values)
            squared_error = math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values)
            gamma = self.gamma_val
            self._mean[name] = gamma * mean + (1 - gamma) * self._mean[name]
            self._variance[name] = gamma**2 * squared_error + (1 - gamma) ** 2 * self._variance[name]
        self._updates += 1
        z = self._z()
        target = self._target(z)
        rate = self.learning_rate
        moved = [(1 - rate) * weight + rate * target[name] for name, weight in self._weights.items()]
        self._weights = dict(zip(self.prior, project_to_bounds(moved, self.min_weight, self.max_weight), strict=True))
        return MixtureUpdate(means, z, target, self.weights)

    def state_dict(self) -> dict[str, Any]:
        """Weights and running averages; plain numbers and strings."""
        return {
            "weights": dict(self._weights),
            "mean": dict(self._mean),
            "variance": dict(self._variance),
            "updates": self._updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`'s return value.

        Raises:
            CheaperTrainingError: when it was saved with other sources.
        """
        if set(state["weights"]) != set(self.prior):
            raise CheaperTrainingError(
                f"the saved mixture has sources {', '.join(sorted(state['weights']))}, this one has "
                f"{', '.join(sorted(self.prior))}: continue with the same sources, or leave the influence state out"
            )
        self._weights = {name: float(state["weights"][name]) for name in self.prior}
        self._mean = {name: float(state["mean"][name]) for name in self.prior}
        self._variance = {name: float(state["variance"][name]) for name in self.prior}
        self._updates = int(state["updates"])

    def _z(self) -> dict[str, float]:
        """Both averages carry the same correction for their start at zero, so it cancels here."""
        centre = math.fsum(self.prior[name] * self._mean[name] for name in self.prior)
        z: dict[str, float] = {}
        for name in self.prior:
            difference = self._mean[name] - centre
            variance = math.fsum(
                ((other == name) - share) ** 2 * self._variance[other] for other, share in self.prior.items()
            )
            # Scores that never vary: a difference at the level of rounding is none, any other is certain.
            rounding = 1e-12 * max(abs(mean) for mean in self._mean.values())
            if abs(difference) <= rounding:
                z[name] = 0.0
            else:
                z[name] = difference / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, difference)
        return z

    def _target(self, z: Mapping[str, float]) -> dict[str, float]:
        logits: dict[str, float] = {}
        for name, prior in self.prior.items():
            evidence = min(max(abs(z[name]) - self.threshold, 0.0), self.evidence_limit)
            logits[name] = math.log(prior) + math.copysign(evidence, z[name]) / self.temperature
        highest = max(logits.values())
        exponentials = {name: math.exp(logit - highest) for name, logit in logits.items()}
        total = math.fsum(exponentials.values())
        return {name: value / total for name, value in exponentials.items()}

    def _check_scores(self, scores: Mapping[str, Sequence[float]]) -> None:
        if set(scores) != set(self.prior):
            raise CheaperTrainingError(
                f"scores for {', '.join(sorted(scores)) or 'no source'}, weights for {', '.join(sorted(self.prior))}: "
                "they must name the same sources"
            )
        for name, values in scores.items():
            if len(values) < 2:
                raise CheaperTrainingError(f"source {name} has {len(values)} group(s); a standard error needs two")
            if not all(math.isfinite(value) for value in values):
                raise CheaperTrainingError(f"source {name} has a score that is not finite")


def project_to_bounds(values: Sequence[float], low: float, high: float) -> list[float]:
    """The nearest point (Euclidean) with sum 1 and every entry within [low, high].

    It is clip(values - shift, low, high) for one shift. The sum falls piecewise linearly with the shift, with corners at
    values - low and values - high: the corners are searched, then the piece is solved exactly.

    Raises:
        CheaperTrainingError: when no such point exists.
    """
    count = len(values)
    if not 0 <= low <= high or count * low > 1 + 1e-12 or count * high < 1 - 1e-12:
        raise CheaperTrainingError(
            f"{count} weights between {low} and {high} cannot sum to 1: change min_weight or max_weight"
        )

    def clipped(shift: float) -> list[float]:
        return [min(max(value - shift, low), high) for value in values]

    corners = sorted({value - bound for value in values for bound in (low, high)})
    # The largest corner at which the sum is still at least 1: the solution lies between it and the next one.
    first, last = 0, len(corners) - 1
    while first < last:
        middle = (first + last + 1) // 2
        if math.fsum(clipped(corners[middle])) >= 1:
            first = middle
        else:
            last = middle - 1
    # Which entries are free is read off the middle of the piece, where rounding cannot put one on a corner.
    middle_shift = (corners[first] + corners[min(first + 1, len(corners) - 1)]) / 2
    free = [value for value in values if low < value - middle_shift < high]
    if not free:
        return clipped(middle_shift)
    at_high = sum(value - middle_shift >= high for value in values)
    fixed = at_high * high + (count - len(free) - at_high) * low
    return clipped((math.fsum(free) + fixed - 1) / len(free))


def checked_weights(weights: Mapping[str, float], *, positive: bool = False) -> dict[str, float]:
    """The weights, divided by their sum.

    Raises:
        CheaperTrainingError: without sources, for a weight that is negative (or zero, with `positive`) or not finite, or
            when the sum is not 1 to within 1e-6.
    """
    if not weights:
        raise CheaperTrainingError("no sources: give at least one source and its weight")
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0 or (positive and weight == 0):
            raise CheaperTrainingError(
                f"source {name} has weight {weight}: it must be {'positive' if positive else 'at least 0'} and finite"
            )
    total = math.fsum(weights.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise CheaperTrainingError(f"the weights of {', '.join(weights)} sum to {total:.6g}: they must sum to 1")
    return {name: weight / total for name, weight in weights.items()}


def _require(holds: bool, name: str, value: float, what: str) -> None:
    if not holds:
        raise CheaperTrainingError(f"{name} is {value}: it must be {what}")
