import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wrinklefree.utils.audit_logger import AuditLogger
from wrinklefree.utils.errors import CheckpointError, StorageError
from wrinklefree.utils.manifest import commit_folder, write_manifest
from wrinklefree.utils.run_fingerprint import Fingerprint
from wrinklefree.utils.run_manager import Run, RunLock, open_run, point
from wrinklefree.utils.storage import temporary_folder

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

FINGERPRINT = Fingerprint(
    value="a3f7c2d1" + "0" * 56, git_commit="def4" * 10, git_dirty=True, config_hash="c0ffee", inputs={"source": "base"}
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "stage" / "runs" / FINGERPRINT.short


def reopen(folder: Path, *, skip_completed: bool = True, fresh: bool = False, audit: AuditLogger | None = None) -> Run:
    return open_run(folder, FINGERPRINT, skip_completed=skip_completed, fresh=fresh, audit=audit)


def write_artifact(run: Run, text: str = "weights") -> None:
    temporary = temporary_folder(run.artifact)
    (temporary / "model.safetensors").write_text(text)
    write_manifest(temporary, {})
    commit_folder(temporary, run.artifact)


def complete(folder: Path) -> None:
    with reopen(folder) as run:
        run.mark("running")
        run.checkpoints.save(1, {"x": torch.ones(1)}, {})
        write_artifact(run)
        run.mark("completed", tokens=100)


def test_a_run_from_new_to_completed(folder: Path) -> None:
    with reopen(folder) as run:
        assert (run.status, run.folder, run.is_complete()) == ("new", folder, False)
        run.mark("running")
        assert not run.is_complete()
        run.mark("running", step=3, loss=1.25)
        write_artifact(run)
        assert not run.is_complete()
        run.mark("completed", tokens=100)
        assert run.is_complete()
    record = json.loads((folder / "metadata.json").read_text())
    assert record["fingerprint"] == FINGERPRINT.value
    assert record["status"] == "completed"
    assert (record["step"], record["loss"], record["tokens"]) == (3, 1.25, 100)
    assert (record["git_commit"], record["git_dirty"]) == (FINGERPRINT.git_commit, True)
    assert record["inputs"] == {"source": "base"}
    assert record["created_at"] <= record["updated_at"]
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]
    assert record["host"]


def test_a_complete_run_is_skipped_without_a_lock(folder: Path) -> None:
    complete(folder)
    first, second = reopen(folder), reopen(folder)
    assert first.is_complete()
    assert second.is_complete()
    with pytest.raises(RuntimeError, match="is not locked by this process"):
        first.mark("running")


def test_a_run_whose_process_died_is_interrupted_and_keeps_its_checkpoints(folder: Path) -> None:
    with reopen(folder) as run:
        run.mark("running", step=5)
        run.checkpoints.save(5, {"x": torch.ones(1)}, {"step": 5})
        (folder / "metadata.json.tmp-1").write_text("torn")
        (run.checkpoints.folder / "step_00000006.tmp-1").mkdir()
    with reopen(folder) as run:
        assert run.status == "interrupted"
        checkpoint = run.checkpoints.latest()
        assert checkpoint is not None
        assert checkpoint.step == 5
        assert sorted(path.name for path in folder.rglob("*") if ".tmp-" in path.name) == []
        run.mark("failed", error="RuntimeError: at https://me:pass@host/x")
    with reopen(folder) as run:
        assert run.status == "failed"
        assert run.metadata["error"] == "RuntimeError: at https://[removed]@host/x"
        run.mark("running")
        assert "error" not in run.metadata
        assert run.metadata["step"] == 5


@pytest.mark.parametrize(("skip_completed", "fresh"), [(True, True), (False, True), (False, False)])
def test_starting_anew_drops_checkpoints_but_the_artifact_stays_until_replaced(
    folder: Path, skip_completed: bool, fresh: bool
) -> None:
    complete(folder)
    with reopen(folder, skip_completed=skip_completed, fresh=fresh) as run:
        assert run.status == "new"
        assert not run.is_complete()
        assert run.checkpoints.latest() is None
        assert (run.artifact / "model.safetensors").read_text() == "weights"
        run.mark("running")
        write_artifact(run, "new weights")
        run.mark("completed")
        assert run.is_complete()
        assert (run.artifact / "model.safetensors").read_text() == "new weights"


def test_an_interrupted_run_resumes_even_if_completed_ones_are_not_skipped(folder: Path) -> None:
    with reopen(folder) as run:
        run.mark("interrupted", step=2)
        run.checkpoints.save(2, {}, {})
    with reopen(folder, skip_completed=False) as run:
        assert run.status == "interrupted"
        assert run.checkpoints.latest() is not None


def test_a_completed_run_with_a_damaged_artifact_is_not_skipped(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    complete(folder)
    (folder / "artifact" / "model.safetensors").write_text("WEIGHTS")
    audit = AuditLogger(tmp_path / "warnings")
    with reopen(folder, audit=audit) as run:
        assert run.status == "interrupted"
        assert not run.is_complete()
    assert "CRITICAL: CORRUPT ARTIFACT" in caplog.text
    (record,) = (tmp_path / "warnings").iterdir()
    assert record.name.endswith("_corrupt_artifact_a3f7c2d1.json")


def test_a_corrupt_checkpoint_is_audited(folder: Path, tmp_path: Path) -> None:
    audit = AuditLogger(tmp_path / "warnings")
    with reopen(folder, audit=audit) as run:
        for step in (1, 2):
            path = run.checkpoints.save(step, {}, {})
        (path / "state.json").write_text("[]")
        checkpoint = run.checkpoints.latest()
        assert checkpoint is not None
        assert checkpoint.step == 1
    (record,) = (tmp_path / "warnings").iterdir()
    details = json.loads(record.read_text())["details"]
    assert list(details["corrupt"]) == ["step_00000002"]
    assert details["fingerprint"] == FINGERPRINT.value


def test_keep_last_n_reaches_the_checkpoints(folder: Path) -> None:
    with open_run(folder, FINGERPRINT, skip_completed=True, fresh=False, keep_last_n=3) as run:
        for step in range(5):
            run.checkpoints.save(step, {}, {})
        assert len(list(run.checkpoints.folder.iterdir())) == 3


def test_the_folder_of_another_run_is_refused(folder: Path) -> None:
    complete(folder)
    other = Fingerprint(value="a3f7c2d1" + "1" * 56, git_commit="", git_dirty=False, config_hash="", inputs={})
    with pytest.raises(CheckpointError, match="belongs to run a3f7c2d100000000, not a3f7c2d111111111"):
        open_run(folder, other, skip_completed=True, fresh=False)


def test_an_unreadable_record_counts_as_interrupted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    complete(folder)
    (folder / "metadata.json").write_text('{"status": "comp')
    with reopen(folder) as run:
        assert run.status == "interrupted"
        assert run.checkpoints.latest() is not None
    assert "metadata.json is corrupt" in caplog.text


def child_that_holds(folder: Path, then: Callable[[], None]) -> int:
    """A process that has opened the run (when this returns) and then does something."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run = reopen(folder)
            run.mark("running")
            os.write(write, b"x")
            then()
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    return pid


def test_two_processes_never_write_one_run_and_a_dead_one_is_taken_over(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pid = child_that_holds(folder, signal.pause)
    with pytest.raises(StorageError) as raised:
        reopen(folder)
    message = str(raised.value)
    assert message.startswith(f"{folder} is being written by process {pid} on ")
    assert "\n" not in message
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with caplog.at_level(logging.INFO), reopen(folder) as run:
        assert run.status == "interrupted"
        assert f"taking over from process {pid} on " in caplog.text


def test_one_process_cannot_open_a_run_twice_but_can_reopen_it(folder: Path) -> None:
    run = reopen(folder)
    with pytest.raises(StorageError, match=f"is being written by process {os.getpid()} on "):
        reopen(folder)
    run.close()
    run.close()
    with reopen(folder):
        pass


def test_a_dropped_run_gives_its_lock_back(folder: Path) -> None:
    run = reopen(folder)
    del run
    reopen(folder).close()


def test_a_forked_worker_does_not_hold_the_lock(folder: Path) -> None:
    run = reopen(folder)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    run.close()
    reopen(folder).close()
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_many_processes_race_for_one_stale_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"pid": 1, "host": "gone", "since": "2001-01-01"}))
    go_read, go_write = os.pipe()
    pids: list[int] = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            code = 2
            try:
                os.close(go_write)
                os.read(go_read, 1)
                lock = RunLock(path)
                code = 0
                signal.alarm(20)
                signal.pause()
                lock.release()
            except StorageError:
                code = 1
            finally:
                os._exit(code)
        pids.append(pid)
    os.close(go_read)
    os.close(go_write)
    codes: list[int] = []
    for _ in range(7):
        pid, status = os.wait()
        pids.remove(pid)
        codes.append(os.waitstatus_to_exitcode(status))
    os.kill(pids[0], signal.SIGKILL)
    os.waitpid(pids[0], 0)
    assert codes == [1] * 7


def test_the_pointer_moves_atomically_and_refuses_what_is_in_its_way(tmp_path: Path) -> None:
    for name in ("one", "two"):
        artifact = tmp_path / "runs" / name / "artifact"
        artifact.mkdir(parents=True)
        point(tmp_path / "stage1_checkpoint", artifact)
    assert (tmp_path / "stage1_checkpoint").readlink() == Path("runs/two/artifact")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        point(tmp_path / "stage1_checkpoint", tmp_path / "runs" / "three")
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(StorageError, match="checkpoint is in the way: it is not a link"):
        point(tmp_path / "checkpoint", artifact)
