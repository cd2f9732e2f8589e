"""The benchmark's course: the default configuration now and then, what Ax proposes in between, and a confirmation.

    default, trial, trial, ..., default, trial, ..., default | best, default, best, default, ...

The default's repeats are spread over the benchmark, so that their spread is that of the machine over its whole time. After
every trial the state is saved; a killed benchmark loses the trial in flight.
"""

import logging
import math
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from benchmark.analysis.figures import best_record
from benchmark.config.settings import Settings
from benchmark.core.job import Job, effective, make_job, write_synthetic_text
from benchmark.core.launchers import Run, make_launcher
from benchmark.core.metrics import TrialKind, TrialRecord
from benchmark.core.runner import LOG, TrialError, run_preparation
from benchmark.optimization.ax_search import AxSearch
from benchmark.optimization.experiment import Experiment
from wrinklefree.composition import compose
from wrinklefree.data.config import PretrainData
from wrinklefree.training.config import MIXING_STAGES

logger = logging.getLogger(__name__)

STAGE_1 = "stage1_subln"
FROM_STAGE_1 = ("stage2", "stage1_9", "stage3")


@dataclass(frozen=True)
class _Planned:
    """A trial before it runs."""

    kind: TrialKind
    index: int
    parameters: dict[str, object]
    method: str
    seed: int
    job: Job
    folder: Path


class Search:
    """Runs what is missing of an experiment."""

    def __init__(self, experiment: Experiment, folder: Path, *, run: Run | None = None) -> None:
        """`folder` takes `experiment.json` and `work/`; `run` runs a job, None: the launcher of the settings.

        Raises:
            ConfigError: that launcher is not to be had here.
        """
        self.experiment = experiment
        self.folder = folder
        told = experiment.settings.benchmark
        self._run = make_launcher(told, folder.resolve() / "work" / "slurm") if run is None else run
        self._search: AxSearch | None = None
        self._settings = experiment.settings
        self._source: Path | None = None

    @property
    def work(self) -> Path:
        """Data, the model that trials start from, and the folder of the trial in flight."""
        return self.folder.resolve() / "work"

    def finish(self) -> None:
        """Run all that is left.

        Raises:
            TrialError: too many trials in a row failed, or what they all need could not be made.
        """
        told = self.experiment.settings.benchmark
        self._prepare()
        every = max(1, math.ceil(told.num_trials / max(1, told.repeats - 1)))
        while True:
            searched = len(self.experiment.of("search"))
            due = min(told.repeats, 1 + searched // every if searched < told.num_trials else told.repeats)
            if len(self.experiment.of("default")) < due:
                self._default("default")
            elif searched < told.num_trials:
                self._trials(min(told.parallel, told.num_trials - searched))
            else:
                break
        self._confirm()

    def _prepare(self) -> None:
        """Text and the stage-1 model, made anew if they are not there."""
        told = self._settings.benchmark
        if told.use_synthetic_data:
            data = write_synthetic_text(self.work / "text", told.seed)
            self._settings = self._settings.model_copy(update={"overrides": (*self._settings.overrides, *data)})
        stage = compose(self._settings.training_overrides).config.training.stage
        given = any(override.startswith("training.init_from=") for override in self._settings.overrides)
        if stage not in FROM_STAGE_1 or given:
            return
        model = [o for o in self._settings.overrides if o.split("=")[0].split(".")[0] in ("model", "data", "subln")]
        job = Job(
            ("training=" + STAGE_1, *model, f"output_dir={self.work / 'prepared'}", "audit.enabled=false"),
            0, told.threads,
        )  # fmt: skip
        logger.info("inserting SubLN once, for all trials")
        self._source = run_preparation(job, self.work / "preparation", told.trial_timeout)

    def _trials(self, most: int) -> None:
        """The next trials, several at once where a cluster runs them; each is stored as it ends."""
        if self._search is None:
            self._search = AxSearch(self.experiment.settings, self.experiment.ax)
        trials = [
            self._planned("search", index, effective(self._settings, parameters), method)
            for index, parameters, method in self._search.propose(most)
        ]
        with ThreadPoolExecutor(max_workers=len(trials)) as pool:
            for finished in as_completed([pool.submit(self._measured, trial) for trial in trials]):
                record = finished.result()
                self._search.tell(record.index, record.metrics)
                self.experiment.ax = self._search.snapshot()
                self._keep(record)

    def _default(self, kind: TrialKind) -> None:
        index = len(self.experiment.of(kind))
        self._keep(self._measured(self._planned(kind, index, {}, "default")))

    def _confirm(self) -> None:
        """The best configuration and the default by turns."""
        best = best_record(self.experiment.of("search"))
        if best is None:
            return
        wanted = 2 * self.experiment.settings.benchmark.confirmations
        while (done := len(self.experiment.of("confirm"))) < wanted:
            is_best = done % 2 == 0
            parameters = best.parameters if is_best else {}
            self._keep(self._measured(self._planned("confirm", done, parameters, "best" if is_best else "default")))

    def _planned(self, kind: TrialKind, index: int, parameters: dict[str, object], method: str) -> "_Planned":
        """What a trial will be; composing is for one thread."""
        told = self._settings.benchmark
        folder = self.work / (f"trial_{kind}_{index}" if told.parallel > 1 else "trial")
        # Repeats differ in their seed, as runs of a user would; all searched trials share one.
        seed = told.seed + (index if kind != "search" else 0)
        runs = self.work / "runs" / f"{kind}_{index}" if told.keep_runs else folder / "run"
        job = make_job(self._settings, parameters, seed=seed, folder=runs, source=self._source)
        return _Planned(kind, index, parameters, method, seed, job, folder)

    def _measured(self, trial: "_Planned") -> TrialRecord:
        outcome = self._run(trial.job, trial.folder, self._settings.benchmark.trial_timeout)
        return TrialRecord(
            kind=trial.kind, index=trial.index, parameters=trial.parameters, seed=trial.seed, method=trial.method,
            seconds=outcome.seconds, metrics=outcome.metrics, failure=outcome.failure, overrides=list(trial.job.overrides),
        )  # fmt: skip

    def _keep(self, record: TrialRecord) -> None:
        self.experiment.records.append(record)
        self.experiment.save(self.folder)
        logger.info("%s", describe(record))
        most = self.experiment.settings.benchmark.max_failures_in_a_row
        parallel = self.experiment.settings.benchmark.parallel > 1
        log = self.work / (f"trial_{record.kind}_{record.index}" if parallel else "trial") / LOG
        if record.failure is not None and log.exists():
            kept = self.work / "failed" / f"{record.kind}_{record.index}.txt"
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, kept)
        if self.experiment.failures_in_a_row() >= most:
            reason = record.failure.reason if record.failure else ""
            raise TrialError(
                f"{most} trials in a row failed, the last one with: {reason} (logs in {self.work / 'failed'}); when that is "
                f"mended, go on with --resume {self.folder / 'experiment.json'}"
            )


def describe(record: TrialRecord) -> str:
    """One line of the log."""
    settings = ", ".join(f"{name}={_short(value)}" for name, value in record.parameters.items()) or "default settings"
    title = f"{record.kind} {record.index} ({record.method})"
    if record.metrics is None:
        reason = record.failure.kind if record.failure else "failed"
        return f"{title}: {settings} | failed: {reason}"
    m = record.metrics
    return (
        f"{title}: {settings} | {m.efficiency:,.0f} tok/s/GB | {m.tokens_per_second:,.0f} tok/s | "
        f"{m.peak_gigabytes:.2f} GB | loss {m.loss:.3f} | {record.seconds:.0f} s"
    )


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def leave_out_useless(settings: Settings) -> tuple[Settings, list[str]]:
    """Settings without the knobs of a mixture where there is none to weigh, and the names of those."""
    config = compose(settings.training_overrides).config
    sources = len(config.data.sources) if isinstance(config.data, PretrainData) else 0
    mixes = config.training.stage in MIXING_STAGES and (settings.benchmark.use_synthetic_data or sources > 1)
    names = [name for name, knob in settings.knobs.items() if knob.key.startswith("influence.") and not mixes]
    return settings.without(names), names
