"""A checkpoint that all processes of a run write together, and that any number of them can read.

Every rank writes the parts that it holds into one file of its own; rank 0 records which part of which tensor lies where
(`parts.json`), adds state and manifest, and lets the checkpoint appear as it does alone. A rank that fails makes all fail, and
what was saved before stays. All ranks need the same folder, so several machines need a shared file system.

A reader asks for stretches of whole tensors (`Checkpoint.tensors.part`) and so never learns how many wrote them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch.distributed
from torch import Tensor

from wrinklefree.utils.checkpoint import (
    PARTS,
    BackgroundSave,
    Checkpoint,
    CheckpointStore,
    PendingCheckpoint,
    copy_to_cpu,
    open_checkpoint,
    write_tensors,
)
from wrinklefree.utils.distributed import decide_on_rank_zero, gather_on_all, is_main, rank, world_size
from wrinklefree.utils.errors import CheckpointError, StorageError
from wrinklefree.utils.storage import explained, write_durably


@dataclass(frozen=True)
class Part:
    """A stretch of a tensor along one dimension."""

    values: Tensor
    dim: int
    start: int
    """Index of the first element along `dim`."""
    shape: tuple[int, ...]
    """Of the whole tensor."""


Stored = Mapping[str, Tensor | Part]
"""What is saved, by name: parts on each rank, whole tensors once, from rank 0."""


class SharedCheckpointStore:
    """The checkpoints of a run of several processes; every method is called by all of them at once.

    Args:
        store: Rank 0's own; None on the others.
    """

    def __init__(self, store: CheckpointStore | None) -> None:
        self._store = store
        # A thread's collectives must not stand between those of the training steps.
        self._group: Any = torch.distributed.new_group(backend="gloo")
        self._background = BackgroundSave()

    def save(self, step: int, tensors: Stored, state: Mapping[str, Any]) -> None:
        """See `CheckpointStore.save`; only rank 0's `state` is kept."""
        self._background.wait()
        self._save(step, tensors, state, None)

    def save_later(self, step: int, tensors: Stored, state: Mapping[str, Any]) -> None:
        """See `CheckpointStore.save_later`."""
        self._background.wait()
        copied = {name: _copied(value) for name, value in tensors.items()}
        frozen = json.loads(json.dumps(state))
        self._background.start(lambda: self._save(step, copied, frozen, self._group))

    def wait(self) -> None:
        """See `CheckpointStore.wait`."""
        self._background.wait()

    def latest(self) -> Checkpoint | None:
        """See `CheckpointStore.latest`; rank 0 chooses and verifies."""

        def find() -> Path | None:
            assert self._store is not None
            found = self._store.latest()
            return None if found is None else found.path

        folder = decide_on_rank_zero(find)
        if folder is None:
            return None
        if not all(gather_on_all(folder.is_dir())):
            raise CheckpointError(
                f"{folder} is seen by some processes only: all machines of a run need the same output_dir, on a shared "
                "file system"
            )
        return open_checkpoint(folder)

    def _save(self, step: int, tensors: Stored, state: Mapping[str, Any], group: Any) -> None:
        mine = {
            name: value.values if isinstance(value, Part) else value
            for name, value in tensors.items()
            if isinstance(value, Part) or is_main()
        }
        size = sum(tensor.numel() * tensor.element_size() for tensor in mine.values())
        sizes = gather_on_all(size, group)

        def begin() -> PendingCheckpoint:
            assert self._store is not None
            return self._store.begin(step, sum(sizes))

        pending = decide_on_rank_zero(begin, group)
        file = f"tensors_{rank():05d}_of_{world_size():05d}.safetensors"
        written = _attempt(lambda: _write(pending, file, mine, size))
        layout = {
            name: (v.dim, v.start, v.values.shape[v.dim], v.shape) for name, v in tensors.items() if isinstance(v, Part)
        }
        reports = gather_on_all((file, written, layout), group)

        def commit() -> None:
            assert self._store is not None
            try:
                failures = [(number, str(w)) for number, (_, w, _) in enumerate(reports) if isinstance(w, Exception)]
                if failures:
                    number, reason = failures[0]
                    raise StorageError(f"rank {number} could not write its part of the checkpoint: {reason}")
                record = json.dumps(_record(reports, mine, layout)).encode()
                with explained(pending.final, needed=len(record)):
                    write_durably(pending.folder / PARTS, record)
                digests = {name: str(digest) for name, digest, _ in reports} | {PARTS: sha256(record).hexdigest()}
                self._store.commit(pending, digests, state)
            except BaseException:
                pending.abandon()
                raise

        decide_on_rank_zero(commit, group)


def _write(pending: PendingCheckpoint, file: str, tensors: Mapping[str, Tensor], size: int) -> str:
    with explained(pending.final, needed=size):
        return write_tensors(pending.folder / file, tensors)


def _attempt(action: Callable[[], str]) -> str | Exception:
    """The result, or the failure as a value that can be sent to the other ranks."""
    try:
        return action()
    except StorageError as error:
        return error
    except Exception as error:  # noqa: BLE001 - rank 0 raises it for all
        return StorageError(repr(error))


def _record(reports: list[Any], whole: Mapping[str, Tensor], cut: Mapping[str, Any]) -> dict[str, Any]:
    """`parts.json`: file names, and for each tensor its shape, the dimension it was cut along and where its parts are."""
    tensors: dict[str, Any] = {
        name: {"shape": list(tensor.shape), "dim": 0, "at": [[0, 0, tensor.shape[0] if tensor.ndim else 1]]}
        for name, tensor in whole.items()
        if name not in cut
    }
    for number, (_, _, layout) in enumerate(reports):
        for name, (dim, start, size, shape) in layout.items():
            entry = tensors.setdefault(name, {"shape": list(shape), "dim": dim, "at": []})
            entry["at"].append([number, start, size])
    return {"files": [file for file, _, _ in reports], "tensors": tensors}


def _copied(value: Tensor | Part) -> Tensor | Part:
    if isinstance(value, Part):
        return Part(copy_to_cpu(value.values), value.dim, value.start, value.shape)
    return copy_to_cpu(value)
