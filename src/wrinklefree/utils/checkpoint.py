"""Checkpoints of a run in progress: written so that a kill at any moment loses at most the step being saved.

`step_00000500/` holds `tensors.safetensors`, `state.json` and the manifest. It is filled under a temporary name, flushed,
and renamed; so a folder without a temporary mark is complete, or rotten, or half pruned, and the manifest tells. There is no
`latest` pointer: the newest folder that verifies *is* the latest, and a pointer could only disagree. Nothing is
pickled, since unpickling a file runs whatever it contains.

Not here: what belongs into a checkpoint (the trainer knows), and how several processes write one
(`sharded_checkpoint`; reading it needs no more than what is here).
"""

import hashlib
import json
import logging
import math
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.manifest import (
    MANIFEST,
    commit_folder,
    remove_folder,
    verify_manifest,
    write_manifest,
)
from wrinklefree.utils.storage import (
    check_space,
    durable_file,
    explained,
    remove_leftovers,
    temporary_folder,
    write_all,
    write_durably,
)
from wrinklefree.utils.training_state import (
    pack_optimizer_state,
    require_string_keys,
    restore_rng_state,
    rng_state,
    unpack_optimizer_state,
)

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "TensorEntry",
    "commit_folder",
    "pack_optimizer_state",
    "restore_rng_state",
    "rng_state",
    "stream_tensors",
    "unpack_optimizer_state",
    "verify_manifest",
    "write_manifest",
    "write_tensors",
]

logger = logging.getLogger(__name__)

_TENSORS = "tensors.safetensors"
_STATE = "state.json"
PARTS = "parts.json"
"""Which process's file holds which part of a tensor; there where several wrote the checkpoint."""
_FOLDER_NAME = re.compile(r"step_(\d{8,})(?:_r(\d+))?")
_LEAST_KEPT = 2

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorFile(Mapping[str, Tensor]):
    """Tensors of a safetensors file, read one by one as they are asked for (on the CPU, in memory of their own)."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt")
        self._names: frozenset[str] = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        # A copy: the file is mapped into memory, and pruning or a network disk may take it away under the tensor.
        return self._file.get_tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not read."""
        return tuple(self._file.get_slice(name).get_shape())

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """The stretch `start` to `stop` of one dimension; no more than that is read."""
        # An empty slice cannot be asked of the library.
        end = max(stop, start + 1) if start < self.shape(name)[dim] else stop
        start_read = min(start, max(end - 1, 0))
        index = (slice(None),) * dim + (slice(start_read, end),)
        return self._file.get_slice(name)[index].narrow(dim, start - start_read, stop - start).clone()


class PartedTensors(Mapping[str, Tensor]):
    """Tensors of a checkpoint that several processes wrote, each in a file of its own; read as they are asked for."""

    def __init__(self, folder: Path) -> None:
        record = json.loads((folder / PARTS).read_bytes())
        self._files: list[TensorFile] = [TensorFile(folder / name) for name in record["files"]]
        self._tensors: dict[str, Any] = record["tensors"]

    def __getitem__(self, name: str) -> Tensor:
        entry = self._tensors[name]
        at: list[tuple[int, int, int]] = entry["at"]
        pieces = [self._files[file][name] for file, _, _ in at]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=entry["dim"])

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return tuple(self._tensors[name]["shape"])

    def part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """The stretch `start` to `stop` of one dimension; of the dimension that was cut no more than that is read."""
        entry = self._tensors[name]
        at: list[tuple[int, int, int]] = entry["at"]
        if dim != entry["dim"]:
            return self[name].narrow(dim, start, stop - start).clone()
        pieces = [
            self._files[file].part(name, dim, max(start, first) - first, min(stop, first + size) - first)
            for file, first, size in at
            if max(start, first) < min(stop, first + size)
        ]
        if not pieces:
            return self._files[at[0][0]].part(name, dim, 0, 0)
        return torch.cat(pieces, dim=dim)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    step: int
    tensors: TensorFile | PartedTensors
    """A mapping from names to whole tensors; `part` reads a stretch of one."""
    state: dict[str, Any]
    path: Path


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint whose files are being written."""

    step: int
    folder: Path
    """Temporary."""
    final: Path

    def abandon(self) -> None:
        """Leave nothing of it behind."""
        shutil.rmtree(self.folder, ignore_errors=True)


class BackgroundSave:
    """One save at a time in a thread; its failure comes out where it is waited for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, save: Callable[[], object]) -> None:
        """Wait for the one before, then run `save` beside the caller."""
        self.wait()

        def run() -> None:
            try:
                save()
            except BaseException as error:  # noqa: BLE001 - raised again in `wait`
                self._error = error

        # No daemon: a process that ends in good order ends with its checkpoint written.
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being saved; raises what the save raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU that later updates do not reach."""
    return tensor.detach().cpu() if tensor.device.type != "cpu" else tensor.detach().clone()


class CheckpointStore:
    """The checkpoints of one run, in one folder.

    Args:
        folder: Created with the first save.
        keep_last_n: How many to keep; never fewer than 2, so that one can rot.
        on_corrupt: Called with folder name -> reason when `latest` had to pass over corrupt checkpoints.
        on_saved: Called with each checkpoint's folder once it is on the disk and verified.
    """

    def __init__(
        self,
        folder: Path,
        keep_last_n: int,
        *,
        on_corrupt: Callable[[Mapping[str, str]], None] | None = None,
        on_saved: Callable[[Path], None] | None = None,
    ) -> None:
        self.folder = folder
        self.keep = max(_LEAST_KEPT, keep_last_n)
        self._on_corrupt = on_corrupt
        self._on_saved = on_saved
        self._corrupt: set[Path] = set()
        self.background = BackgroundSave()

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, verify what the disk holds, prune older ones, and return its folder.

        Whatever goes wrong, the checkpoints that were there stay, and no partial folder does.

        Raises:
            StorageError: when the disk is full or refuses; says the size needed and the size free.
            CheckpointError: when the disk holds something else than was written.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        pending = self.begin(step, size)
        try:
            with explained(pending.final, needed=size):
                digests = {_TENSORS: write_tensors(pending.folder / _TENSORS, tensors)}
            return self.commit(pending, digests, state)
        except BaseException:
            pending.abandon()
            raise

    def save_later(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy everything and return; a thread saves the copy. An earlier save is waited for first.

        Raises:
            StorageError, CheckpointError: as `save`, of the earlier one.
        """
        copied = {name: copy_to_cpu(tensor) for name, tensor in tensors.items()}
        frozen = json.loads(json.dumps(state))
        self.background.start(lambda: self.save(step, copied, frozen))

    def wait(self) -> None:
        """Until what `save_later` began is on the disk.

        Raises:
            StorageError, CheckpointError: as `save`.
        """
        self.background.wait()

    def begin(self, step: int, size: int) -> "PendingCheckpoint":
        """A folder to write the tensor files of a checkpoint into; `size` is all their bytes."""
        check_space(self.folder, size)
        final = self._free_name(step)
        return PendingCheckpoint(step, temporary_folder(final), final)

    def commit(self, pending: "PendingCheckpoint", digests: Mapping[str, str], state: Mapping[str, Any]) -> Path:
        """Add the state and the manifest, let the checkpoint appear, verify it, prune older ones; returns its folder.

        Args:
            pending: Its tensor files are complete.
            digests: SHA-256 of the files, by name, of what was meant to be written.
            state: The rest; JSON.
        """
        require_string_keys(state, "state")
        encoded = json.dumps(state).encode()
        with explained(pending.final, needed=len(encoded)):
            write_durably(pending.folder / _STATE, encoded)
        all_digests = {**digests, _STATE: hashlib.sha256(encoded).hexdigest()}
        write_manifest(pending.folder, {"step": pending.step}, digests=all_digests)
        commit_folder(pending.folder, pending.final)
        verify_manifest(pending.final)
        self._prune(pending.final)
        if self._on_saved is not None:
            self._on_saved(pending.final)
        return pending.final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None when there never was one.

        Raises:
            CheckpointError: when there are checkpoints and all are corrupt: starting afresh must be asked for.
        """
        reasons: dict[str, str] = {}
        found: Checkpoint | None = None
        for folder in self._folders():
            try:
                found = _load(folder)
                break
            except CheckpointError as error:
                self._corrupt.add(folder)
                reasons[folder.name] = str(error)
        if found is None and reasons:
            raise CheckpointError(
                f"all {len(reasons)} checkpoints in {self.folder} are corrupt ({'; '.join(reasons.values())}). Restore "
                "one from a backup, or start this run afresh with skip_recovery=true."
            )
        if found is not None and reasons:
            for reason in reasons.values():
                logger.warning("CORRUPT CHECKPOINT: %s", reason)
            logger.warning("CORRUPT CHECKPOINT: falling back to %s; the steps after it are trained again.", found.path)
            if self._on_corrupt is not None:
                self._on_corrupt(reasons)
        return found

    def clean(self) -> list[Path]:
        """Remove what killed processes left: temporary folders, and folders whose pruning had begun.

        Call it at the start of a run, while the run's lock is held.
        """
        removed = remove_leftovers(self.folder)
        folders = self._folders()
        complete = [index for index, folder in enumerate(folders) if (folder / MANIFEST).is_file()]
        if complete:
            half_pruned = [folder for folder in folders[complete[0] :] if not (folder / MANIFEST).is_file()]
            for folder in half_pruned:
                remove_folder(folder)
            removed += half_pruned
        return removed

    def clear(self) -> None:
        """Remove all checkpoints: the run starts afresh."""
        for folder in reversed(self._folders()):
            remove_folder(folder)
        remove_leftovers(self.folder)

    def _folders(self) -> list[Path]:
        """Committed folders, newest first."""
        if not self.folder.is_dir():
            return []
        found: list[tuple[tuple[int, int], Path]] = []
        for path in self.folder.iterdir():
            name = _FOLDER_NAME.fullmatch(path.name)
            if name is not None and path.is_dir():
                found.append(((int(name[1]), int(name[2] or 0)), path))
        return [path for _, path in sorted(found, reverse=True)]

    def _free_name(self, step: int) -> Path:
        """A name that is not taken; a step that was saved before (then rotted, or was trained again) gets a revision."""
        path = self.folder / f"step_{step:08d}"
        revision = 0
        while path.exists():
            revision += 1
            path = self.folder / f"step_{step:08d}_r{revision}"
        return path

    def _prune(self, newest: Path) -> None:
        """Remove known-corrupt checkpoints and all but `keep` others; `newest` has just been verified."""
        sound = [path for path in self._folders() if path not in self._corrupt]
        kept = {newest, *sound[: self.keep]}
        for folder in reversed(self._folders()):
            if folder not in kept:
                remove_folder(folder)
                self._corrupt.discard(folder)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor that is to be written: all of it but the values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, tensor by tensor (never all in memory twice), and return the SHA-256 of its content.

    Raises plain `OSError`.
    """
    entries = [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    return stream_tensors(path, entries, tensors.__getitem__)


def stream_tensors(
    path: Path,
    entries: Iterable[TensorEntry],
    load: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write a safetensors file whose values come from `load(name)`, one at a time; return the SHA-256 of its content.

    Written by hand because the library's writer copies every tensor first and reports a full disk as an error of its
    own; it is eight bytes of header length, a JSON header and the raw data. Raises plain `OSError`.

    Raises:
        ValueError: a loaded tensor is not what its entry says; a defect of the caller.
    """
    # Widest elements first: every tensor then starts at a multiple of its element size, as readers need.
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    fields: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for entry in ordered:
        end = offset + entry.size
        fields[entry.name] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(fields).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with durable_file(path) as descriptor:
        for raw in (len(header).to_bytes(8, "little"), header):
            digest.update(raw)
            write_all(descriptor, raw)
        for entry in ordered:
            tensor = load(entry.name)
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{entry} was announced, {tensor.dtype} {tuple(tensor.shape)} came")
            raw = _raw(tensor)
            digest.update(raw)
            write_all(descriptor, raw)
    return digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    """The tensor's bytes, fetched from its device now."""
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _load(folder: Path) -> Checkpoint:
    manifest = verify_manifest(folder)
    name = _FOLDER_NAME.fullmatch(folder.name)
    if name is None or manifest["step"] != int(name[1]):
        raise CheckpointError(f"{folder} holds step {manifest['step']}: it was renamed after it was saved")
    state = json.loads((folder / _STATE).read_bytes())
    tensors = PartedTensors(folder) if (folder / PARTS).is_file() else TensorFile(folder / _TENSORS)
    return Checkpoint(step=manifest["step"], tensors=tensors, state=state, path=folder)


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint that another process has verified already."""
    state = json.loads((folder / _STATE).read_bytes())
    tensors = PartedTensors(folder) if (folder / PARTS).is_file() else TensorFile(folder / _TENSORS)
    return Checkpoint(step=int(folder.name[5:13]), tensors=tensors, state=state, path=folder)
