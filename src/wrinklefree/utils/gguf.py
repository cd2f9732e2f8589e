"""The one reader of GGUF: pretrained weights in, export checks, serving.

A file is mapped, not read; a tensor is decoded when it is asked for. Every length in the header is treated as hostile:
it is compared with the bytes that are left before anything is allocated, so a damaged or forged file costs an error and
never gigabytes. Layout: magic, version, counts, key-value pairs, tensor table, padding, tensor data (GGUF versions 2, 3).

The types of tensors, and how each stores its numbers, are in `gguf_blocks`.
"""

import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.gguf_blocks import (
    FORMATS_BY_ID,
    FORMATS_BY_NAME,
    I2_S_LAYOUTS,
    BlockError,
    BlockFormat,
    Float32Array,
    Int8Array,
    decode_tensor,
    decode_ternary,
)

Value = TypeVar("Value")
MetadataValue = bool | int | float | str | list["MetadataValue"]

I2_S_LAYOUT_KEY = "wrinklefree.i2_s_layout"
"""Metadata key that says which byte order the I2_S tensors have: `x86` or `arm`."""

_MAGIC = b"GGUF"
_MAX_DIMENSIONS = 4
_MAX_ARRAY_DEPTH = 3
_MAX_ALIGNMENT = 1 << 16
_MAX_ITEMS = 1 << 23
"""Metadata values in all arrays of a file together: the largest vocabularies, with merges and scores, take two million."""
_MAX_STRING = 1 << 26
_MAX_KEY = (1 << 16) - 1
_MAX_NAME = 256
"""Bytes; llama.cpp allows 63, and names stand in messages."""
_MAX_TENSORS = 1 << 17
_MAX_PAIRS = 1 << 16
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first, as numpy and torch count (a GGUF file stores the reverse)."""
    type: str
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


class GGUFFile:
    """A mapped GGUF file: `metadata`, the table `tensors`, and `tensor(name)`, which decodes one."""

    def __init__(
        self, path: Path, data: mmap.mmap, metadata: dict[str, MetadataValue], tensors: dict[str, TensorInfo]
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._data = data

    def raw(self, name: str) -> NDArray[np.uint8]:
        """Stored bytes of a tensor, without a copy."""
        info = self._info(name)
        return np.frombuffer(self._data, dtype=np.uint8, count=info.nbytes, offset=info.offset)

    def tensor(self, name: str) -> Float32Array:
        """A tensor decoded to float32, in its own memory.

        Raises:
            CheckpointError: there is no such tensor, or its type is not one that is decoded here.
        """
        info, block = self._decodable(name)
        try:
            return decode_tensor(block, self.raw(name), info.shape, self._layout(block))
        except BlockError as error:
            raise CheckpointError(f"{self.path}: tensor {name} of type {info.type} cannot be read: {error}") from error

    def ternary(self, name: str) -> tuple[Int8Array, np.float32]:
        """Codes -1, 0, 1 (int8, in the tensor's shape) and the one scale, exactly as stored.

        Raises:
            CheckpointError: as for `tensor`; or blocks differ in scale, a value is not ternary, or the scale is
                negative or not finite.
        """
        info, block = self._decodable(name)
        try:
            return decode_ternary(block, self.raw(name), info.shape, self._layout(block))
        except BlockError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} of type {info.type} is not ternary with one scale: {error}"
            ) from error

    def text(self, key: str) -> str:
        """A string of the metadata."""
        return self._typed(key, str)

    def integer(self, key: str) -> int:
        """An integer of the metadata."""
        return self._typed(key, int)

    def number(self, key: str) -> float:
        """A float (or integer) of the metadata."""
        value = self.metadata.get(key)
        return float(value) if isinstance(value, int) else self._typed(key, float)

    def texts(self, key: str) -> list[str]:
        """A list of strings of the metadata."""
        return self._list(key, str)

    def integers(self, key: str) -> list[int]:
        """A list of integers of the metadata."""
        return self._list(key, int)

    def _list(self, key: str, kind: type[Value]) -> list[Value]:
        items = cast("list[MetadataValue]", self._typed(key, list))
        return [self._checked(key, item, kind) for item in items]

    def _typed(self, key: str, kind: type[Value]) -> Value:
        if key not in self.metadata:
            raise CheckpointError(f"{self.path} has no metadata key {key}; it is not a complete language model")
        return self._checked(key, self.metadata[key], kind)

    def _checked(self, key: str, value: MetadataValue, kind: type[Value]) -> Value:
        if not isinstance(value, kind):
            raise CheckpointError(f"{self.path}: metadata {key} is {type(value).__name__}, expected {kind.__name__}")
        return value

    def _decodable(self, name: str) -> tuple[TensorInfo, BlockFormat]:
        info = self._info(name)
        block = FORMATS_BY_NAME[info.type]
        if not block.decodable:
            readable = ", ".join(entry.name for entry in FORMATS_BY_NAME.values() if entry.decodable)
            raise CheckpointError(f"{self.path}: tensor {name} has type {info.type}; readable are {readable}")
        return info, block

    def _layout(self, block: BlockFormat) -> str | None:
        if block.name != "I2_S":
            return None
        layout = self.metadata.get(I2_S_LAYOUT_KEY)
        if not isinstance(layout, str) or layout not in I2_S_LAYOUTS:
            raise CheckpointError(
                f"{self.path} stores I2_S weights, whose byte order depends on the CPU they were written for, and its "
                f"metadata key {I2_S_LAYOUT_KEY} is {str(layout)[:40]!r}, not one of {', '.join(I2_S_LAYOUTS)}; convert the "
                "checkpoint again with this library, or to another type"
            )
        return layout

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name} (it has {len(self.tensors)} others)")
        return self.tensors[name]


def read_gguf(path: str | Path) -> GGUFFile:
    """Map a GGUF file and read its header.

    Raises:
        CheckpointError: the file is missing, truncated, not GGUF, or its header contradicts itself or the file's size.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path} ({error}); give a GGUF file") from error
    cursor = _Cursor(path, data)
    if cursor.take(4) != _MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file (it does not start with the letters GGUF)")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise CheckpointError(
            f"{path} is GGUF version {version}; readable are 2 and 3 (a big-endian file looks like this too)"
        )
    tensor_count = cursor.count(minimum_bytes=24, most=_MAX_TENSORS)
    pair_count = cursor.count(minimum_bytes=13, most=_MAX_PAIRS)
    metadata: dict[str, MetadataValue] = {}
    for _ in range(pair_count):
        key = cursor.string(most=_MAX_KEY)
        if key in metadata:
            raise cursor.error(f"metadata key {key[:80]!r} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("I"), depth=0)
    table = [_tensor_row(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {str(alignment)[:40]}, expected a power of two")
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, block, offset in table:
        nbytes = block.nbytes(shape)
        if name in tensors:
            raise cursor.error(f"tensor {name!r} occurs twice")
        if offset % alignment or start + offset + nbytes > len(data):
            raise cursor.error(f"tensor {name!r} ({nbytes} bytes at {start + offset}) does not fit into the file")
        tensors[name] = TensorInfo(name, shape, block.name, start + offset, nbytes)
    for before, after in pairwise(sorted(tensors.values(), key=lambda info: info.offset)):
        if before.offset + before.nbytes > after.offset:
            raise cursor.error(f"tensors {before.name!r} and {after.name!r} overlap")
    return GGUFFile(path, data, metadata, tensors)


class _Cursor:
    """Reads little-endian values of a mapped file and refuses to leave it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0
        self.items = 0

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {problem}; fetch or write it again")

    def take(self, length: int) -> bytes:
        if length > len(self.data) - self.position:
            raise self.error(f"{length} bytes wanted at {self.position}, the file ends at {len(self.data)}")
        self.position += length
        return self.data[self.position - length : self.position]

    def scalar(self, code: str) -> int:
        return self._unpack(code)

    def count(self, *, minimum_bytes: int, most: int) -> int:
        """A 64-bit count of things that take at least `minimum_bytes` each in the rest of the file."""
        count = self._unpack("Q")
        if count * minimum_bytes > len(self.data) - self.position:
            raise self.error(f"{count} entries announced at {self.position - 8}, more than the file can hold")
        if count > most:
            raise self.error(f"{count} entries announced at {self.position - 8}, more than the {most} that are read")
        return count

    def string(self, *, most: int = _MAX_STRING) -> str:
        try:
            return self.take(self.count(minimum_bytes=1, most=most)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"a string before {self.position} is not UTF-8") from error

    def value(self, kind: int, *, depth: int) -> MetadataValue:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth >= _MAX_ARRAY_DEPTH:
            raise self.error(f"metadata type {kind} at nesting {depth}")
        item = self.scalar("I")
        size = struct.calcsize(f"<{_SCALARS[item]}") if item in _SCALARS else 8
        count = self.count(minimum_bytes=size, most=_MAX_ITEMS - self.items)
        self.items += count
        if item in _SCALARS:
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(count * size)))
        return [self.value(item, depth=depth + 1) for _ in range(count)]

    def _unpack(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]


def _tensor_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], BlockFormat, int]:
    name = cursor.string(most=_MAX_NAME)
    dimensions = cursor.scalar("I")
    if not 0 < dimensions <= _MAX_DIMENSIONS:
        raise cursor.error(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(dimensions)]))
    kind = cursor.scalar("I")
    if kind not in FORMATS_BY_ID:
        raise CheckpointError(
            f"{cursor.path}: tensor {name!r} has the unknown type {kind}; the file is damaged, or of a program whose "
            "types are not known here: convert it to another type there"
        )
    block = FORMATS_BY_ID[kind]
    if shape[-1] % block.weights or 0 in shape:
        raise cursor.error(f"tensor {name!r} of type {block.name} has the shape {shape}")
    return name, shape, block, cursor.scalar("Q")
