"""A weighted sum of terms: the one implementation of `Objective`.

A term is a sum over rows divided by its own global count. Weights are numbers, or `auto`: fixed once, before the first
update, so that the weighted term equals cross-entropy on that first batch.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from wrinklefree.distillation.objective import Losses
from wrinklefree.models.records import Batch, ModelOutput, Wants
from wrinklefree.utils.errors import ConfigError, NonFiniteError

logger = logging.getLogger(__name__)

CROSS_ENTROPY = "cross_entropy"
"""Name of the term that `auto` weights are measured against."""


@dataclass(frozen=True)
class TermValues:
    """What a term adds to one micro-batch's loss."""

    weighted: Tensor
    """Scalar to differentiate: the sum of weight * value over the term's names."""
    values: dict[str, Tensor]
    """Name -> unweighted scalar, detached."""


class Term(Protocol):
    """One loss, or several that share a pass (cross-entropy and logit KL share the head)."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values, as in `Losses.terms`."""
        ...

    @property
    def student_wants(self) -> Wants:
        """What it reads of the student's forward pass."""
        ...

    @property
    def teacher_wants(self) -> Wants | None:
        """What it reads of the teacher's; None: no teacher."""
        ...

    @property
    def smallest_value(self) -> float:
        """Values below this mean "the student is the teacher"; an `auto` weight is not raised further."""
        ...

    def counts(self, batch: Batch) -> dict[str, float]:
        """Local denominator of each name, from the CPU batch."""
        ...

    def __call__(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        batch: Batch,
        counts: Mapping[str, float],
        weights: Mapping[str, float],
    ) -> TermValues:
        """Values of the micro-batch, each divided by its global count."""
        ...


def reciprocal(count: float) -> float:
    """1 / count, or 0 for a term that has nothing to count anywhere in the step."""
    return 1.0 / count if count > 0 else 0.0


def require_teacher(teacher: ModelOutput | None, name: str) -> ModelOutput:
    """The teacher's output; a caller that ran no teacher made a programming error."""
    if teacher is None:
        raise TypeError(f"the term {name} compares with a teacher, but no teacher output was passed")
    return teacher


def merge_wants(wants: Sequence[Wants]) -> Wants:
    """The union of several needs; two different Q/K/V layers cannot be served by one forward pass."""
    layers = sorted({layer for want in wants for layer in want.hidden_layers})
    taps = {want.qkv_layer for want in wants if want.qkv_layer is not None}
    if len(taps) > 1:
        raise ValueError(f"terms ask for the Q, K, V states of several layers: {sorted(taps)}")
    return Wants(hidden_layers=tuple(layers), qkv_layer=taps.pop() if taps else None)


class WeightedSum:
    """Objective: sum of weight * term. Implements `wrinklefree.distillation.objective.Objective`."""

    def __init__(self, terms: Sequence[Term], weights: Mapping[str, float | Literal["auto"]]) -> None:
        """Keep `terms`; `weights` must name exactly their values. A weight of 0 makes a value a diagnostic."""
        names = [name for term in terms for name in term.names]
        if sorted(names) != sorted(weights):
            raise ValueError(f"weights name {sorted(weights)}, the terms are {sorted(names)}")
        self._terms = tuple(terms)
        self._weights: dict[str, float] = {name: float(w) for name, w in weights.items() if w != "auto"}
        self._automatic = tuple(name for name, w in weights.items() if w == "auto")
        self._floors = {name: term.smallest_value for term in terms for name in term.names}
        self.student_wants: Wants = merge_wants([term.student_wants for term in terms])
        teacher_wants = [term.teacher_wants for term in terms if term.teacher_wants is not None]
        self.teacher_wants: Wants | None = merge_wants(teacher_wants) if teacher_wants else None

    @property
    def needs_calibration(self) -> bool:
        """Whether an `auto` weight is still open."""
        return any(name not in self._weights for name in self._automatic)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms in the order of the sum."""
        return self._terms

    @property
    def weights(self) -> dict[str, float]:
        """Weights in force; an open `auto` weight counts as 0."""
        return {name: self._weights.get(name, 0.0) for term in self._terms for name in term.names}

    def alone(self, name: str) -> "WeightedSum":
        """The same terms with every weight but that of `name` at 0: its share of the gradient."""
        return WeightedSum(self._terms, {other: w if other == name else 0.0 for other, w in self.weights.items()})

    def counts(self, batch: Batch) -> dict[str, float]:
        """Local denominators by term, from the CPU batch; the trainer sums them over micro-batches and ranks."""
        counted: dict[str, float] = {}
        for term in self._terms:
            counted.update(term.counts(batch))
        return counted

    def __call__(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, counts: Mapping[str, float]
    ) -> Losses:
        """Terms of this micro-batch, each divided by its global count, and their weighted sum."""
        if self.needs_calibration and torch.is_grad_enabled():
            raise RuntimeError(
                f"the weights of {', '.join(self._automatic)} are auto and still open: evaluate the first step's "
                "micro-batches under torch.no_grad() and pass the summed terms to calibrate() before training"
            )
        weights = self.weights
        parts = [term(student, teacher, batch, counts, weights) for term in self._terms]
        total = parts[0].weighted
        for part in parts[1:]:
            total = total + part.weighted
        values = {name: value for part in parts for name, value in part.values.items()}
        return Losses(total=total, terms=values, weights=weights)

    def calibrate(self, terms: Mapping[str, float]) -> None:
        """Fix every open `auto` weight so that the weighted term equals cross-entropy; later calls change nothing.

        A student that still is its teacher (all warm-ups at 0) has a term near 0, and dividing by it would let that
        term drown everything once the warm-up moves: the divisor stops at the term's `smallest_value`.

        Args:
            terms: Step-0 values by name, summed over micro-batches and ranks.

        Raises:
            NonFiniteError: A value is NaN or infinite.
            ConfigError: Cross-entropy is not positive, so there is nothing to measure against.
        """
        if not self.needs_calibration:
            return
        reference = terms[CROSS_ENTROPY]
        for name in self._automatic:
            value = terms[name]
            if not (math.isfinite(reference) and math.isfinite(value)):
                raise NonFiniteError(
                    f"step 0 gives {CROSS_ENTROPY}={reference} and {name}={value}: an automatic weight needs finite "
                    "values; check the input artifact, or set the weight to a number"
                )
            if reference <= 0:
                raise ConfigError(
                    f"the weight of {name} is auto (equal to {CROSS_ENTROPY} at step 0), but {CROSS_ENTROPY} is "
                    f"{reference}: set the weight to a number, or check that the data has targets"
                )
            floor = self._floors[name]
            if value < floor:
                logger.warning(
                    "%s is %.3g at step 0, below %.3g: the student still equals its teacher; "
                    "its automatic weight is limited to %.6g",
                    name,
                    value,
                    floor,
                    reference / floor,
                )
            self._weights[name] = reference / max(value, floor)
            logger.info("weight of %s set to %.6g (%.6g at step 0)", name, self._weights[name], value)

    def state_dict(self) -> dict[str, float]:
        """The `auto` weights fixed so far."""
        return {name: self._weights[name] for name in self._automatic if name in self._weights}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore `state_dict`; afterwards `calibrate` changes nothing."""
        unknown = sorted(set(state) - set(self._automatic))
        if unknown:
            raise ConfigError(
                f"the checkpoint holds automatic weights for {', '.join(unknown)}, but this run's weights are "
                f"{'numbers' if not self._automatic else 'automatic for ' + ', '.join(self._automatic)}: "
                "resume with the configuration that wrote it, or start a new run"
            )
        self._weights.update({name: float(value) for name, value in state.items()})
