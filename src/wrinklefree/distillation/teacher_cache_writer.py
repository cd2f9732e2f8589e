"""Writes a cache of teacher logits (`teacher_cache`), and measures what the truncation changes."""

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from wrinklefree.distillation.head_losses import rows_a_chunk
from wrinklefree.distillation.teacher_cache import FORMAT, CacheIdentity, counted_positions, document_keys, spread
from wrinklefree.models.records import Batch, ModelOutput
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.manifest import MANIFEST, commit_folder, write_manifest
from wrinklefree.utils.storage import explained, temporary_folder


@dataclass
class CacheErrors:
    """Sums over positions of what the truncation changes, with the largest."""

    positions: int = 0
    divergence: float = 0.0
    """KL(p || q~), nats."""
    largest_divergence: float = 0.0
    distance: float = 0.0
    """|p - q~|_1, at most 2."""
    tail: float = 0.0
    """Mass outside the k tokens."""
    bound: float = 0.0
    """|p - q~|_1 / 2 * (range of the teacher's logits) / T: of the error of a student's KL."""

    flat: float = 0.0
    """KL(p || the uniform distribution), nats: what there is to know, for comparison."""

    def add(self, errors: "PositionErrors") -> None:
        """Count some positions."""
        if errors.divergence.numel() == 0:
            return
        self.positions += errors.divergence.numel()
        self.divergence += float(errors.divergence.sum())
        self.largest_divergence = max(self.largest_divergence, float(errors.divergence.max()))
        self.distance += float(errors.distance.sum())
        self.tail += float(errors.tail.sum())
        self.bound += float(errors.bound.sum())
        self.flat += float(errors.flat.sum())

    def means(self) -> dict[str, float]:
        """What a user judges a cache by: means over positions, and the largest KL."""
        count = max(self.positions, 1)
        return {
            "kl": self.divergence / count,
            "largest_kl": self.largest_divergence,
            "l1": self.distance / count,
            "tail": self.tail / count,
            "kl_error_bound": self.bound / count,
            "uniform_kl": self.flat / count,
        }


class CacheWriter:
    """Writes a cache beside its final place and moves it there when all is written; a context manager."""

    def __init__(self, folder: Path, identity: CacheIdentity) -> None:
        """Begin; `folder` must not exist yet or be a cache, which is replaced at the end."""
        self._final, self._identity = folder, identity
        if folder.exists() and not (folder / MANIFEST).is_file():
            raise CheckpointError(f"{folder} exists and is no cache of ours; choose another folder or remove it")
        self.errors = CacheErrors()
        self._documents: dict[bytes, tuple[int, int]] = {}
        self._written = 0
        self._temporary = folder
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> "CacheWriter":
        """Make the temporary folder."""
        with explained(self._final):
            self._temporary = temporary_folder(self._final)
            names = ("ids", "differences", "normalizers")
            self._files = {name: (self._temporary / f"{name}.bin").open("wb") for name in names}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish, or leave nothing behind."""
        for file in self._files.values():
            file.close()
        if kind is None:
            self._finish()
            return
        shutil.rmtree(self._temporary, ignore_errors=True)

    @property
    def documents(self) -> int:
        """Distinct documents so far."""
        return len(self._documents)

    @torch.no_grad()
    def add(self, batch: Batch, output: ModelOutput) -> None:
        """Store the positions of a CPU batch that are new; `output` is the teacher's, on its own device."""
        wanted = torch.zeros_like(batch.labels, dtype=torch.bool)
        counted = counted_positions(batch, self._identity.positions)
        position = self._written
        for key, row, part in document_keys(batch):
            if key not in self._documents:
                count = int(counted[row, part].sum())
                self._documents[key] = (position, count)
                wanted[row, part] = counted[row, part]
                position += count
        hidden = output.hidden[wanted.to(output.hidden.device)]
        head = output.head_weight.detach()
        chunk = rows_a_chunk(hidden.device.type, head.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            self._store((hidden[start : start + chunk].to(head.dtype) @ head.T).float())
        self._written = position

    def _store(self, logits_CV: Tensor) -> None:
        temperature = self._identity.temperature
        stored = truncate(logits_CV, self._identity.top_k, temperature)
        self.errors.add(truncation_errors(logits_CV, stored, temperature))
        with explained(self._temporary):
            self._files["ids"].write(stored.ids.cpu().numpy().astype("<i4").tobytes())
            self._files["differences"].write(stored.differences.cpu().view(torch.int16).numpy().astype("<i2").tobytes())
            self._files["normalizers"].write(stored.normalizers.cpu().numpy().astype("<f4").tobytes())

    def _finish(self) -> None:
        keys = sorted(self._documents)
        spans = [self._documents[key] for key in keys]
        with explained(self._temporary):
            (self._temporary / "keys.bin").write_bytes(b"".join(keys))
            for name, column in (("starts", 0), ("counts", 1)):
                numbers = np.asarray([span[column] for span in spans], dtype="<i8")
                (self._temporary / f"{name}.bin").write_bytes(numbers.tobytes())
        extra: dict[str, Any] = {
            "format": FORMAT,
            "identity": asdict(self._identity),
            "positions": self._written,
            "documents": len(keys),
            "errors": self.errors.means(),
        }
        write_manifest(self._temporary, extra)
        commit_folder(self._temporary, self._final)


@dataclass(frozen=True)
class Stored:
    """What is kept of some positions."""

    differences: Tensor
    ids: Tensor
    normalizers: Tensor


def truncate(logits_CV: Tensor, top_k: int, temperature: float) -> Stored:
    """The k largest logits of each position, as stored."""
    top = logits_CV.topk(top_k, dim=1)
    largest = top.values[:, :1]
    normalizers = torch.logsumexp((logits_CV - largest) / temperature, dim=1)
    return Stored((top.values - largest).to(torch.bfloat16), top.indices.to(torch.int32), normalizers)


@dataclass(frozen=True)
class PositionErrors:
    """One number a position, [C] each; meanings as in `CacheErrors`."""

    divergence: Tensor
    distance: Tensor
    tail: Tensor
    bound: Tensor
    flat: Tensor


def truncation_errors(logits_CV: Tensor, stored: Stored, temperature: float) -> PositionErrors:
    """What is lost of each position, with the values as they are stored."""
    log_teacher = torch.log_softmax(logits_CV / temperature, dim=1)
    teacher = log_teacher.exp()
    cached = spread(stored.differences, stored.ids, stored.normalizers, logits_CV.shape[1], temperature)
    divergence = (teacher * (log_teacher - cached.clamp(min=torch.finfo(torch.float32).tiny).log())).sum(1)
    tail = 1.0 - teacher.gather(1, stored.ids.long()).sum(1)
    distance = (teacher - cached).abs().sum(1)
    bound = distance / 2 * (logits_CV.amax(1) - logits_CV.amin(1)) / temperature
    flat = (teacher * log_teacher).sum(1) + math.log(logits_CV.shape[1])
    return PositionErrors(divergence, distance, tail, bound, flat)
