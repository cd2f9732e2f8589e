"""The one writer of GGUF: a header that is known before any tensor exists, then the tensors, one in memory at a time.

Version 3, little-endian. Everything is checked before the first byte is written (names, shapes, types, metadata, free
disk space); the file appears under its name only when it is complete and on the disk, and a failure leaves nothing.

Types of metadata: `str`, `bool`; an `int` is stored as uint32, or int32 when negative; a `float` as float32; a list as
an array (of strings, bools, int32 or float32). These are what llama.cpp's keys are. For any other width pass a numpy
scalar or a one-dimensional numpy array: its dtype is kept.
"""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from wrinklefree.utils.gguf_blocks import FORMATS_BY_NAME, TYPE_IDS
from wrinklefree.utils.storage import check_space, explained, replacing_file, write_all

Bytes = NDArray[np.uint8]
MetadataValue = str | bool | int | float | np.generic | NDArray[Any] | Sequence[str | bool | int | float]

_VERSION = 3
_DEFAULT_ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"
_MAX_NAME = 63
"""Bytes; llama.cpp stops with a longer name."""
_MAX_DIMENSIONS = 4
_STRING, _BOOL, _ARRAY = 8, 7, 9
_NUMBER_TYPES = {
    "uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6, "bool": _BOOL,
    "uint64": 10, "int64": 11, "float64": 12,
}  # fmt: skip


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is to be written: all but its bytes, and what makes those when its turn comes."""

    name: str
    shape: tuple[int, ...]
    """Slowest dimension first: [rows, columns]. The file stores the reverse."""
    type: str
    """Name in `utils.gguf_blocks.FORMATS_BY_NAME`."""
    produce: Callable[[], Bytes | Iterable[Bytes]]
    """All bytes, in one array or in pieces (a generator bounds the memory of a large tensor)."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file, alignment left out."""
        return FORMATS_BY_NAME[self.type].nbytes(self.shape)


def write_gguf(path: Path, metadata: Mapping[str, MetadataValue], tensors: Sequence[TensorPlan]) -> None:
    """Write a GGUF file, replacing `path` at once when it is complete.

    Raises:
        StorageError: no space (checked before the first tensor is produced), or the folder cannot be written.
        ValueError: a plan or a value that GGUF cannot hold, or a tensor whose bytes are not as many as planned; a
            defect of the caller. What `produce` raises passes unchanged.
    """
    alignment = _alignment(metadata)
    header = _header(metadata, tensors, alignment)
    total = len(header) + sum(_aligned(plan.nbytes, alignment) for plan in tensors)
    check_space(path.parent, total)
    with replacing_file(path) as descriptor:
        with explained(path, needed=total):
            write_all(descriptor, header)
        for plan in tensors:
            written = 0
            produced = plan.produce()
            for piece in (produced,) if isinstance(produced, np.ndarray) else produced:
                raw = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
                written += raw.size
                if written > plan.nbytes:
                    break
                with explained(path, needed=total):
                    write_all(descriptor, raw.data)
            if written != plan.nbytes:
                raise ValueError(f"tensor {plan.name}: {plan.nbytes} bytes planned, {written} or more produced")
            with explained(path, needed=total):
                write_all(descriptor, bytes(_aligned(written, alignment) - written))


def _header(metadata: Mapping[str, MetadataValue], tensors: Sequence[TensorPlan], alignment: int) -> bytes:
    """Everything before the first tensor, padded to the alignment; offsets count from there."""
    pieces = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        if not key or len(key.encode()) >= 1 << 16:
            raise ValueError(f"metadata key {key[:80]!r} must have 1 to 65535 bytes")
        try:
            pieces += [_string(key), *_typed(value)]
        except (struct.error, ValueError, TypeError) as error:
            raise ValueError(f"metadata {key}: {error}") from error
    names: set[str] = set()
    offset = 0
    for plan in tensors:
        _check_plan(plan, names)
        names.add(plan.name)
        dimensions = struct.pack(f"<I{len(plan.shape)}Q", len(plan.shape), *reversed(plan.shape))
        pieces += [_string(plan.name), dimensions, struct.pack("<IQ", TYPE_IDS[plan.type], offset)]
        offset += _aligned(plan.nbytes, alignment)
    header = b"".join(pieces)
    return header.ljust(_aligned(len(header), alignment), b"\0")


def _check_plan(plan: TensorPlan, names: set[str]) -> None:
    if not 0 < len(plan.name.encode()) <= _MAX_NAME:
        raise ValueError(f"tensor name {plan.name!r} has {len(plan.name.encode())} bytes, 1 to {_MAX_NAME} are allowed")
    if plan.name in names:
        raise ValueError(f"tensor {plan.name} is planned twice")
    if plan.type not in FORMATS_BY_NAME:
        raise ValueError(f"tensor {plan.name} has the unknown type {plan.type}")
    weights = FORMATS_BY_NAME[plan.type].weights
    if not 0 < len(plan.shape) <= _MAX_DIMENSIONS or min(plan.shape) < 1 or plan.shape[-1] % weights:
        raise ValueError(f"tensor {plan.name} of type {plan.type} cannot have the shape {plan.shape}")


def _typed(value: MetadataValue) -> list[bytes]:
    """Type number and bytes of a metadata value."""
    if isinstance(value, str):
        return [struct.pack("<I", _STRING), _string(value)]
    if isinstance(value, np.ndarray):
        return _array(cast("NDArray[Any]", value))
    if isinstance(value, np.generic):
        return _numbers(np.asarray(value))
    if isinstance(value, Sequence):
        items = list(value)
        if items and all(isinstance(item, str) for item in items):
            texts = cast("list[str]", items)
            return [struct.pack("<IIQ", _ARRAY, _STRING, len(texts)), *(_string(text) for text in texts)]
        return _array(_plain(items))
    kind = np.bool_ if isinstance(value, bool) else np.float32 if isinstance(value, float) else None
    if kind is None:
        kind = np.uint32 if value >= 0 else np.int32
    return _numbers(_exactly(np.asarray(value), kind))


def _plain(items: Sequence[object]) -> NDArray[Any]:
    """A list of one kind of Python values as the array that it is stored as."""
    kinds = {type(item) for item in items}
    for accepted, dtype in (({bool}, np.bool_), ({int}, np.int32), ({int, float}, np.float32)):
        if kinds and kinds <= accepted:
            return _exactly(np.asarray(items), dtype)
    found = " and ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
    raise ValueError(f"a list of {found} has no type; give strings, bools, numbers, or a numpy array")


def _exactly(values: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """`values` in another dtype; integers that do not fit are an error, floats are rounded."""
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(cast("type[np.integer[Any]]", dtype))
        if values.min() < limits.min or values.max() > limits.max:
            raise ValueError(f"{values.min()} to {values.max()} does not fit {dtype.__name__}; give a numpy value")
    return values.astype(dtype)


def _array(values: NDArray[Any]) -> list[bytes]:
    if values.ndim != 1:
        raise ValueError(f"an array of {values.ndim} dimensions, expected 1")
    kind, raw = _numbers(values)
    return [struct.pack("<I", _ARRAY), kind, struct.pack("<Q", len(values)), raw]


def _numbers(values: NDArray[Any]) -> list[bytes]:
    if values.dtype.name not in _NUMBER_TYPES:
        raise ValueError(f"GGUF has no numbers of type {values.dtype.name}")
    return [
        struct.pack("<I", _NUMBER_TYPES[values.dtype.name]),
        values.astype(values.dtype.newbyteorder("<")).tobytes(),
    ]


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _alignment(metadata: Mapping[str, MetadataValue]) -> int:
    alignment = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"{_ALIGNMENT_KEY} is {alignment!r}, expected a power of two from 8 up")
    return alignment


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
