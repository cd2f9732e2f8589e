"""The local run store: one folder a fingerprint, with its status, checkpoints, artifact and a lock.

    runs/a3f7c2d1/  metadata.json   fingerprint, status, times, versions (replaced atomically)
                    checkpoints/    of the run in progress
                    artifact/       what it was for
                    run.lock        held while a process writes here

A run is done when its record says "completed" *and* the manifest of its artifact verifies: neither alone is enough.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import socket
import weakref
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

from wrinklefree.utils.audit_logger import AuditLogger, log_banner, scrub
from wrinklefree.utils.checkpoint import CheckpointStore
from wrinklefree.utils.errors import CheckpointError, StorageError
from wrinklefree.utils.manifest import verify_manifest
from wrinklefree.utils.run_fingerprint import Fingerprint
from wrinklefree.utils.storage import LocalStorage, atomic_symlink, explained, remove_leftovers

logger = logging.getLogger(__name__)

Status = Literal["new", "running", "interrupted", "failed", "completed"]

_METADATA = "metadata.json"
_LOCK = "run.lock"
_VERSIONED = ("wrinklefree", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "bitsandbytes")
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class Run:
    """A run that this process may write; a context manager that gives its lock back. Made by `open_run`."""

    def __init__(
        self,
        folder: Path,
        fingerprint: Fingerprint,
        *,
        checkpoints: CheckpointStore,
        metadata: Mapping[str, Any],
        lock: "RunLock | None",
        on_mark: Callable[[bytes], None] | None = None,
    ) -> None:
        self.folder = folder
        self.artifact = folder / "artifact"
        self.fingerprint = fingerprint
        self.checkpoints = checkpoints
        self._metadata = dict(metadata)
        self._lock = lock
        self._on_mark = on_mark

    @property
    def status(self) -> Status:
        """`new`, or where the run was left: a run whose process died without a word is `interrupted`."""
        return cast("Status", self._metadata["status"]) if self._metadata else "new"

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The record, as last marked."""
        return dict(self._metadata)

    def mark(self, status: Status, **facts: Any) -> None:
        """Write `metadata.json`: the new status, with JSON-able facts (step, loss, error, ...) that stay until replaced."""
        if self._lock is None:
            raise RuntimeError(
                f"{self.folder} is not locked by this process: it was complete when opened, or is closed"
            )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        created = self._metadata["created_at"] if self._metadata else now
        kept = self._metadata if status not in {"running", "completed"} else _without(self._metadata, "error")
        self._metadata = {
            **kept,
            **cast("dict[str, Any]", scrub(facts)),
            "fingerprint": self.fingerprint.value,
            "config_hash": self.fingerprint.config_hash,
            "inputs": dict(self.fingerprint.inputs),
            "git_commit": self.fingerprint.git_commit,
            "git_dirty": self.fingerprint.git_dirty,
            "status": status,
            "created_at": created,
            "updated_at": now,
            "host": socket.gethostname(),
            "versions": _versions(),
        }
        content = json.dumps(self._metadata, indent=2, sort_keys=True) + "\n"
        LocalStorage(self.folder).write_bytes(_METADATA, content.encode())
        if self._on_mark is not None:
            self._on_mark(content.encode())

    def is_complete(self) -> bool:
        """Whether the record says so and the artifact verifies."""
        if self.status != "completed":
            return False
        try:
            verify_manifest(self.artifact)
        except CheckpointError:
            return False
        return True

    def close(self) -> None:
        """Give the lock back; the run cannot be marked afterwards."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_run(
    folder: Path,
    fingerprint: Fingerprint,
    *,
    skip_completed: bool,
    fresh: bool,
    keep_last_n: int = 2,
    audit: AuditLogger | None = None,
    on_saved: Callable[[Path], None] | None = None,
    on_mark: Callable[[bytes], None] | None = None,
) -> Run:
    """Open the folder of the run with this fingerprint, creating it if need be, and lock it for this process.

    Args:
        folder: The run's own folder, `.../runs/<first 8 of the fingerprint>`.
        fingerprint: Checked against the folder's record.
        skip_completed: A complete run comes back as it is (status "completed", not locked); otherwise it starts anew.
        fresh: Start anew whatever is there. The old artifact stays until the new one replaces it.
        keep_last_n: How many checkpoints to keep.
        audit: Told of corrupt checkpoints and artifacts; without one they are only logged.
        on_saved: Called with the folder of each checkpoint that was saved.
        on_mark: Called with the content of each record that was written.

    Raises:
        StorageError: when another process holds the run, or the folder cannot be written.
        CheckpointError: when the folder belongs to another run.
    """

    def report(type: str, **details: Any) -> None:
        if audit is None:
            log_banner(type, "CRITICAL", fingerprint=fingerprint.value, **details)
        else:
            audit.record(type, "CRITICAL", fingerprint=fingerprint.value, **details)

    checkpoints = CheckpointStore(
        folder / "checkpoints",
        keep_last_n,
        on_corrupt=lambda reasons: report("corrupt_checkpoint", folder=str(folder), corrupt=dict(reasons)),
        on_saved=on_saved,
    )
    run = Run(
        folder,
        fingerprint,
        checkpoints=checkpoints,
        metadata=_read_record(folder, fingerprint),
        lock=None,
        on_mark=on_mark,
    )
    if skip_completed and not fresh and run.is_complete():
        return run

    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder / _LOCK)
    try:
        remove_leftovers(folder)
        checkpoints.clean()
        # Read again: another process may have finished the run while this one waited for nothing.
        metadata = _read_record(folder, fingerprint)
        run = Run(folder, fingerprint, checkpoints=checkpoints, metadata=metadata, lock=lock, on_mark=on_mark)
        complete = run.is_complete()
        if fresh or (complete and not skip_completed):
            checkpoints.clear()
            return Run(folder, fingerprint, checkpoints=checkpoints, metadata={}, lock=lock, on_mark=on_mark)
        if metadata and metadata["status"] == "completed" and not complete:
            report(
                "corrupt_artifact", folder=str(run.artifact), message="a completed run lost its artifact: it resumes"
            )
        if metadata and metadata["status"] in {"running", "completed"} and not complete:
            metadata["status"] = "interrupted"
            return Run(folder, fingerprint, checkpoints=checkpoints, metadata=metadata, lock=lock, on_mark=on_mark)
    except BaseException:
        lock.release()
        raise
    return run


def point(link: Path, target: Path) -> None:
    """Make `link` an atomic, relative symlink to `target`, which must exist.

    Raises:
        StorageError: when something that is no link is in the way.
    """
    if not target.exists():
        raise FileNotFoundError(f"{link} would point to {target}, which does not exist")
    if link.exists() and not link.is_symlink():
        raise StorageError(f"{link} is in the way: it is not a link to a run's artifact. Move it, or set output_dir.")
    atomic_symlink(target, link)


class RunLock:
    """A lock file held by one process; the kernel gives it back when that process ends, however it ends.

    So a file left by a dead process locks nobody out, and two that find it race for one winner. The content only names
    the holder. A process that forks (data workers) does not hand the lock to its children.

    Raises:
        StorageError: when another process holds it.
    """

    def __init__(self, path: Path) -> None:
        with explained(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            os.close(descriptor)
            raise StorageError(
                f"{path.parent} is being written by {holder}. Wait for it, or stop it; the same command then resumes."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            logger.warning("%s: this file system has no locks; do not start this run twice at a time", path.parent)
        before = _holder(path)
        if before != _NOBODY:
            logger.info("%s: taking over from %s, which ended without giving the run back", path.parent, before)
        _held.add(descriptor)
        self._descriptor = descriptor
        # A dropped lock must not outlive its owner in a long process.
        self._closer = weakref.finalize(self, _close, descriptor)
        content = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat("T", "seconds"),
        }
        with explained(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(content).encode(), 0)

    def release(self) -> None:
        """Give the lock back; twice is harmless."""
        if self._closer.alive:
            os.ftruncate(self._descriptor, 0)
            # Also for a child that was forked a moment ago and has not closed its copy yet.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._closer()


_NOBODY = "nobody"
_held: set[int] = set()


def _close(descriptor: int) -> None:
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


def _close_in_child() -> None:
    for descriptor in tuple(_held):
        _close(descriptor)


os.register_at_fork(after_in_child=_close_in_child)


def _holder(path: Path) -> str:
    """Who wrote the lock file."""
    try:
        content = json.loads(path.read_bytes() or b"null")
        if content is None:
            return _NOBODY
        return f"process {content['pid']} on {content['host']} (since {content['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


def _read_record(folder: Path, fingerprint: Fingerprint) -> dict[str, Any]:
    """The run's metadata; empty when there is none or it is unreadable.

    Raises:
        CheckpointError: when it is another run's.
    """
    try:
        content = json.loads(LocalStorage(folder).read_bytes(_METADATA))
        record = {key: content[key] for key in ("fingerprint", "status", "created_at")}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is corrupt (%s): the run counts as interrupted", folder / _METADATA, error)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return {"fingerprint": fingerprint.value, "status": "interrupted", "created_at": now}
    if record["fingerprint"] != fingerprint.value:
        raise CheckpointError(
            f"{folder} belongs to run {record['fingerprint'][:16]}, not {fingerprint.value[:16]}: it was copied or "
            "renamed. Move it away, or set output_dir=<another folder>."
        )
    return cast("dict[str, Any]", content)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _without(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != key}
