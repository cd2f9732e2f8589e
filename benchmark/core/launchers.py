"""Who runs a trial: this machine, one after the other, or a Slurm cluster through submitit, several at once.

On a cluster every trial is a job of its own, on a node of its own for as long as it measures; the benchmark itself only
proposes and waits, so it can run on a login node. `benchmark.output_dir` must be a folder that all nodes see.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark.config.settings import BenchmarkConfig
from benchmark.core.job import Job
from benchmark.core.metrics import Failure
from benchmark.core.runner import Outcome, run_trial
from wrinklefree.utils.errors import ConfigError

logger = logging.getLogger(__name__)

Run = Callable[[Job, Path, float], Outcome]
QUEUE_MINUTES = 10
"""Time of a job beyond the trial's own: for the node to start Python."""


def make_launcher(told: BenchmarkConfig, folder: Path, *, cluster: str = "slurm") -> Run:
    """What runs a job and waits for it; may be called from several threads at once.

    Args:
        told: `launcher` and `slurm` of it.
        folder: For submitit's own files.
        cluster: submitit's name of where jobs go; tests give `local`.

    Raises:
        ConfigError: submitit is not installed, or there is no Slurm here.
    """
    if told.launcher == "local":
        return run_trial
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("benchmark.launcher=slurm needs submitit: uv sync --extra benchmark") from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except RuntimeError as error:
        raise ConfigError(
            f"benchmark.launcher=slurm: {error}; run it where sbatch and srun are, or use benchmark.launcher=local"
        ) from error
    executor.update_parameters(**parameters(told))

    def run(job: Job, trial_folder: Path, timeout: float) -> Outcome:
        submitted = executor.submit(run_trial, job, trial_folder, timeout)
        logger.info("submitted %s as job %s", trial_folder.name, submitted.job_id)
        try:
            outcome: Outcome = submitted.result()
        except Exception as error:  # noqa: BLE001 - a job that the cluster ended is a failed trial, whatever it raises
            return Outcome(0.0, None, Failure("error", f"job {submitted.job_id}: {' '.join(str(error).split())[:300]}"))
        return outcome

    return run


def parameters(told: BenchmarkConfig) -> dict[str, Any]:
    """Submitit's parameters."""
    slurm = told.slurm
    found: dict[str, Any] = {
        "name": "wrinklefree-benchmark",
        "timeout_min": int(told.trial_timeout / 60) + QUEUE_MINUTES,
        "tasks_per_node": 1,
        "cpus_per_task": slurm.cpus,
    }
    if slurm.gpus:
        found["gpus_per_node"] = slurm.gpus
    if slurm.memory_gb is not None:
        found["mem_gb"] = slurm.memory_gb
    for name in ("partition", "account", "constraint"):
        if (value := getattr(slurm, name)) is not None:
            found[f"slurm_{name}"] = value
    if slurm.exclusive:
        found["slurm_exclusive"] = True
    return found
