"""Values that are not ternary as bytes of a GGUF tensor: F32, F16, BF16, Q8_0.

Rounding is to the nearest, ties to even (Q8_0's codes: ties away from zero, as in ggml). A value that the type cannot
hold is an error: an infinity in a weight file answers every prompt with nonsense.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wrinklefree.utils.errors import ConfigError

Float32Array = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_Q8_BLOCK = 32


@dataclass(frozen=True)
class DenseType:
    """A type for embeddings, heads, norms and weights that are written out."""

    name: str
    block_size: int
    block_bytes: int
    encode: Callable[[Float32Array], Bytes]
    """float32 [rows, columns] to bytes [rows, bytes a row]."""

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row.

        Raises:
            ConfigError: the columns are not whole blocks.
        """
        if columns % self.block_size:
            raise ConfigError(
                f"type {self.name} stores {self.block_size} values a block and a row has {columns}; use F16"
            )
        return columns // self.block_size * self.block_bytes


def _f32(values: Float32Array) -> Bytes:
    return np.ascontiguousarray(values, dtype="<f4").view(np.uint8)


def _f16(values: Float32Array) -> Bytes:
    with np.errstate(over="ignore"):
        rounded = values.astype("<f2")
    if not np.isfinite(rounded).all():
        largest = float(np.abs(values).max())
        raise ConfigError(f"a value of {largest:g} does not fit into F16, which ends at 65504; use BF16 or F32")
    return rounded.view(np.uint8)


def _bf16(values: Float32Array) -> Bytes:
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = bits + (0x7FFF + ((bits >> 16) & 1))
    return (rounded >> 16).astype("<u2").view(np.uint8)


def _q8_0(values: Float32Array) -> Bytes:
    blocks = values.reshape(-1, _Q8_BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(over="ignore"):
        stored = scales.astype("<f2")
    if not np.isfinite(stored).all():
        raise ConfigError(f"a value of {float(np.abs(values).max()):g} does not fit into Q8_0; use BF16 or F32")
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    scaled = blocks * inverse
    codes = (np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))).astype(np.int8)
    packed = np.concatenate([stored.view(np.uint8), codes.view(np.uint8)], axis=1)
    return packed.reshape(values.shape[0], -1)


DENSE_TYPES: Mapping[str, DenseType] = {
    row.name: row
    for row in (
        DenseType("F32", 1, 4, _f32),
        DenseType("F16", 1, 2, _f16),
        DenseType("BF16", 1, 2, _bf16),
        DenseType("Q8_0", _Q8_BLOCK, 34, _q8_0),
    )
}
