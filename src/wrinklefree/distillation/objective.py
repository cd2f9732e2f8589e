"""What a stage minimises. An objective says what it wants of a forward pass and returns sums over global counts.

A sum over a *global* count makes accumulation, masks and sharding exact: micro-batches and ranks only add up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from wrinklefree.models.records import Batch, ModelOutput, Wants


@dataclass(frozen=True)
class Losses:
    """One micro-batch's part of the step's loss."""

    total: Tensor
    """Scalar to differentiate: the weighted sum of the terms."""
    terms: dict[str, Tensor]
    """Name -> unweighted scalar, detached; micro-batches add up to the step's value."""
    weights: dict[str, float]
    """Name -> weight of the term in `total`."""


class Objective(Protocol):
    """A loss with its needs."""

    student_wants: Wants
    teacher_wants: Wants | None
    """None: no teacher forward."""

    @property
    def needs_calibration(self) -> bool:
        """Whether an `auto` weight is still to be fixed by `calibrate`."""
        ...

    def counts(self, batch: Batch) -> dict[str, float]:
        """Local denominators by term, from the CPU batch; the trainer sums them over micro-batches and ranks."""
        ...

    def __call__(
        self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch, counts: Mapping[str, float]
    ) -> Losses:
        """Terms of this micro-batch, each divided by its global count."""
        ...

    def calibrate(self, terms: Mapping[str, float]) -> None:
        """Called once, before the first update, with the step-0 terms: `auto` weights are fixed here."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What `calibrate` fixed, for the checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore `state_dict`; afterwards `calibrate` changes nothing."""
        ...
