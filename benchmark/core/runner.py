"""Runs a trial in a process of its own: memory begins at nothing, and a trial that hangs or dies takes nothing along."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.core.child import JOB, RESULT
from benchmark.core.job import Job
from benchmark.core.metrics import BenchmarkMetrics, Failure
from wrinklefree.utils.errors import WrinkleFreeError

ROOT = Path(__file__).resolve().parents[2]
LOG = "log.txt"


class TrialError(WrinkleFreeError):
    """Something all trials need could not be made."""

    exit_code = 65


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: figures, or a failure."""

    seconds: float
    metrics: BenchmarkMetrics | None
    failure: Failure | None


def run_trial(job: Job, folder: Path, timeout: float) -> Outcome:
    """Run a job in a fresh process; its log stays in `folder` until the next trial of that folder."""
    tree, seconds, failure = _run(job, folder, timeout)
    if failure is None and tree is not None and tree["failure"] is not None:
        failure = Failure(**tree["failure"])
    metrics = None if failure is not None or tree is None else BenchmarkMetrics(**tree["metrics"])
    return Outcome(seconds, metrics, failure)


def run_preparation(job: Job, folder: Path, timeout: float) -> Path:
    """Run a job that trains nothing; the artifact it wrote.

    Raises:
        TrialError: it failed; one line with the reason.
    """
    tree, _, failure = _run(job, folder, timeout)
    if tree is not None and tree["failure"] is not None:
        failure = Failure(**tree["failure"])
    if failure is not None or tree is None:
        reason = "it wrote nothing" if failure is None else failure.reason
        raise TrialError(f"the model that all trials start from could not be made: {reason}; see {folder / LOG}")
    return Path(tree["artifact"])


def _run(job: Job, folder: Path, timeout: float) -> tuple[dict[str, Any] | None, float, Failure | None]:
    shutil.rmtree(folder, ignore_errors=True)
    job.write(folder / JOB)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    if job.threads is not None:
        environment |= {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    started = time.perf_counter()
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmark.core.child", str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Its own children too, workers of the data; and on Ctrl-C the trial itself.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
    seconds = time.perf_counter() - started
    if code is None:
        return None, seconds, Failure("timeout", f"killed after {timeout:g} s (benchmark.trial_timeout)")
    try:
        return json.loads((folder / RESULT).read_text(encoding="utf-8")), seconds, None
    except (OSError, ValueError):
        if code == -signal.SIGKILL:
            return None, seconds, Failure("out_of_memory", "killed by the system, which does that when memory runs out")
        return None, seconds, Failure("error", f"its process ended with {code} and wrote no result; see {folder / LOG}")
