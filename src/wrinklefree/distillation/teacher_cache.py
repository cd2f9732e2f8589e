"""Teacher logits of a task, computed once and read from disk: the k largest of each position that the logit KL counts.

A position's teacher distribution at temperature T is stored as

    ids          int32 [k]     the k most likely tokens
    differences  bfloat16 [k]  their logits less the largest one (0, and then downwards)
    normalizer   float32       log of the sum over the whole vocabulary of exp((logit - largest) / T)

so p_i = exp(difference_i / T - normalizer) needs nothing else, and what is missing to 1 is the mass of the tail. The tail
is spread evenly over the other V - k tokens: at a high temperature it is nearly flat, and its mass is too large to drop
(dropping and renormalising would teach the student that most words are impossible).

The approximation q~ of the teacher p is measured while the cache is written (`teacher_cache_writer`). For any student s

    KL(p || s) - KL(q~ || s) = constant + error,   |error| <= |p - q~|_1 / 2 * (range of s's logits) / T,

and the gradient with respect to the logits is off by (q~ - p) / T, whatever the student. KL(p || q~) is how far a student
that matches the cache is from the teacher.

Positions are found by content, not by place: a document (a run of one id in a row) has the hash of its tokens and
labels as its key, so that order, packing, epochs and ranks do not matter. Files: `ids.bin`, `differences.bin`,
`normalizers.bin`, `keys.bin` (16 bytes a document, sorted), `starts.bin` and `counts.bin` (its positions), all little
endian and memory-mapped, and the manifest with the identity of teacher and data.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wrinklefree.distillation.head_losses import ReadRows
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.utils.errors import CheckpointError, DataError
from wrinklefree.utils.manifest import read_manifest

FORMAT = "teacher-cache-1"
KEY_BYTES = 16
Positions = Literal["response", "all"]


@dataclass(frozen=True)
class CacheIdentity:
    """What a cache was made from; a run that differs in any of it must not use it."""

    teacher: str
    """Fingerprint of the model that taught."""
    data: str
    """Fingerprint of the task's data, tokenizer included."""
    vocabulary: int
    max_seq_length: int
    temperature: float
    positions: Positions
    top_k: int


def document_keys(batch: Batch) -> Iterator[tuple[bytes, int, slice]]:
    """(key, row, positions of the row) of each document of a CPU batch, row by row, in order; padding is left out."""
    tokens, labels, documents = (
        tensor.numpy().astype(np.int64) for tensor in (batch.input_ids, batch.labels, batch.document_ids)
    )
    for row in range(tokens.shape[0]):
        borders = np.flatnonzero(np.diff(documents[row])) + 1
        edges = [0, *borders.tolist(), documents.shape[1]]
        for start, end in pairwise(edges):
            if documents[row, start] != 0:
                part = slice(start, end)
                digest = hashlib.blake2b(digest_size=KEY_BYTES)
                digest.update(tokens[row, part].astype("<i4").tobytes())
                digest.update(labels[row, part].astype("<i4").tobytes())
                yield digest.digest(), row, part


def counted_positions(batch: Batch, positions: Positions) -> Tensor:
    """Boolean [B, T]: positions that the logit KL counts."""
    return batch.labels != IGNORE if positions == "response" else batch.document_ids != 0


def spread(differences: Tensor, ids: Tensor, normalizers: Tensor, vocabulary: int, temperature: float) -> Tensor:
    """The cached distribution q~, float32 [C, V]: k stored probabilities, the rest of the mass evenly over the rest."""
    stored = (differences.float() / temperature - normalizers.unsqueeze(1)).exp_()
    # Rounded logits may add up to a little more than 1.
    stored /= stored.sum(1, keepdim=True).clamp_(min=1.0)
    others = vocabulary - ids.shape[1]
    tail = (1.0 - stored.sum(1, keepdim=True)).clamp_(min=0.0)
    dense = (tail / max(others, 1)).repeat(1, vocabulary)
    return dense.scatter_(1, ids.long(), stored)


@dataclass(frozen=True)
class CachedTargets:
    """Rows of a cache as targets of `head_losses`."""

    differences: Tensor
    """bfloat16 [N, k]."""
    ids: Tensor
    """int32 [N, k]."""
    normalizers: Tensor
    """float32 [N]."""
    vocabulary: int
    rows: Tensor
    temperature: float
    t_squared: bool

    def reader(self, dtype: torch.dtype) -> ReadRows:
        """See `Targets`."""

        def read(part: slice) -> Tensor:
            dense = spread(
                self.differences[part], self.ids[part], self.normalizers[part], self.vocabulary, self.temperature
            )
            return dense.clamp_(min=torch.finfo(torch.float32).tiny).log_()

        return read


@dataclass(frozen=True)
class Found:
    """Cached rows of a batch's counted positions, in the order of the flattened batch."""

    rows: Tensor
    """int64 [M]: indices into the flattened batch."""
    differences: Tensor
    ids: Tensor
    normalizers: Tensor


class TeacherCache:
    """A finished cache, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`.

        Raises:
            CheckpointError: it is no cache, or a file has not the size that the manifest records.
        """
        self.folder = folder
        manifest = read_manifest(folder)
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder} is no cache of teacher logits ({FORMAT}); make one with scripts/cache_teacher.py"
            )
        self.digest: str = manifest["digest"]
        self.identity = CacheIdentity(**manifest["identity"])
        self.errors: Mapping[str, float] = manifest["errors"]
        self.positions: int = manifest["positions"]
        self.documents: int = manifest["documents"]
        files: Mapping[str, Mapping[str, Any]] = manifest["files"]
        for name, record in files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != record["size"]:
                raise CheckpointError(
                    f"{path} has not the {record['size']} bytes that were saved; make the cache again"
                )
        k = self.identity.top_k
        self._ids = self._map("ids", "<i4").reshape(-1, k)
        self._differences = self._map("differences", "<i2").reshape(-1, k)
        self._normalizers = self._map("normalizers", "<f4")
        keys = (folder / "keys.bin").read_bytes()
        starts, counts = (self._map(name, "<i8").tolist() for name in ("starts", "counts"))
        self._spans = {
            keys[KEY_BYTES * n : KEY_BYTES * (n + 1)]: (start, count)
            for n, (start, count) in enumerate(zip(starts, counts, strict=True))
        }

    def _map(self, name: str, dtype: str) -> NDArray[Any]:
        path = self.folder / f"{name}.bin"
        if path.stat().st_size == 0:
            return np.empty(0, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r")

    def look_up(self, batch: Batch) -> Found:
        """Cached rows of a batch on the CPU.

        Raises:
            DataError: a document that is not in the cache.
        """
        counted = counted_positions(batch, self.identity.positions)
        wanted: list[NDArray[np.int64]] = []
        for key, row, part in document_keys(batch):
            count = int(counted[row, part].sum())
            span = self._spans.get(key)
            if span is None or span[1] != count:
                raise DataError(
                    f"{self.folder} holds no teacher logits for a document of {part.stop - part.start} tokens: the cache "
                    "was made from other examples or row lengths; make it again with scripts/cache_teacher.py, or set "
                    "training.teacher.cache=null"
                )
            wanted.append(np.arange(span[0], span[0] + count, dtype=np.int64))
        index = np.concatenate(wanted) if wanted else np.empty(0, dtype=np.int64)
        return Found(
            rows=counted.flatten().nonzero().squeeze(1),
            differences=_tensor(self._differences[index].astype(np.int16)).view(torch.bfloat16),
            ids=_tensor(self._ids[index].astype(np.int32)),
            normalizers=_tensor(self._normalizers[index].astype(np.float32)),
        )

    def check(self, expected: CacheIdentity) -> str | None:
        """What in the cache's identity differs from `expected` (its `top_k` is free), or None."""
        mine, other = asdict(self.identity), asdict(expected)
        differing = [
            f"{name} {_shown(mine[name])}, here {_shown(other[name])}"
            for name in mine
            if name != "top_k" and not _same(mine[name], other[name])
        ]
        return "; ".join(differing) or None


def _same(left: object, right: object) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=1e-9)
    return left == right


def _shown(value: object) -> str:
    return value[:8] if isinstance(value, str) and len(value) == 64 else str(value)


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values)  # pyright: ignore[reportUnknownMemberType]
