"""The one reader of GGUF: pretrained weights in, export checks, serving.

A file is mapped, not read; a tensor is decoded when it is asked for. Every length in the header is treated as hostile:
it is compared with the bytes that are left before anything is allocated, so a damaged or forged file costs an error and
never gigabytes. Layout: magic, version, counts, key-value pairs, tensor table, padding, tensor data (GGUF versions 2, 3).

Block formats (a block is 32 weights along a row; 256 for Q6_K), with d and m the block's fp16 scale and minimum:
Q4_0 w = d (q - 8); Q4_1 w = d q + m; Q8_0 w = d q; Q6_K w = d s (q - 32) with an int8 scale s for 16 weights.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from wrinklefree.utils.errors import CheckpointError

Float32Array = NDArray[np.float32]
Bytes2D = NDArray[np.uint8]
Value = TypeVar("Value")
MetadataValue = bool | int | float | str | list["MetadataValue"]

_MAGIC = b"GGUF"
_MAX_DIMENSIONS = 4
_MAX_ARRAY_DEPTH = 3
_MAX_ALIGNMENT = 1 << 16
_MAX_ARRAY_ITEMS = 1 << 24
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip


@dataclass(frozen=True)
class BlockFormat:
    """How a tensor type stores weights."""

    name: str
    weights: int
    """Weights a block."""
    bytes: int
    """Bytes a block."""
    decode: Callable[[Bytes2D], Float32Array] | None
    """[blocks, bytes] -> [blocks, weights]; None: known size, not decoded here."""


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
        info = self._info(name)
        block = _FORMATS_BY_NAME[info.type]
        if block.decode is None:
            decodable = ", ".join(entry.name for entry in _FORMATS.values() if entry.decode is not None)
            raise CheckpointError(f"{self.path}: tensor {name} has type {info.type}; readable are {decodable}")
        blocks = self.raw(name).reshape(-1, block.bytes)
        return block.decode(blocks).reshape(info.shape)

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
    tensor_count, pair_count = cursor.count(minimum_bytes=24), cursor.count(minimum_bytes=13)
    metadata: dict[str, MetadataValue] = {}
    for _ in range(pair_count):
        key = cursor.string()
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(cursor.scalar("I"), depth=0)
    table = [_tensor_row(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {alignment!r}, expected a power of two")
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, block, offset in table:
        nbytes = prod(shape) // block.weights * block.bytes
        if name in tensors:
            raise cursor.error(f"tensor {name!r} occurs twice")
        if offset % alignment or start + offset + nbytes > len(data):
            raise cursor.error(f"tensor {name!r} ({nbytes} bytes at {start + offset}) does not fit into the file")
        tensors[name] = TensorInfo(name, shape, block.name, start + offset, nbytes)
    return GGUFFile(path, data, metadata, tensors)


class _Cursor:
    """Reads little-endian values of a mapped file and refuses to leave it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {problem}; fetch or write it again")

    def take(self, length: int) -> bytes:
        if length > len(self.data) - self.position:
            raise self.error(f"{length} bytes wanted at {self.position}, the file ends at {len(self.data)}")
        self.position += length
        return self.data[self.position - length : self.position]

    def scalar(self, code: str) -> int:
        return self._unpack(code)

    def count(self, *, minimum_bytes: int) -> int:
        """A 64-bit count of things that take at least `minimum_bytes` each in the rest of the file."""
        count = self._unpack("Q")
        if count * minimum_bytes > len(self.data) - self.position:
            raise self.error(f"{count} entries announced at {self.position - 8}, more than the file can hold")
        return count

    def string(self) -> str:
        try:
            return self.take(self.count(minimum_bytes=1)).decode("utf-8")
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
        if item in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[item]}")
            count = self.count(minimum_bytes=size)
            if count > _MAX_ARRAY_ITEMS:
                raise self.error(f"a metadata array of {count} items")
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(count * size)))
        count = self.count(minimum_bytes=8)
        return [self.value(item, depth=depth + 1) for _ in range(count)]

    def _unpack(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]


def _tensor_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], BlockFormat, int]:
    name = cursor.string()
    dimensions = cursor.scalar("I")
    if not 0 < dimensions <= _MAX_DIMENSIONS:
        raise cursor.error(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(dimensions)]))
    kind = cursor.scalar("I")
    if kind not in _FORMATS:
        raise cursor.error(f"tensor {name!r} has the unknown type {kind}")
    block = _FORMATS[kind]
    if shape[-1] % block.weights or 0 in shape:
        raise cursor.error(f"tensor {name!r} of type {block.name} has the shape {shape}")
    return name, shape, block, cursor.scalar("Q")


def _half(blocks: Bytes2D, at: int) -> Float32Array:
    """The fp16 number that starts at byte `at` of every block, as a [blocks, 1] column."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes2D) -> Float32Array:
    """Low halves of all bytes, then high halves."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32)


def _decode_f32(blocks: Bytes2D) -> Float32Array:
    return blocks.view("<f4").astype(np.float32, copy=True)


def _decode_f16(blocks: Bytes2D) -> Float32Array:
    return blocks.view("<f2").astype(np.float32)


def _decode_bf16(blocks: Bytes2D) -> Float32Array:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _decode_q4_0(blocks: Bytes2D) -> Float32Array:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8)


def _decode_q4_1(blocks: Bytes2D) -> Float32Array:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _decode_q8_0(blocks: Bytes2D) -> Float32Array:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _decode_q6_k(blocks: Bytes2D) -> Float32Array:
    """128 + 64 + 16 + 2 bytes: four low bits, two high bits, sixteen scales, d; in two halves of 128 weights."""
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    quarters = [low[:, :, 0] & 0x0F, low[:, :, 1] & 0x0F, low[:, :, 0] >> 4, low[:, :, 1] >> 4]
    codes = np.stack([quarter | ((high[:, :, 0] >> (2 * i) & 3) << 4) for i, quarter in enumerate(quarters)], axis=2)
    centred = codes.reshape(-1, 16, 16).astype(np.float32) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)[:, :, None]
    return (_half(blocks, 208)[:, :, None] * scales * centred).reshape(-1, 256)


_FORMATS: dict[int, BlockFormat] = {
    0: BlockFormat("F32", 1, 4, _decode_f32),
    1: BlockFormat("F16", 1, 2, _decode_f16),
    2: BlockFormat("Q4_0", 32, 18, _decode_q4_0),
    3: BlockFormat("Q4_1", 32, 20, _decode_q4_1),
    6: BlockFormat("Q5_0", 32, 22, None),
    7: BlockFormat("Q5_1", 32, 24, None),
    8: BlockFormat("Q8_0", 32, 34, _decode_q8_0),
    10: BlockFormat("Q2_K", 256, 84, None),
    11: BlockFormat("Q3_K", 256, 110, None),
    12: BlockFormat("Q4_K", 256, 144, None),
    13: BlockFormat("Q5_K", 256, 176, None),
    14: BlockFormat("Q6_K", 256, 210, _decode_q6_k),
    30: BlockFormat("BF16", 1, 2, _decode_bf16),
    34: BlockFormat("TQ1_0", 256, 54, None),
    35: BlockFormat("TQ2_0", 256, 66, None),
}
_FORMATS_BY_NAME = MappingProxyType({block.name: block for block in _FORMATS.values()})
