"""What a trial is measured by, and the record of one."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

GIGABYTE = 1e9

FailureKind = Literal["out_of_memory", "not_finite", "timeout", "error"]
TrialKind = Literal["default", "search", "confirm"]


@dataclass(frozen=True)
class BenchmarkMetrics:
    """A completed trial in figures."""

    tokens_per_second: float
    """Positions trained on in the measured window, over its wall-clock time, in which updates of the data mixture count as
    much as they would in a run of the reference length."""
    peak_bytes: int
    """GPU: most memory that tensors held at once. CPU: the process's own peak, interpreter and libraries included."""
    loss: float
    """After the trial, nats a token: of held-out text, or the mean training loss of the last quarter where none is held
    out."""
    steps: int
    """Optimizer steps, unmeasured ones included."""
    tokens: int
    window_seconds: float
    measured_on: str
    """Device, for the report."""
    memory_is: Literal["device", "process"]
    loss_is: Literal["validation", "training"]
    influence_seconds: float = 0.0
    """Time of the window that went into updates of the data mixture."""

    @property
    def peak_gigabytes(self) -> float:
        """Peak memory in 10^9 bytes."""
        return self.peak_bytes / GIGABYTE

    @property
    def efficiency(self) -> float:
        """The objective: tokens a second for each gigabyte of peak memory."""
        return self.tokens_per_second / self.peak_gigabytes

    def problem(self) -> str | None:
        """Why the figures cannot be used, if they cannot."""
        for name in ("tokens_per_second", "peak_bytes", "window_seconds"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                return f"{name} is {value}"
        return None if math.isfinite(self.loss) else f"the loss after the trial is {self.loss}"


@dataclass(frozen=True)
class Failure:
    """A trial without figures."""

    kind: FailureKind
    reason: str
    """One line."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial as it is stored."""

    kind: TrialKind
    index: int
    """Ax's number of a searched trial; how many came before of the other kinds."""
    parameters: dict[str, Any]
    """Knob -> value, those without effect left out; empty for the default configuration."""
    seed: int
    method: str
    """Who chose it: `default`, `best`, or the name of Ax's generation node."""
    seconds: float
    """Wall-clock time of the whole process."""
    metrics: BenchmarkMetrics | None = None
    failure: Failure | None = None
    overrides: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """A plain tree."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "TrialRecord":
        """The record that `as_json` wrote.

        Raises:
            KeyError, TypeError: it is none.
        """
        metrics, failure = tree["metrics"], tree["failure"]
        return cls(
            **{
                **tree,
                "metrics": None if metrics is None else BenchmarkMetrics(**metrics),
                "failure": None if failure is None else Failure(**failure),
            }
        )
