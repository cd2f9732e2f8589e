import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from wrinklefree.utils import mirror as mirror_module
from wrinklefree.utils.errors import CheckpointError, NetworkError
from wrinklefree.utils.gcs_storage import GcsStorage
from wrinklefree.utils.manifest import MANIFEST, verify_manifest, write_manifest
from wrinklefree.utils.mirror import RunMirror

pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
RUN = "experiments/abc"


@pytest.fixture
def mirror(bucket, monkeypatch) -> Iterator[RunMirror]:
    monkeypatch.setattr(mirror_module, "FIRST_WAIT_SECONDS", 0.02)
    with closing(GcsStorage("bucket", RUN, retry_seconds=0.3)) as storage, closing(RunMirror(storage)) as opened:
        yield opened


def folder_of(path: Path, **files: bytes) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    write_manifest(path, {"kind": "test"})
    return path


def checkpoint(tmp_path: Path, step: int) -> Path:
    return folder_of(tmp_path / f"step_{step:08d}", tensors=bytes([step]) * 1000, shared=b"the same in every step")


def test_a_folder_comes_back_as_it_was(bucket, mirror, tmp_path) -> None:
    sent = checkpoint(tmp_path / "here", 5)
    mirror.send_checkpoint(sent)
    mirror.send_metadata(b"record")
    mirror.drain(20)
    assert mirror.metadata() == b"record"
    fetched = mirror.fetch_newest_checkpoint(tmp_path / "there")
    assert fetched == tmp_path / "there" / "step_00000005"
    assert verify_manifest(fetched) == verify_manifest(sent)
    assert (fetched / "tensors").read_bytes() == bytes([5]) * 1000


def test_blobs_go_before_the_manifest_that_lists_them(bucket, mirror, tmp_path) -> None:
    order: list[str] = []
    bucket.on_write = order.append
    mirror.send_checkpoint(checkpoint(tmp_path, 5))
    mirror.drain(20)
    assert order[-1] == f"{RUN}/checkpoints/step_00000005/{MANIFEST}"
    assert sorted(name.split("/")[2] for name in order[:-1]) == ["blobs", "blobs"]


def test_old_checkpoints_go_and_shared_blobs_stay(bucket, mirror, tmp_path) -> None:
    for step in (1, 2, 3):
        mirror.send_checkpoint(checkpoint(tmp_path, step))
        mirror.drain(20)
    assert mirror.checkpoints() == ["step_00000003", "step_00000002"]
    assert len(mirror.storage.list("blobs/")) == 3
    mirror.send_artifact(folder_of(tmp_path / "artifact", weights=b"final"))
    mirror.drain(20)
    assert mirror.checkpoints() == []
    assert mirror.has_artifact()
    assert len(mirror.storage.list("blobs/")) == 1


def test_an_outage_delays_and_loses_nothing(bucket, mirror, tmp_path) -> None:
    bucket.down = True
    mirror.send_checkpoint(checkpoint(tmp_path, 1))
    with pytest.raises(NetworkError, match="not everything was uploaded within 0 s"):
        mirror.drain(0.5)
    mirror.send_checkpoint(checkpoint(tmp_path, 2))
    bucket.down = False
    mirror.drain(20)
    assert mirror.checkpoints()[0] == "step_00000002"


FAULTS = ("429", "500", "503", "reset", "lost_reply", "short_body", "wrong_checksum", "slow")


def blobs_without_content(objects: dict[str, tuple[bytes, int]]) -> list[str]:
    """Blobs that some manifest lists and that are missing, or are not what their name says."""
    manifests = [json.loads(content) for name, (content, _) in objects.items() if name.endswith(MANIFEST)]
    digests = {record["sha256"] for manifest in manifests for record in manifest["files"].values()}
    return [
        digest
        for digest in digests
        if hashlib.sha256(objects.get(f"{RUN}/blobs/{digest}", (b"absent", 0))[0]).hexdigest() != digest
    ]


@pytest.mark.reliability
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_request_of_a_save_costs_a_retry_and_never_a_blob(
    bucket, monkeypatch, tmp_path, fault: str, record_property: Callable[[str, object], None]
) -> None:
    """A save here is the third: two blobs, the manifest, the record, and what pruning the first one takes."""
    monkeypatch.setattr(mirror_module, "FIRST_WAIT_SECONDS", 0.02)
    folders = [checkpoint(tmp_path / "here", step) for step in (1, 2, 3)]
    incomplete: list[str] = []

    def save_all(faulty: int | None) -> int:
        """Send all three; the requests of the last save."""
        bucket.objects.clear()
        bucket.faults.clear()
        with closing(GcsStorage("bucket", RUN, retry_seconds=5.0)) as storage, closing(RunMirror(storage)) as mirror:
            for folder in folders[:2]:
                mirror.send_checkpoint(folder)
                mirror.drain(20)
            before = len(bucket.requests)
            if faulty is not None:
                bucket.faults[before + faulty] = fault
            mirror.send_checkpoint(folders[2])
            mirror.send_metadata(b"record")
            mirror.drain(30)
            requests = len(bucket.requests) - before
            bucket.faults.clear()
            assert mirror.metadata() == b"record"
            assert mirror.checkpoints() == ["step_00000003", "step_00000002"]
            target = tmp_path / "there"
            mirror.fetch(f"checkpoints/{folders[2].name}", target)
            assert (target / "tensors").read_bytes() == bytes([3]) * 1000
            (target / "tensors").unlink()
        return requests

    bucket.on_write = lambda name: incomplete.extend(blobs_without_content(bucket.objects))
    requests = save_all(None)
    assert requests > 8
    for number in range(requests):
        save_all(number)
        assert blobs_without_content(bucket.objects) == []
    assert incomplete == []
    record_property("faulty_requests", requests)


def test_a_rotten_checkpoint_is_passed_over(bucket, mirror, tmp_path, caplog) -> None:
    for step in (1, 2):
        mirror.send_checkpoint(checkpoint(tmp_path / "here", step))
        mirror.drain(20)
    newest = json.loads((tmp_path / "here" / "step_00000002" / MANIFEST).read_text())
    blob = f"{RUN}/blobs/{newest['files']['tensors']['sha256']}"
    bucket.objects[blob] = (b"x" * 1000, 99)
    fetched = mirror.fetch_newest_checkpoint(tmp_path / "there")
    assert fetched is not None
    assert fetched.name == "step_00000001"
    assert "CORRUPT CHECKPOINT" in caplog.text
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["step_00000001"]


def test_a_manifest_cannot_write_outside_its_folder(bucket, mirror, tmp_path) -> None:
    evil = folder_of(tmp_path / "evil", weights=b"evil")
    manifest = json.loads((evil / MANIFEST).read_text())
    record = manifest["files"].pop("weights")
    manifest["files"]["../../escaped"] = record
    manifest["digest"] = own_digest(manifest)
    bucket.objects[f"{RUN}/blobs/{record['sha256']}"] = (b"evil", 1)
    content = (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
    bucket.objects[f"{RUN}/artifact/{MANIFEST}"] = (content, 2)
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        mirror.fetch("artifact", tmp_path / "deep" / "target")
    assert not list(tmp_path.rglob("escaped"))


def own_digest(manifest: dict) -> str:
    covered = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256((json.dumps(covered, indent=2, sort_keys=True) + "\n").encode()).hexdigest()
