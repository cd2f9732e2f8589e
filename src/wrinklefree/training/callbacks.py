"""What happens beside a training step, one concern each. Callbacks receive records, never the trainer.

Order matters in one way: `QuantizationTelemetry` adds to `StepReport.metrics` and so comes before `MetricsFile`, and
`LossPlot` draws what `MetricsFile` wrote and so comes after it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first step."""

    stage: str
    run_dir: Path
    """Folder of the run."""
    total_steps: int
    first_step: int = 0
    """Steps already done: 0, or the step of the checkpoint that the run resumes from."""


@dataclass(frozen=True)
class StepReport:
    """One update, in plain Python numbers: reading it never synchronises a device."""

    step: int
    """Updates done, this one included: 1 after the first."""
    total_steps: int
    loss: float
    terms: Mapping[str, float]
    """Name -> unweighted value; the loss is the sum of value times weight."""
    weights: Mapping[str, float]
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Positions trained on since the start of the run, across resumes."""
    tokens_per_second: float
    step_seconds: float
    eta_seconds: float
    quantization_lambda: float = 1.0
    subln_strength: float = 1.0
    skipped: bool = False
    """The loss or a gradient was not finite, and no weight was changed."""
    evaluation: Mapping[str, float] | None = None
    """Validation after this update, when there was one."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further figures; a callback may add its own for those after it."""


class Callback(Protocol):
    """Hooks of `Trainer.fit`, called on rank 0 in the order of the list."""

    def on_start(self, run: RunInfo) -> None:
        """Before the first step, fresh or resumed."""
        ...

    def on_step(self, report: StepReport) -> None:
        """After every reported update."""
        ...

    def on_evaluation(self, report: StepReport) -> None:
        """After a validation; `report.evaluation` is set and `on_step` has seen the same step."""
        ...

    def on_end(self, report: StepReport) -> None:
        """After the last step, and its validation."""
        ...
