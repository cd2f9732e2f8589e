"""A run that also lives in a bucket: taken up where any machine left it, written by one at a time, sent as it goes.

The local folder stays the place where a run works; the bucket is its copy (`mirror.py`) and its lock (`lease.py`). So an outage
costs no step, and a machine with an empty disk goes on from the newest checkpoint that reached the bucket.
"""

import json
import logging
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from wrinklefree.utils.errors import NetworkError
from wrinklefree.utils.gcs_storage import GcsStorage
from wrinklefree.utils.lease import Lease
from wrinklefree.utils.mirror import RunMirror
from wrinklefree.utils.run_fingerprint import Fingerprint
from wrinklefree.utils.storage import atomic_write, explained

logger = logging.getLogger(__name__)

METADATA = "metadata.json"
DRAIN_SECONDS = 1800.0
"""How long the end of a run waits for its uploads."""
LAST_SECONDS = 25.0
"""How long an interrupted run waits for them."""


class RemoteRun:
    """The bucket side of one run; made by `remote_run`."""

    def __init__(self, storage: GcsStorage, folder: Path, *, keep_last_n: int) -> None:
        self._mirror = RunMirror(storage, keep_last_n=keep_last_n)
        self._storage = storage
        self._folder = folder
        self._lease: Lease | None = None

    @property
    def url(self) -> str:
        """Where the run lies."""
        return self._storage.url

    def record(self) -> dict[str, Any]:
        """The run's record in the bucket; empty when there is none."""
        content = self._mirror.metadata()
        try:
            return {} if content is None else cast("dict[str, Any]", json.loads(content))
        except ValueError:
            logger.warning("%s/%s is garbled: the run counts as interrupted", self.url, METADATA)
            return {}

    def is_complete(self) -> bool:
        """Whether the bucket holds the finished run."""
        return self.record().get("status") == "completed" and self._mirror.has_artifact()

    def restore(self) -> None:
        """Bring what the bucket knows and this disk does not: the artifact of a finished run, else the newest checkpoint.

        Raises:
            StorageError: another process is writing the run.
        """
        if self.is_complete():
            if not (self._folder / "artifact").exists():
                logger.info("%s is complete; fetching what it made", self.url)
                self._mirror.fetch("artifact", self._folder / "artifact")
                self._write_record(self.record())
            return
        self.take()
        newest = next(iter(self._mirror.checkpoints()), None)
        local = sorted(path.name for path in (self._folder / "checkpoints").glob("step_*"))
        if newest is not None and (not local or newest > local[-1]):
            self._mirror.fetch_newest_checkpoint(self._folder / "checkpoints")
        record = self.record()
        if record and not (self._folder / METADATA).exists():
            self._write_record({**record, "status": "interrupted"})

    def take(self) -> None:
        """Become the only one who may write the run.

        Raises:
            StorageError: another process is.
        """
        if self._lease is None:
            self._lease = Lease(self._storage, on_lost=self._stop)

    def checkpoint_saved(self, folder: Path) -> None:
        """Send a checkpoint; returns at once."""
        self._mirror.send_checkpoint(folder)

    def marked(self, content: bytes) -> None:
        """Send the run's record; returns at once."""
        self._mirror.send_metadata(content)

    def complete(self, artifact: Path) -> None:
        """Send the artifact, before the record that calls the run complete."""
        self._mirror.send_artifact(artifact)

    def complete_late(self, artifact: Path) -> None:
        """Send a run that was finished while the bucket did not answer; nothing happens when it is there already."""
        if not self.is_complete():
            self.take()
            self.complete(artifact)
            self.marked((self._folder / METADATA).read_bytes())
            self.drain()

    def drain(self, seconds: float = DRAIN_SECONDS) -> None:
        """Wait for what is on its way.

        Raises:
            NetworkError: the bucket did not take it in time; everything is on the local disk.
        """
        self._mirror.drain(seconds)

    def close(self) -> None:
        """Let the uploads finish for a moment, end them, and give the lease back.

        A machine that is taken away gives about half a minute.
        """
        try:
            self._mirror.drain(LAST_SECONDS)
        except NetworkError as error:
            logger.warning("%s", error)
        self._mirror.close()
        if self._lease is not None:
            self._lease.release()
        self._storage.close()

    def _write_record(self, record: dict[str, Any]) -> None:
        with explained(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self._folder / METADATA, json.dumps(record, indent=2, sort_keys=True) + "\n")

    def _stop(self, reason: str) -> None:
        """The lease is lost: send nothing more, and stop training as a signal would."""
        logger.error("%s: %s; saving here and stopping", self.url, reason)
        self._mirror.abandon()
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def remote_run(
    enabled: bool, bucket: str, prefix: str, fingerprint: Fingerprint, folder: Path, *, keep_last_n: int
) -> Generator[RemoteRun | None]:
    """The run's bucket side while the block lasts; None when `enabled` is false."""
    if not enabled:
        yield None
        return
    storage = GcsStorage(bucket, f"{prefix.strip('/')}/{fingerprint.value}")
    remote = RemoteRun(storage, folder, keep_last_n=keep_last_n)
    try:
        yield remote
    finally:
        remote.close()
