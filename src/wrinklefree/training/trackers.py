"""A run's figures in TensorBoard, trackio or Weights & Biases: one callback, three short adapters.

A tracker is company, never a condition: whatever it raises after the run has begun is logged once, and training goes on
without it. `tracking_config.check_tracking` has refused a missing package before. Trackers are imported when one is
asked for; the run's own `metrics.jsonl` and `report.html` need none of them.
"""

import contextlib
import io
import json
import logging
import math
import os
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from wrinklefree.training.callbacks import Callback, RunInfo, StepReport
from wrinklefree.training.tracking_config import TrackingConfig
from wrinklefree.utils.audit_logger import scrub
from wrinklefree.utils.storage import atomic_write

logger = logging.getLogger(__name__)

RUN_FILE = "tracking.json"
"""In the run's folder: the tracker's name of this run, so that a resumed run goes on in the same curves."""
FINISH_SECONDS = 120.0
"""How long the end of a run waits for an upload; what is left stays on disk for `wandb sync`."""


class Tracker(Protocol):
    """What a tracker must do."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the figures of a step."""

    def finish(self, *, finished: bool) -> None:
        """Write or send what is left; `finished` is false when the run stopped early."""


class Tracking(Callback):
    """Sends every step and validation to a tracker; outlives every failure of it."""

    def __init__(self, config: TrackingConfig, tree: Mapping[str, Any], model: str) -> None:
        self._config = config
        self._settings: dict[str, Any] = scrub(dict(tree))
        self._model = model
        self._tracker: Tracker | None = None
        self._finished = False

    def on_start(self, run: RunInfo) -> None:
        """Open the tracker; a resumed run goes on where its checkpoint was."""
        with self._unharmed("start"):
            self._tracker = open_tracker(self._config, run, self._settings, self._model)

    def on_step(self, report: StepReport) -> None:
        """Send the step."""
        if self._tracker is not None:
            with self._unharmed("take a step"):
                self._tracker.log(report.step, step_values(report))

    def on_evaluation(self, report: StepReport) -> None:
        """Send the validation."""
        if self._tracker is not None:
            with self._unharmed("take a validation"):
                values = {f"validation/{name}": value for name, value in (report.evaluation or {}).items()}
                self._tracker.log(report.step, _finite(values))

    def on_end(self, report: StepReport | None) -> None:
        """Remember that the run came to its end."""
        self._finished = True

    def close(self) -> None:
        """Finish the tracker, once."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with self._unharmed("finish"):
                tracker.finish(finished=self._finished)

    @contextlib.contextmanager
    def _unharmed(self, what: str) -> Iterator[None]:
        """Drop the tracker at its first failure, and say so."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 (whatever a tracker does, the training is worth more)
            self._tracker = None
            reason = " ".join(str(error).split())
            logger.warning(
                "tracking=%s could not %s (%s: %s); training goes on without it. metrics.jsonl has every step.",
                self._config.name, what, type(error).__name__, reason[:300],
            )  # fmt: skip


def step_values(report: StepReport) -> dict[str, float]:
    """The figures of a step by the names that trackers group by: `train/`, `terms/`, `schedule/`, `speed/`, `quantization/`.

    A value that is not finite is left out: no tracker draws it, and some refuse it.
    """
    values = {
        "train/loss": report.loss,
        "train/grad_norm": report.grad_norm,
        "train/tokens": float(report.tokens),
        "train/skipped": float(report.skipped),
        "schedule/learning_rate": report.learning_rate,
        "schedule/quantization_lambda": report.quantization_lambda,
        "schedule/subln_strength": report.subln_strength,
        "speed/tokens_per_second": report.tokens_per_second,
        "speed/step_seconds": report.step_seconds,
    }
    values |= {f"terms/{name}": value for name, value in report.terms.items()}
    values |= {f"weighted/{name}": value * report.weights[name] for name, value in report.terms.items()}
    values |= {name if "/" in name else f"train/{name}": value for name, value in report.metrics.items()}
    return _finite(values)


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def open_tracker(config: TrackingConfig, run: RunInfo, settings: Mapping[str, Any], model: str) -> Tracker | None:
    """The tracker that `config` names, opened on this run; None for none."""
    if config.name == "none":
        return None
    name = _name_of(run, model)
    if config.name == "tensorboard":
        return TensorBoard(_folder(config, run, name), run.first_step, settings)
    if config.name == "trackio":
        return Trackio(config, name, settings)
    return WandB(config, run, name, settings, group=model)


def _name_of(run: RunInfo, model: str) -> str:
    """The run's name in the tracker: a fresh run has a new one, a resumed run that of its beginning."""
    path = run.run_dir / RUN_FILE
    if run.first_step:
        try:
            return str(json.loads(path.read_bytes())["name"])
        except (OSError, ValueError, KeyError, TypeError):
            logger.warning(
                "%s is missing or unreadable: the tracker shows the rest of this run as one of its own", path
            )
    name = f"{model}_{run.stage}_{run.run_dir.name}_{time.strftime('%m%d-%H%M%S')}_{secrets.token_hex(2)}"
    run.run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({"name": name}) + "\n")
    return name


def _folder(config: TrackingConfig, run: RunInfo, name: str) -> Path:
    return run.run_dir / config.name if config.folder is None else Path(config.folder) / name


class TensorBoard:
    """Event files; written through tensorboard's own writer, so torch's layer above it is not imported."""

    def __init__(self, folder: Path, first_step: int, settings: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        if not first_step:
            for stale in folder.glob("events.out.tfevents.*"):
                stale.unlink()
        self._writer = EventFileWriter(str(folder))
        if first_step:
            # Readers drop what the killed process wrote after the checkpoint: those steps come again.
            marker = Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))
            self._add(marker)
        self._text("configuration", json.dumps(settings, indent=2), first_step)
        self._writer.flush()
        logger.info("tracking: tensorboard --logdir %s", folder)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """All figures of a step in one event."""
        entries = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(self._event(step=step, summary=self._summary(value=entries)))

    def finish(self, *, finished: bool) -> None:
        """Flush and close."""
        self._writer.flush()
        self._writer.close()

    def _text(self, tag: str, text: str, step: int) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._add(self._event(step=step, summary=text_pb(tag, indented)))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.add_event(event)


class Trackio:
    """A SQLite file of trackio's; `trackio show --project NAME` opens it in a browser."""

    def __init__(self, config: TrackingConfig, name: str, settings: Mapping[str, Any]) -> None:
        if config.folder is not None and "trackio" not in sys.modules:
            # trackio reads it when it is imported.
            os.environ["TRACKIO_DIR"] = str(Path(config.folder).resolve())
        import trackio

        with _quiet():
            self._run = trackio.init(
                project=config.project,
                name=name,
                config=dict(settings),
                resume="allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        where = "" if config.folder is None else f"TRACKIO_DIR={shlex.quote(str(Path(config.folder).resolve()))} "
        logger.info("tracking: %strackio show --project %s", where, config.project)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the step; trackio writes it in a thread of its own."""
        self._run.log(dict(values), step=step)

    def finish(self, *, finished: bool) -> None:
        """Write what is queued."""
        import trackio

        with _quiet():
            # The module's own function: after the run's, trackio would finish it once more at the exit, and print.
            trackio.finish()


class WandB:
    """Weights & Biases, online or as files for `wandb sync`."""

    def __init__(
        self, config: TrackingConfig, run: RunInfo, name: str, settings: Mapping[str, Any], *, group: str
    ) -> None:
        import wandb

        folder = run.run_dir if config.folder is None else Path(config.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.project,
            dir=str(folder),
            id=name,
            name=name,
            group=group,
            job_type=run.stage,
            config=dict(settings),
            mode="offline" if config.offline else None,
            resume="allow" if run.first_step and not config.offline else None,
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                finish_timeout=FINISH_SECONDS,
                login_timeout=1,
            ),
        )
        where = f"wandb sync {self._run.settings.sync_dir}" if self._run.offline else self._run.url
        logger.info("tracking: %s", where)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the step to wandb's own process."""
        self._run.log(dict(values), step=step)

    def finish(self, *, finished: bool) -> None:
        """Send what is left, for `FINISH_SECONDS` at most; a run that stopped early is shown as such."""
        self._run.finish(exit_code=0 if finished else 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep a tracker's greetings out of a command's output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def make_tracking(config: TrackingConfig, tree: Mapping[str, Any], model: str) -> list[Callback]:
    """The callback of a run, if it is to be tracked."""
    return [] if config.name == "none" else [Tracking(config, tree, model)]
