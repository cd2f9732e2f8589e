"""Where runs persist: one small `Storage` protocol, its local backend, and the atomic file operations below both.

A reader sees the old content or the new one, never a part: data goes to a temporary name beside the target, is
flushed to the disk, and is renamed over it. Temporary names contain `.tmp-`, so that whatever a killed process left
behind is recognised and swept at the next start (`remove_leftovers`).

Names in a `Storage` are `/`-separated keys, as in an object store. What is large is written once under a name of its
own and never changed; what changes (metadata) is small and replaced whole. A bucket can keep these promises as well
as a folder can.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from wrinklefree.utils.errors import StorageError

TEMPORARY_MARK = ".tmp-"
"""Part of every temporary name."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_WRITE_PIECE = 64 * 2**20


class Storage(Protocol):
    """Named blobs. Every operation raises `StorageError` when the medium refuses it."""

    def read_bytes(self, name: str) -> bytes:
        """Content of `name`; `FileNotFoundError` when there is none."""
        ...

    def write_bytes(self, name: str, data: bytes) -> None:
        """Create or replace `name` atomically and durably."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Write `name` only if it does not exist; of many racing callers exactly one gets True."""
        ...

    def exists(self, name: str) -> bool:
        """Whether `name` can be read."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """All names that start with `prefix`, sorted."""
        ...

    def delete(self, name: str) -> None:
        """Remove `name`; nothing happens when there is none."""
        ...


class LocalStorage:
    """A folder as a `Storage`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """Where `name` lies; `ValueError` for a name that would leave the root."""
        parts = name.split("/")
        if name.startswith("/") or any(part in {"", ".", ".."} for part in parts):
            raise ValueError(f"not a storage name: {name!r}")
        return self.root.joinpath(*parts)

    def read_bytes(self, name: str) -> bytes:
        """Content of `name`."""
        path = self.path(name)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error

    def write_bytes(self, name: str, data: bytes) -> None:
        """Create or replace `name` atomically."""
        path = self.path(name)
        with explained(path, needed=len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write `name` only if it is absent (a hard link to the finished file either succeeds or finds one there)."""
        path = self.path(name)
        temporary = _temporary_beside(path)
        with explained(path, needed=len(data)):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_durably(temporary, data)
                path.hardlink_to(temporary)
                fsync_directory(path.parent)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
        return True

    def exists(self, name: str) -> bool:
        """Whether `name` is a file."""
        return self.path(name).is_file()

    def list(self, prefix: str = "") -> list[str]:
        """Names below the root, temporary ones left out."""
        files = (path for path in self.root.rglob("*") if path.is_file() and TEMPORARY_MARK not in str(path))
        names = (path.relative_to(self.root).as_posix() for path in files)
        return sorted(name for name in names if name.startswith(prefix))

    def delete(self, name: str) -> None:
        """Remove the file."""
        path = self.path(name)
        with explained(path):
            path.unlink(missing_ok=True)


@contextmanager
def explained(path: Path, *, needed: int | None = None) -> Generator[None]:
    """Turn an `OSError` about `path` into a `StorageError` that says what to do; `needed` is in bytes."""
    try:
        yield
    except OSError as error:
        raise StorageError(_explanation(path, error, needed)) from error


def _explanation(path: Path, error: OSError, needed: int | None) -> str:
    if error.errno in _FULL:
        size = "" if needed is None else f"{format_size(needed)} needed, "
        free = format_size(free_bytes(path))
        return (
            f"no space to write {path} ({error.strerror}): {size}{free} free. Free some space, or write elsewhere "
            "with output_dir=<folder>; what was saved before is intact."
        )
    if error.errno in _REFUSED:
        return f"may not write {path} ({error.strerror}). Choose a folder that you may write: output_dir=<folder>."
    return f"cannot write {path} ({error.strerror}). Choose another folder with output_dir=<folder>."


def format_size(size: int) -> str:
    """Bytes for a human, in decimal units as disks are sold: `1.5 GB`."""
    if size < 1000:
        return f"{size} bytes"
    value = float(size)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 1000:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def free_bytes(path: Path) -> int:
    """Bytes free on the file system where `path` is, or would be created."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def check_space(folder: Path, size: int) -> None:
    """Raise `StorageError` unless 1.2 times `size` bytes are free: better before the first byte than after the last."""
    free = free_bytes(folder)
    needed = size + size // 5
    if free < needed:
        raise StorageError(
            f"no space to write {folder}: {format_size(needed)} needed, {format_size(free)} free. Free some space, or "
            "write elsewhere with output_dir=<folder>; what was saved before is intact."
        )


def check_writable(folder: Path) -> None:
    """Create `folder` and write a probe into it, so that a run fails at its start and not after its first hour."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = _temporary_beside(folder / "probe")
        try:
            write_durably(probe, b"probe")
        finally:
            probe.unlink(missing_ok=True)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8), durably: after a crash it holds the old content or the new one."""
    content = data.encode() if isinstance(data, str) else data
    temporary = _temporary_beside(path)
    with explained(path, needed=len(content)):
        try:
            write_durably(temporary, content)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def atomic_symlink(target: Path, link: Path) -> None:
    """Make `link` point to `target`, relative to the link's folder, so that moving the tree keeps it valid.

    A link that exists is replaced without a moment in which there is none.
    """
    relative = os.path.relpath(target.absolute(), link.parent.absolute())
    temporary = _temporary_beside(link)
    with explained(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.symlink_to(relative)
            temporary.replace(link)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_directory(link.parent)


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Create the new file `path` and flush it to the disk; plain `OSError` on failure."""
    with durable_file(path) as descriptor:
        write_all(descriptor, data)


@contextmanager
def durable_file(path: Path) -> Generator[int]:
    """Descriptor of a new file, flushed to the disk on leaving."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_file(path: Path) -> Generator[int]:
    """Descriptor of a temporary file that becomes `path`, durably, on leaving; an exception leaves nothing behind.

    What the body raises passes unchanged; it wraps its own writes in `explained`.
    """
    temporary = _temporary_beside(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            yield descriptor
            with explained(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with explained(path):
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with explained(path):
        fsync_directory(path.parent)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """`os.write` until everything is written: one call may write less than it was given."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest[:_WRITE_PIECE]) :]


def fsync_directory(path: Path) -> None:
    """Make the renames and removals inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_folder(final: Path) -> Path:
    """A new folder beside `final`, to be filled and renamed to it."""
    temporary = _temporary_beside(final)
    with explained(temporary):
        temporary.mkdir(parents=True)
    return temporary


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove temporary files and folders directly inside `folder`; call it only while nobody else writes there."""
    if not folder.is_dir():
        return []
    leftovers = [path for path in folder.iterdir() if TEMPORARY_MARK in path.name]
    with explained(folder):
        for path in leftovers:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return leftovers


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f"{path.name}{TEMPORARY_MARK}{uuid.uuid4().hex}")
