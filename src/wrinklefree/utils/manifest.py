"""A manifest makes a folder trustworthy: it lists size and SHA-256 of every file, and is written last.

Loaders of tensor files notice a truncated file but not a flipped bit; the manifest notices both. A folder without a
manifest that verifies does not count as written.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.storage import (
    TEMPORARY_MARK,
    atomic_write,
    explained,
    fsync_directory,
    temporary_folder,
)

MANIFEST = "manifest.json"


def write_manifest(
    folder: Path, extra: Mapping[str, Any], *, digests: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Record every file of `folder` in its `manifest.json`, flush all to the disk, and return the record.

    Args:
        folder: Its files are complete; subfolders are included.
        extra: Further keys of the manifest (step, fingerprint, ...), as JSON can hold them.
        digests: SHA-256 by file name, computed from what was *meant* to be written. Given, a file that the disk
            garbled on the way is found by the first verification; otherwise the file is hashed as it is.
    """
    known: Mapping[str, str] = {} if digests is None else digests
    files: dict[str, dict[str, Any]] = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        files[name] = {
            "size": path.stat().st_size,
            "sha256": known[name] if name in known else _sha256(path),
        }
        _fsync_file(path)
    manifest: dict[str, Any] = {**extra, "files": files}
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        fsync_directory(inner)
    manifest["digest"] = _digest(manifest)
    atomic_write(folder / MANIFEST, _canonical(manifest))
    return manifest


def verify_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after every file in it was found to have the recorded size and SHA-256.

    Raises:
        CheckpointError: naming the first file that is missing, unknown, or not what was written.
    """
    manifest = read_manifest(folder)
    recorded: dict[str, dict[str, Any]] = manifest["files"]
    present = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name in sorted(present.keys() - recorded.keys()):
        raise CheckpointError(f"{folder / name} is not listed in {MANIFEST}: the folder was changed after it was saved")
    for name, expected in sorted(recorded.items()):
        if name not in present:
            raise CheckpointError(f"{folder / name} is missing ({expected['size']} bytes were saved)")
        size = present[name].stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{folder / name} has {size} bytes, {expected['size']} were saved")
    for name, expected in sorted(recorded.items()):
        digest = _sha256(present[name])
        if digest != expected["sha256"]:
            raise CheckpointError(
                f"{folder / name} is corrupt: its SHA-256 is {digest[:16]}..., {expected['sha256'][:16]}... was saved"
            )
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest alone, checked against its own digest but not against the files."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing: the folder was never completed, or is not one of ours") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is corrupt: {error}") from None
    if not isinstance(manifest, dict) or "digest" not in manifest or "files" not in manifest:
        raise CheckpointError(f"{path} is corrupt: it is no manifest of ours")
    checked = cast("dict[str, Any]", manifest)
    if checked["digest"] != _digest(checked) or content != _canonical(checked):
        raise CheckpointError(f"{path} is corrupt: it does not match its own digest")
    return checked


def commit_folder(temp: Path, final: Path) -> None:
    """Rename the finished folder `temp` to `final`, durably; both lie on one file system.

    An older `final` is moved aside first and removed afterwards. A crash between the two renames leaves none, which
    is seen as "not written yet" and never as a mixture.
    """
    with explained(final):
        fsync_directory(temp)
        aside: Path | None = None
        if final.exists():
            aside = temporary_folder(final)
            final.replace(aside)
        temp.replace(final)
        fsync_directory(final.parent)
        if aside is not None:
            shutil.rmtree(aside)


def remove_folder(folder: Path) -> None:
    """Remove a folder that has a manifest, the manifest first: what a crash leaves is recognisably incomplete."""
    with explained(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
        fsync_directory(folder)
        shutil.rmtree(folder)
        fsync_directory(folder.parent)


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()


def _digest(manifest: Mapping[str, Any]) -> str:
    covered = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(_canonical(covered)).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST and TEMPORARY_MARK not in path.relative_to(folder).as_posix()
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_file(path: Path) -> None:
    with explained(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
