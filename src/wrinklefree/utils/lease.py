"""A lease: of all processes on all machines, one may write a run.

One small object says who holds it and when he last said so. It changes hands by compare-and-swap only, so of many that
want it exactly one gets it; who stops renewing it (his machine is gone) loses it after five minutes. Clocks of the
machines may differ by less than that minus one renewal: four minutes.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol, cast

from wrinklefree.utils.errors import NetworkError, StorageError

logger = logging.getLogger(__name__)

RENEW_SECONDS = 60.0
STALE_SECONDS = 300.0
"""Silence after which another process may take the lease."""
LOST_SECONDS = 240.0
"""Silence after which the holder himself gives up."""


class VersionedStorage(Protocol):
    """The part of a `Storage` that a lease needs."""

    def read_versioned(self, name: str) -> tuple[bytes, str]:
        """Content and version of `name`; `FileNotFoundError` when there is none."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write `name` only if it is absent."""
        ...

    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Write `name` only if its version is still this one."""
        ...


class Lease:
    """A held lease; renewed by a thread until `release`.

    Args:
        storage: Where the lease lies.
        name: Its name there.
        on_lost: Called once, from the renewing thread, when another process took the lease, or when it could not be
            renewed for so long that another may have: this process must stop writing.
        clock: Seconds since the epoch.

    Raises:
        StorageError: another process holds it; says which, and since when.
    """

    def __init__(
        self,
        storage: VersionedStorage,
        name: str = "lease.json",
        *,
        on_lost: Callable[[str], None],
        clock: Callable[[], float] = time.time,
        renew_seconds: float = RENEW_SECONDS,
    ) -> None:
        self._storage = storage
        self._name = name
        self._on_lost = on_lost
        self._clock = clock
        self._started = clock()
        self._token = uuid.uuid4().hex
        self._renewed = self._started
        self._acquire()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until, args=(renew_seconds,), name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop renewing and give the lease back; twice is harmless."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        try:
            content, version = self._storage.read_versioned(self._name)
            if _record(content).get("token") == self._token:
                self._storage.replace(self._name, self._content(released=True), version)
        except (StorageError, NetworkError, FileNotFoundError) as error:
            logger.warning("the lease %s was not given back (%s); it ends by itself in five minutes", self._name, error)

    def renew(self) -> bool:
        """Say that we are alive; false when another process has taken the lease."""
        try:
            content, version = self._storage.read_versioned(self._name)
        except FileNotFoundError:
            held = self._storage.create(self._name, self._content())
        else:
            ours = _record(content).get("token") == self._token
            held = ours and self._storage.replace(self._name, self._content(), version)
        if held:
            self._renewed = self._clock()
        return held

    def _acquire(self) -> None:
        if self._storage.create(self._name, self._content()):
            return
        content, version = self._storage.read_versioned(self._name)
        record = _record(content)
        age = self._clock() - float(record.get("heartbeat", 0.0))
        if record.get("released") or age > STALE_SECONDS:
            if self._storage.replace(self._name, self._content(), version):
                if not record.get("released"):
                    logger.warning("%s: taking over from %s, silent for %.0f s", self._name, _holder(record), age)
                return
            record = _record(self._storage.read_versioned(self._name)[0])
        raise StorageError(
            f"this run is being written by {_holder(record)}. Wait for it, or stop it; its lease ends "
            f"{STALE_SECONDS / 60:.0f} minutes after its last sign of life, and the same command then resumes."
        )

    def _renew_until(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            try:
                if not self.renew():
                    self._on_lost("another process has taken this run's lease")
                    return
            except (StorageError, NetworkError) as error:
                silent = self._clock() - self._renewed
                logger.warning("the lease could not be renewed for %.0f s: %s", silent, error)
                if silent > LOST_SECONDS:
                    self._on_lost(f"the lease could not be renewed for {silent:.0f} s, and another process may hold it")
                    return

    def _content(self, *, released: bool = False) -> bytes:
        record = {
            "token": self._token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": self._started,
            "heartbeat": self._clock(),
            "released": released,
        }
        return json.dumps(record, sort_keys=True).encode()


def _record(content: bytes) -> dict[str, Any]:
    """What the object says; a garbled one counts as held long ago."""
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return cast("dict[str, Any]", record) if isinstance(record, dict) else {}


def _holder(record: dict[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(float(record.get("started", 0.0))))
    return f"process {record.get('pid', '?')} on {record.get('host', 'an unknown machine')} (since {since})"
