"""The process of one trial: `python -m benchmark.core.child FOLDER` reads FOLDER/job.json and writes FOLDER/result.json.

It ends when its standard input is closed, so a benchmark that is killed takes its trial along.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark.core.job import Job
from benchmark.core.memory import peak_memory
from benchmark.core.metrics import BenchmarkMetrics, Failure
from wrinklefree.cli import set_up_logging
from wrinklefree.composition import compose
from wrinklefree.training.callbacks import Callback, RunInfo, StepReport
from wrinklefree.utils.errors import NonFiniteError, OutOfMemoryError, WrinkleFreeError
from wrinklefree.utils.storage import atomic_write

JOB, RESULT = "job.json", "result.json"
ORPHANED = 71
LAST_QUARTER = 4

logger = logging.getLogger(__name__)


class Meter(Callback):
    """Times the window of a trial, and keeps what is needed of its losses."""

    def __init__(self, unmeasured_tokens: int) -> None:
        self._unmeasured = unmeasured_tokens
        self._began: tuple[float, int] | None = None
        self._ended: tuple[float, int] | None = None
        self.losses: list[float] = []
        self.evaluation: dict[str, float] = {}
        self.mixture_seconds = 0.0
        """Of the window, in updates of the data mixture."""

    def on_start(self, run: RunInfo) -> None:
        """Nothing is measured yet."""

    def on_step(self, report: StepReport) -> None:
        """Begin the window after the unmeasured tokens; its end moves with every step."""
        now = (time.perf_counter(), report.tokens)
        if self._began is not None:
            self.mixture_seconds += report.metrics.get("influence_seconds", 0.0)
        elif report.tokens >= self._unmeasured:
            self._began = now
        self._ended = now
        self.losses.append(report.terms.get("cross_entropy", report.loss))

    def on_evaluation(self, report: StepReport) -> None:
        """Keep the last validation."""
        self.evaluation = dict(report.evaluation or {})

    def window(self) -> tuple[int, float]:
        """(tokens, seconds) of the measured steps."""
        if self._began is None or self._ended is None:
            return 0, 0.0
        return self._ended[1] - self._began[1], self._ended[0] - self._began[0]


def measure(job: Job) -> BenchmarkMetrics:
    """Train as `scripts/train.py` would, and measure.

    Raises:
        WrinkleFreeError: what the run raises.
    """
    import math

    import torch

    from wrinklefree.training.plan import StagePlan
    from wrinklefree.training.run import plan_stage, run_stage

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    config, tree = compose(job.overrides)
    plan: StagePlan = plan_stage(config, tree)
    meter = Meter(job.unmeasured_tokens)
    run_stage(plan, [meter])
    tokens, window = meter.window()
    seconds = window - meter.mixture_seconds * (1 - job.mixture_share)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak, kind = peak_memory(device)
    perplexity = meter.evaluation.get("perplexity")
    last = meter.losses[-max(1, len(meter.losses) // LAST_QUARTER) :]
    measured_on = f"CPU, {torch.get_num_threads()} thread(s)"
    if device.type == "cuda":
        measured_on = torch.cuda.get_device_name(device)
    return BenchmarkMetrics(
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        peak_bytes=peak,
        loss=math.log(perplexity) if perplexity is not None else sum(last) / len(last),
        steps=len(meter.losses),
        tokens=tokens,
        window_seconds=window,
        measured_on=measured_on,
        memory_is=kind,
        influence_seconds=meter.mixture_seconds,
        loss_is="training" if perplexity is None else "validation",
    )  # fmt: skip


def prepare(job: Job) -> str:
    """Run a stage that trains nothing; the folder of its artifact."""
    from wrinklefree.training.run import plan_stage, run_stage

    config, tree = compose(job.overrides)
    plan = plan_stage(config, tree)
    run_stage(plan)
    return str(plan.artifact)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job of a folder; 0 when a result was written, be it a failure."""
    folder = Path((sys.argv[1:] if argv is None else list(argv))[0])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    set_up_logging()
    result: dict[str, Any] = {"metrics": None, "failure": None, "artifact": None}
    try:
        job = Job.read(folder / JOB)
        if any(override == "training=stage1_subln" for override in job.overrides):
            result["artifact"] = prepare(job)
        else:
            metrics = measure(job)
            problem = metrics.problem()
            if problem is None:
                result["metrics"] = asdict(metrics)
            else:
                result["failure"] = asdict(Failure("not_finite" if "loss" in problem else "error", problem))
    except OutOfMemoryError as error:
        result["failure"] = asdict(Failure("out_of_memory", str(error)))
    except NonFiniteError as error:
        result["failure"] = asdict(Failure("not_finite", str(error)))
    except WrinkleFreeError as error:
        result["failure"] = asdict(Failure("error", str(error)))
    except Exception as error:  # the benchmark goes on; the log holds the traceback
        logger.exception("a defect ended this trial")
        result["failure"] = asdict(Failure("error", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
    atomic_write(folder / RESULT, json.dumps(result))
    return 0


def _end_with_parent() -> None:
    while os.read(0, 1):  # no lock of Python is held, as sys.stdin would
        pass
    os._exit(ORPHANED)


if __name__ == "__main__":
    sys.exit(main())
