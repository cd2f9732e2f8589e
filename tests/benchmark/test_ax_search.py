"""The course of a benchmark: order of trials, state after each, resuming, failures, and trials in processes of their own."""

import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("ax", reason="needs the extra benchmark")

from benchmark.command import run_benchmark
from benchmark.config.settings import Settings, read_settings
from benchmark.core import child, runner
from benchmark.core.job import Job, make_job, write_synthetic_text
from benchmark.core.launchers import make_launcher, parameters
from benchmark.core.metrics import BenchmarkMetrics, Failure
from benchmark.core.runner import Outcome, TrialError, run_trial
from benchmark.optimization.ax_search import AxSearch
from benchmark.optimization.experiment import FILE, Experiment, load_experiment
from benchmark.optimization.search import Search
from wrinklefree.training.callbacks import StepReport
from wrinklefree.utils.errors import CheckpointError, ConfigError, NonFiniteError, OutOfMemoryError

SMALL = [
    "benchmark.num_trials=6", "benchmark.initial_trials=3", "benchmark.repeats=3", "benchmark.confirmations=2",
    "benchmark.use_synthetic_data=false", "training=fp_pretrain", "data=packaged", "search_space.influence_enabled=null",
    "search_space.influence_lambda_reg=null", "search_space.warmup_steps=null", "search_space.weight_decay=null",
]  # fmt: skip
"""Two knobs, and a stage that starts from the base model."""


class Bench:
    """Stands for the machine: accumulation pays, a rate of 0.001 is best; counts calls."""

    def __init__(self, *, fail: Failure | None = None, stop_after: int | None = None) -> None:
        self.calls: list[Job] = []
        self.fail = fail
        self.stop_after = stop_after

    def __call__(self, job: Job, folder: Path, timeout: float) -> Outcome:
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(job)
        values = dict(override.split("=", 1) for override in job.overrides)
        if self.fail is not None:
            return Outcome(1.0, None, self.fail)
        rate = float(values.get("training.lr", 1e-3))
        accumulation = int(values.get("training.gradient_accumulation_steps", 1))
        speed = 1000 * (1 + 0.1 * math.log2(accumulation))
        loss = 2 + abs(math.log10(rate / 1e-3))
        return Outcome(1.0, BenchmarkMetrics(speed, 10**9, loss, 10, 1000, 1.0, "CPU", "process", "validation"), None)


@pytest.fixture(scope="module")
def settings() -> Settings:
    return read_settings(SMALL)


@pytest.fixture(scope="module")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    """An experiment that ran to its end, and its folder."""
    experiment, folder = Experiment(settings), tmp_path_factory.mktemp("finished")
    Search(experiment, folder, run=Bench()).finish()
    return experiment, folder


def test_the_course_and_its_state(finished: tuple[Experiment, Path]) -> None:
    experiment, folder = finished
    kinds = [record.kind for record in experiment.records]
    assert kinds == ["default", *["search"] * 3, "default", *["search"] * 3, "default", *["confirm"] * 4]
    assert [record.method for record in experiment.of("search")][:3] == ["Sobol"] * 3
    assert [record.method for record in experiment.of("confirm")] == ["best", "default"] * 2
    # Repeats differ in their seed, searched trials do not.
    assert len({record.seed for record in experiment.of("default")}) == 3
    assert len({record.seed for record in experiment.of("search")}) == 1
    assert load_experiment(folder / FILE).records == experiment.records
    # Nothing is left to do.
    again = Bench()
    Search(load_experiment(folder / FILE), folder, run=again).finish()
    assert again.calls == []


@pytest.mark.parametrize("stop_after", [3, 10])
def test_a_killed_benchmark_loses_the_trial_in_flight_and_no_other(
    stop_after: int, settings: Settings, tmp_path: Path
) -> None:
    first = Bench(stop_after=stop_after)
    with pytest.raises(KeyboardInterrupt):
        Search(Experiment(settings), tmp_path, run=first).finish()
    stored = load_experiment(tmp_path / FILE)
    assert len(stored.records) == stop_after
    second = Bench()
    Search(stored, tmp_path, run=second).finish()
    assert stop_after + len(second.calls) == 3 + 6 + 4
    indices = [record.index for record in stored.of("search")]
    assert len(set(indices)) == 6


def test_several_trials_at_once_each_stored_as_it_ends(settings: Settings, tmp_path: Path) -> None:
    changes = {"launcher": "slurm", "parallel": 3}
    told = settings.model_copy(update={"benchmark": settings.benchmark.model_copy(update=changes)})
    # Passes only if three run at once, which the first batch does; Ax may propose fewer while it waits for figures.
    gate = threading.Barrier(3, timeout=60)
    bench = Bench()
    begun = itertools.count()

    def together(job: Job, folder: Path, timeout: float) -> Outcome:
        if folder.name.startswith("trial_search") and next(begun) < 3:
            gate.wait()
        return bench(job, folder, timeout)

    experiment = Experiment(told)
    Search(experiment, tmp_path, run=together).finish()
    assert sorted(record.index for record in experiment.of("search")) == list(range(6))
    assert len(load_experiment(tmp_path / FILE).records) == 13


def test_trials_in_flight_when_killed_are_forgotten(settings: Settings, tmp_path: Path) -> None:
    search = AxSearch(settings, None)
    proposals = search.propose(2)
    assert len(proposals) == 2
    again = AxSearch(settings, search.snapshot())
    [(index, _, _)] = again.propose(1)
    assert index not in {proposal[0] for proposal in proposals}
    again.tell(index, Bench()(Job((), 0, None), tmp_path, 1.0).metrics)


@pytest.mark.slow
def test_submitit_runs_a_trial(tmp_path: Path) -> None:
    told = read_settings(["benchmark.launcher=slurm", "benchmark.slurm.gpus=0", "benchmark.slurm.cpus=1"]).benchmark
    run = make_launcher(told, tmp_path / "jobs", cluster="local")
    outcome = run(Job(("no_such_key=1",), 0, 1), tmp_path / "trial", 60)
    assert outcome.metrics is None
    assert outcome.failure is not None
    assert "no_such_key" in outcome.failure.reason


def test_what_slurm_is_asked_for_and_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = read_settings(
        ["benchmark.launcher=slurm", "benchmark.parallel=4", "benchmark.slurm.partition=gpu", "benchmark.slurm.constraint=h100",
         "benchmark.slurm.exclusive=true", "benchmark.trial_timeout=600"]
    ).benchmark  # fmt: skip
    asked = parameters(told)
    assert asked["slurm_partition"] == "gpu"
    assert asked["slurm_constraint"] == "h100"
    assert (asked["gpus_per_node"], asked["timeout_min"], asked["slurm_exclusive"]) == (1, 20, True)
    assert "mem_gb" not in asked
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"benchmark\.launcher=slurm: .*; run it where sbatch and srun are"):
        make_launcher(told, tmp_path)
    with pytest.raises(ConfigError, match="would disturb each other's times"):
        read_settings(["benchmark.parallel=2"])


def test_failures_are_recorded_and_too_many_stop(settings: Settings, tmp_path: Path) -> None:
    failure = Failure("not_finite", "the loss is nan")
    told = settings.model_copy(update={"benchmark": settings.benchmark.model_copy(update={"max_failures_in_a_row": 3})})
    experiment = Experiment(told)
    with pytest.raises(TrialError, match="3 trials in a row failed, the last one with: the loss is nan"):
        Search(experiment, tmp_path, run=Bench(fail=failure)).finish()
    assert [record.failure for record in load_experiment(tmp_path / FILE).records] == [failure] * 3


def test_commands_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        run_benchmark([], resume=tmp_path / FILE, analyze_only=None)
    with pytest.raises(ConfigError, match="leave everything else out"):
        run_benchmark(["benchmark.num_trials=3"], resume=None, analyze_only=tmp_path / FILE)
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="is no experiment of this benchmark, or damaged"):
        run_benchmark([], resume=tmp_path / FILE, analyze_only=None)
    with pytest.raises(ConfigError, match="exists: go on with --resume"):
        run_benchmark([f"benchmark.output_dir={tmp_path}"], resume=None, analyze_only=None)


def test_analysis_alone_runs_nothing(finished: tuple[Experiment, Path]) -> None:
    _, folder = finished
    before = (folder / FILE).read_bytes()
    shown = run_benchmark([], resume=None, analyze_only=folder / FILE)
    assert "gradient_accumulation_steps: 8" in shown
    assert (folder / FILE).read_bytes() == before
    assert json.loads((folder / "analysis.json").read_text())["trials"] == {"default": 3, "search": 6, "confirm": 4}


def test_a_real_trial_in_its_own_process(tmp_path: Path) -> None:
    told = read_settings(
        ["training=fp_pretrain", "benchmark.measurement_steps=2", "benchmark.unmeasured_steps=1", "benchmark.threads=1",
         "benchmark.sequence_length=32", "benchmark.validation_tokens=200", "benchmark.optimizers=[adamw]"]
    )  # fmt: skip
    told = told.model_copy(update={"overrides": (*told.overrides, *write_synthetic_text(tmp_path / "text", 1))})
    job = make_job(told, {}, seed=1, folder=tmp_path / "run", source=None)
    outcome = run_trial(job, tmp_path / "trial", 120)
    assert outcome.failure is None, (tmp_path / "trial/log.txt").read_text()
    found = outcome.metrics
    assert found is not None
    assert found.steps == 3
    assert found.tokens == 2 * 16 * 32
    assert found.memory_is == "process"
    assert 1e8 < found.peak_bytes < 1e10
    assert found.loss_is == "validation"
    assert found.problem() is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NonFiniteError("the loss is nan"), "not_finite"),
        (OutOfMemoryError("too large"), "out_of_memory"),
        (ConfigError("no such key"), "error"),
        (ZeroDivisionError("defect"), "error"),
    ],
)
def test_every_end_of_a_trial_has_its_kind(
    error: Exception, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(job: Job) -> BenchmarkMetrics:
        raise error

    monkeypatch.setattr(child, "measure", fail)
    monkeypatch.setattr(child, "_end_with_parent", lambda: None)
    Job(("training=stage2_pretrain",), 0, None).write(tmp_path / child.JOB)
    assert child.main([str(tmp_path)]) == 0
    failure = json.loads((tmp_path / child.RESULT).read_text())["failure"]
    assert failure["kind"] == kind
    assert str(error) in failure["reason"]


def test_the_window_begins_behind_the_first_steps_and_knows_its_updates() -> None:
    meter = child.Meter(unmeasured_tokens=200)
    for step in range(1, 6):
        report = StepReport(
            step=step, total_steps=5, loss=3.0, terms={"cross_entropy": 2.0}, weights={"cross_entropy": 1.0},
            learning_rate=0.1, grad_norm=1.0, tokens=100 * step, tokens_per_second=1.0, step_seconds=1.0, eta_seconds=0.0,
            metrics={"influence_seconds": 10.0 * step},
        )  # fmt: skip
        meter.on_step(report)
    tokens, seconds = meter.window()
    assert tokens == 300
    assert 0 < seconds < 10
    assert meter.mixture_seconds == 30.0 + 40.0 + 50.0
    assert meter.losses == [2.0] * 5


def test_figures_that_are_not_finite_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = BenchmarkMetrics(10.0, 10**9, math.nan, 3, 100, 1.0, "CPU", "process", "training")
    monkeypatch.setattr(child, "measure", lambda job: good)
    monkeypatch.setattr(child, "_end_with_parent", lambda: None)
    Job(("training=stage2_pretrain",), 0, None).write(tmp_path / child.JOB)
    child.main([str(tmp_path)])
    failure = json.loads((tmp_path / child.RESULT).read_text())["failure"]
    assert failure == {"kind": "not_finite", "reason": "the loss after the trial is nan"}


def test_a_hung_trial_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen

    def hang(command: list[str], **options: object) -> object:
        return popen([sys.executable, "-c", "import time; time.sleep(60)"], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(runner.subprocess, "Popen", hang)
    started = time.monotonic()
    outcome = run_trial(Job((), 0, None), tmp_path / "trial", 0.2)
    assert time.monotonic() - started < 30
    assert outcome.failure == Failure("timeout", "killed after 0.2 s (benchmark.trial_timeout)")


def test_a_process_that_the_system_kills_ran_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen

    def die(command: list[str], **options: object) -> object:
        return popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(runner.subprocess, "Popen", die)
    outcome = run_trial(Job((), 0, None), tmp_path / "trial", 30)
    assert outcome.failure is not None
    assert outcome.failure.kind == "out_of_memory"


def test_a_trial_ends_with_its_benchmark(tmp_path: Path) -> None:
    code = "import threading, time; from benchmark.core.child import _end_with_parent as wait; "
    code += "threading.Thread(target=wait, daemon=True).start(); print('up', flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(runner.ROOT), str(runner.ROOT / "src")])}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"up\n"
    process.stdin.close()
    assert process.wait(30) == 71
    process.stdout.close()
