import hashlib
import json
from collections.abc import Iterator
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
