"""Trackers: what they write is read back with their own readers; what they break stays broken alone."""

import json
import logging
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from wrinklefree.training import trackers
from wrinklefree.training.callbacks import RunInfo, StepReport
from wrinklefree.training.trackers import Tracking, make_tracking, step_values
from wrinklefree.training.tracking_config import TrackingConfig


def report(step: int, **changes) -> StepReport:
    fields = {
        "loss": 2.0 + 1.0 / step,
        "terms": {"ce": 2.5, "logits": 0.125},
        "weights": {"ce": 1.0, "logits": 10.0},
        "learning_rate": 1e-3,
        "grad_norm": 0.75,
        "tokens": step * 1024,
        "tokens_per_second": 4096.0,
        "step_seconds": 0.25,
        "eta_seconds": 1.0,
        "metrics": {"quantization/zeros": 0.375, "data_wait_share": 0.0625},
    }
    return StepReport(step=step, total_steps=4, **(fields | changes))


def drive(tracking: Tracking, folder: Path, steps: range, *, first_step: int = 0, ends: bool = True) -> None:
    tracking.on_start(RunInfo("stage2", folder, 4, first_step))
    for step in steps:
        tracking.on_step(report(step))
    if ends:
        tracking.on_evaluation(report(steps[-1], evaluation={"bits_per_byte": 1.75}))
        tracking.on_end(report(steps[-1]))
    tracking.close()
    tracking.close()


def test_values_are_named_by_group_and_finite() -> None:
    values = step_values(report(2, loss=float("nan"), grad_norm=float("inf"), skipped=True))
    assert "train/loss" not in values
    assert "train/grad_norm" not in values
    assert values["train/skipped"] == 1.0
    assert values["terms/logits"] == 0.125
    assert values["weighted/logits"] == 1.25
    assert values["quantization/zeros"] == 0.375
    assert values["train/data_wait_share"] == 0.0625


def test_none_makes_no_callback() -> None:
    assert make_tracking(TrackingConfig(), {}, "tiny") == []


def tensorboard_scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    # The accumulator turns scalars of the old wire format into `scalars`.
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_every_step_the_validation_and_the_configuration(tmp_path: Path) -> None:
    config = TrackingConfig(name="tensorboard")
    drive(Tracking(config, {"seed": 7, "hub": {"api_key": "secret"}}, "tiny"), tmp_path, range(1, 5))
    folder = tmp_path / "tensorboard"
    losses = dict(tensorboard_scalars(folder, "train/loss"))
    assert losses == pytest.approx({1: 3.0, 2: 2.5, 3: 2 + 1 / 3, 4: 2.25}, rel=1e-6)
    assert tensorboard_scalars(folder, "validation/bits_per_byte") == [(4, 1.75)]
    [file] = folder.iterdir()
    written = file.read_bytes()
    assert b'"seed": 7' in written
    assert b"secret" not in written


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_resumed_run_shows_each_step_once_and_a_fresh_one_starts_over(tmp_path: Path) -> None:
    config = TrackingConfig(name="tensorboard")
    drive(Tracking(config, {}, "tiny"), tmp_path, range(1, 4), ends=False)  # killed after step 3
    name = json.loads((tmp_path / "tracking.json").read_text())["name"]
    drive(Tracking(config, {}, "tiny"), tmp_path, range(3, 5), first_step=2)  # its checkpoint was of step 2
    assert [step for step, _ in tensorboard_scalars(tmp_path / "tensorboard", "train/loss")] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "tracking.json").read_text())["name"] == name
    drive(Tracking(config, {}, "tiny"), tmp_path, range(1, 3))
    assert [step for step, _ in tensorboard_scalars(tmp_path / "tensorboard", "train/loss")] == [1, 2]
    assert json.loads((tmp_path / "tracking.json").read_text())["name"] != name


class Broken:
    def __init__(self, at: int) -> None:
        self.at, self.calls, self.finished = at, 0, False

    def log(self, step: int, values: object) -> None:
        self.calls += 1
        if self.calls >= self.at:
            raise RuntimeError("the disk\nis full")

    def finish(self, *, finished: bool) -> None:
        self.finished = True
        raise OSError("no route to host")


def test_a_tracker_that_fails_is_dropped_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken(at=2)
    monkeypatch.setattr(trackers, "open_tracker", lambda *_: broken)
    drive(Tracking(TrackingConfig(name="wandb"), {}, "tiny"), tmp_path, range(1, 5))
    assert broken.calls == 2
    assert not broken.finished
    [message] = caplog.messages
    assert message.startswith("tracking=wandb could not take a step (RuntimeError: the disk is full); training goes on")


@pytest.mark.parametrize("where", ["start", "finish"])
def test_a_tracker_that_cannot_start_or_finish_harms_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def opened(*_: object) -> Broken:
        if where == "start":
            raise TimeoutError("service did not answer")
        return Broken(at=99)

    monkeypatch.setattr(trackers, "open_tracker", opened)
    drive(Tracking(TrackingConfig(name="trackio"), {}, "tiny"), tmp_path, range(1, 3))
    [message] = caplog.messages
    assert f"could not {where}" in message


def test_an_interrupt_passes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trackers, "open_tracker", opened)
    with pytest.raises(KeyboardInterrupt):
        Tracking(TrackingConfig(name="wandb"), {}, "tiny").on_start(RunInfo("s", tmp_path, 1))


def test_a_lost_name_is_replaced_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    drive(Tracking(TrackingConfig(name="tensorboard"), {}, "tiny"), tmp_path / "run", range(3, 5), first_step=2)
    assert "missing or unreadable" in caplog.messages[0]
    assert caplog.messages[1] == f"tracking: tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}"


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_trackers import drive, report
from wrinklefree.training.trackers import Tracking
from wrinklefree.training.tracking_config import TrackingConfig
config = TrackingConfig(name=sys.argv[1], offline=True, folder=sys.argv[3] or None)
first, last, ends = int(sys.argv[5]), int(sys.argv[6]), sys.argv[7] == "ends"
drive(Tracking(config, {"seed": 7}, "tiny"), Path(sys.argv[2]), range(first, last), first_step=first - 1, ends=ends)
"""


def killed_and_resumed(name: str, run: Path, folder: str, **environment: str) -> None:
    """A tracker in processes of its own, as it is in a run: it keeps threads and folders that no other test should meet."""
    # wandb takes an empty WANDB_MODE for a wrong one.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))}
    for steps in (["1", "4", "is killed"], ["3", "5", "ends"]):
        command = [sys.executable, "-c", DRIVER, name, str(run), folder, str(Path(__file__).parent), *steps]
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=240, env={**inherited, **environment}
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout == ""
        assert "training goes on" not in result.stderr


@pytest.mark.slow
def test_trackio_holds_every_step_once_in_its_database(tmp_path: Path) -> None:
    killed_and_resumed("trackio", tmp_path / "run", str(tmp_path / "trackio"), HF_HUB_OFFLINE="1")
    [database] = (tmp_path / "trackio").glob("*.db")
    name = json.loads((tmp_path / "run" / "tracking.json").read_text())["name"]
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", [name]).fetchall()
    lines = [(step, json.loads(metrics)) for step, metrics in rows]
    losses = [(step, line["train/loss"]) for step, line in lines if "train/loss" in line]
    assert [step for step, _ in losses] == [1, 2, 3, 3, 4]  # trackio keeps what the killed process wrote
    assert losses[-1][1] == 2.25
    assert [(step, line) for step, line in lines if "train/loss" not in line] == [
        (4, {"validation/bits_per_byte": 1.75})
    ]


@pytest.mark.slow
def test_wandb_writes_files_that_can_be_sent_later(tmp_path: Path) -> None:
    killed_and_resumed("wandb", tmp_path / "run", "", HOME=str(tmp_path / "home"))
    name = json.loads((tmp_path / "run" / "tracking.json").read_text())["name"]
    folders = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{name}"))
    assert len(folders) == 2  # one a process; `wandb sync` puts both into the run of this name
    [file] = folders[-1].glob("run-*.wandb")
    written = file.read_bytes()
    for text in (b"train/loss", b"validation/bits_per_byte", b"quantization/zeros"):
        assert text in written
