"""A run's copy in a bucket: what a machine that vanishes cannot take with it.

    experiments/<fingerprint>/  metadata.json                        the run's record
                                lease.json                           who writes (see `lease.py`)
                                blobs/<sha256>                       file contents, each under its own hash
                                checkpoints/step_00000500/manifest.json
                                artifact/manifest.json

Blobs go first and the manifest that lists them last, so a folder is there whole or not at all, and a kill between the two
costs nothing but a few unused blobs. Uploads run in a thread of their own: training never waits for the bucket, an outage
is repeated until it ends, and of checkpoints that pile up meanwhile only the newest is sent.
"""

import json
import logging
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from wrinklefree.utils.errors import CheckpointError, CredentialsError, NetworkError, StorageError
from wrinklefree.utils.gcs_storage import GcsStorage
from wrinklefree.utils.manifest import MANIFEST, commit_folder, read_manifest, verify_manifest
from wrinklefree.utils.storage import check_space, explained, temporary_folder

logger = logging.getLogger(__name__)

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
_CHECKPOINTS = "checkpoints"
_METADATA = "metadata.json"


class RunMirror:
    """The bucket side of one run.

    Args:
        storage: `GcsStorage` of the run's own prefix.
        keep_last_n: How many checkpoints to keep there.
    """

    def __init__(self, storage: GcsStorage, *, keep_last_n: int = 2) -> None:
        self.storage = storage
        self._keep = max(1, keep_last_n)
        self._wanted: dict[str, Path] = {}
        self._metadata: bytes | None = None
        self._changed = threading.Condition()
        self._busy = False
        self._closed = False
        self._last_error: Exception | None = None
        self._thread: threading.Thread | None = None

    def send_checkpoint(self, folder: Path) -> None:
        """Upload a committed checkpoint in the background; one that still waits is dropped for this newer one."""
        self._send(_CHECKPOINTS, folder)

    def send_artifact(self, folder: Path) -> None:
        """Upload the run's artifact in the background."""
        self._send("artifact", folder)

    def send_metadata(self, content: bytes) -> None:
        """Upload the run's record in the background, after the folders that were sent before it."""
        with self._changed:
            if self._closed:
                return
            self._metadata = content
            self._changed.notify_all()
        self._start()

    def drain(self, seconds: float) -> None:
        """Wait until everything has been sent.

        Raises:
            NetworkError: it was not within `seconds`; nothing is lost, it is all on the local disk.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: not (self._pending() or self._busy), timeout=seconds)
            if not done:
                raise NetworkError(
                    f"{self.storage.url}: not everything was uploaded within {seconds:.0f} s ({self._last_error}). The "
                    "run is whole on the local disk; the same command uploads the rest."
                )

    def abandon(self) -> None:
        """Send nothing more, whatever is asked for: another process writes this run now."""
        with self._changed:
            self._closed = True
            self._wanted.clear()
            self._metadata = None
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread after the transfer that it is in; what still waits stays on the local disk."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def metadata(self) -> bytes | None:
        """The record in the bucket; None when there is none."""
        try:
            return self.storage.read_bytes(_METADATA)
        except FileNotFoundError:
            return None

    def checkpoints(self) -> list[str]:
        """Names of the whole checkpoints in the bucket, newest first."""
        manifests = [name for name in self.storage.list(f"{_CHECKPOINTS}/") if name.endswith(f"/{MANIFEST}")]
        return sorted((name.split("/")[1] for name in manifests), reverse=True)

    def fetch_newest_checkpoint(self, folder: Path) -> Path | None:
        """Bring the newest checkpoint into `folder` unless it is there; None when the bucket has none that is sound."""
        for name in self.checkpoints():
            target = folder / name
            if target.is_dir():
                return target
            try:
                self.fetch(f"{_CHECKPOINTS}/{name}", target)
            except (CheckpointError, FileNotFoundError) as error:
                logger.warning("CORRUPT CHECKPOINT in %s: %s; trying the one before", self.storage.url, error)
            else:
                return target
        return None

    def has_artifact(self) -> bool:
        """Whether the bucket holds the run's artifact."""
        return self.storage.exists(f"artifact/{MANIFEST}")

    def fetch(self, name: str, target: Path) -> None:
        """Download a folder and verify it; `target` appears whole or not at all.

        Raises:
            CheckpointError: what arrived is not what was sent.
        """
        content = self.storage.read_bytes(f"{name}/{MANIFEST}")
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_folder(target)
        try:
            (temporary / MANIFEST).write_bytes(content)
            files = cast("Mapping[str, Mapping[str, Any]]", read_manifest(temporary)["files"])
            check_space(target.parent, sum(int(record["size"]) for record in files.values()))
            for path, record in files.items():
                destination = temporary / path
                if not destination.resolve().is_relative_to(temporary.resolve()):
                    raise CheckpointError(f"{self.storage.url}/{name} names a file outside its folder: {path!r}")
                with explained(destination):
                    destination.parent.mkdir(parents=True, exist_ok=True)
                self.storage.download(_blob(record), destination)
            verify_manifest(temporary)
            commit_folder(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        logger.info("fetched %s from %s", target.name, self.storage.url)

    def _send(self, kind: str, folder: Path) -> None:
        with self._changed:
            if self._closed:
                return
            self._wanted[kind] = folder
            self._changed.notify_all()
        self._start()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
            self._thread.start()

    def _pending(self) -> bool:
        return bool(self._wanted) or self._metadata is not None

    def _work(self) -> None:
        wait = FIRST_WAIT_SECONDS
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending() or self._closed)
                if self._closed:
                    return
                job = next(iter(self._wanted.items()), None)
                metadata = self._metadata
                self._busy = True
            try:
                if job is not None:
                    self._upload_folder(*job)
                elif metadata is not None:
                    self.storage.write_bytes(_METADATA, metadata)
                problem = None
                wait = FIRST_WAIT_SECONDS
            except (NetworkError, StorageError, CredentialsError) as error:
                problem = error
                logger.warning("upload failed, again in %.0f s: %s", wait, error)
            with self._changed:
                self._busy = False
                self._last_error = problem
                if problem is None:
                    self._done(job, metadata)
                self._changed.notify_all()
                if problem is not None:
                    self._changed.wait_for(lambda: self._closed, timeout=wait)
                    wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _done(self, job: tuple[str, Path] | None, metadata: bytes | None) -> None:
        """Take what was sent off the list, unless something newer has replaced it meanwhile."""
        if job is not None:
            if self._wanted.get(job[0]) == job[1]:
                del self._wanted[job[0]]
        elif self._metadata is metadata:
            self._metadata = None

    def _upload_folder(self, kind: str, folder: Path) -> None:
        name = kind if kind != _CHECKPOINTS else f"{_CHECKPOINTS}/{folder.name}"
        try:
            manifest = verify_manifest(folder)
            for path, record in manifest["files"].items():
                if not self.storage.exists(_blob(record)):
                    self.storage.upload(_blob(record), folder / path)
            self.storage.write_bytes(f"{name}/{MANIFEST}", (folder / MANIFEST).read_bytes())
        except (CheckpointError, FileNotFoundError) as error:
            # Pruned while it was being sent: a newer one is on its way.
            logger.info("%s was not uploaded: %s", folder, error)
            return
        if kind == _CHECKPOINTS:
            self._prune()
        else:
            self._remove(self.checkpoints())

    def _prune(self) -> None:
        self._remove(self.checkpoints()[self._keep :])

    def _remove(self, checkpoints: list[str]) -> None:
        """Remove checkpoints, their manifests first, and then the blobs that nothing lists any more."""
        if not checkpoints:
            return
        for name in checkpoints:
            self.storage.delete(f"{_CHECKPOINTS}/{name}/{MANIFEST}")
        listed: set[str] = set()
        for name in self.storage.list():
            if name.endswith(f"/{MANIFEST}"):
                listed |= _blobs_of(self.storage.read_bytes(name))
        for blob in self.storage.list("blobs/"):
            if blob not in listed:
                self.storage.delete(blob)


def _blob(record: Mapping[str, Any]) -> str:
    return f"blobs/{record['sha256']}"


def _blobs_of(manifest: bytes) -> set[str]:
    return {_blob(record) for record in json.loads(manifest)["files"].values()}
