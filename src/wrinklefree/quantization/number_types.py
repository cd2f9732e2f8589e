"""Tensors of a GGUF file that stay numbers (embedding, head, norms, full-precision twins) as bytes.

F32 and F16, BF16 rounded to nearest, ties to even; Q8_0 in blocks of 32 along a row: d = max |w| / 127 in fp16, then
w / d rounded half away from zero, with d before its rounding (as llama.cpp does, bit for bit). Their decoders are in
`utils.gguf_blocks`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.gguf_blocks import FORMATS_BY_NAME

Bytes = NDArray[np.uint8]
Float32Array = NDArray[np.float32]

_LARGEST_HALF = 65504.0
_PIECE_WEIGHTS = 1 << 21
"""Weights encoded at a time, so that temporaries stay below 64 MB."""


def encode_values(values: Float32Array, type_name: str) -> Bytes:
    """All bytes of a tensor of a type in `NUMBER_TYPES`, flat.

    Args:
        values: float32 of any shape; rows are the last dimension.
        type_name: One of `NUMBER_TYPES`.

    Raises:
        CheckpointError: a value is not finite or too large for fp16, or rows are no whole blocks.
    """
    encode, block = NUMBER_TYPES[type_name], FORMATS_BY_NAME[type_name]
    if values.dtype != np.float32 or values.ndim == 0 or values.size == 0:
        raise ValueError(f"values are {values.dtype} {values.shape}, expected some float32 in rows")
    if values.shape[-1] % block.weights:
        raise CheckpointError(
            f"{type_name} stores rows in blocks of {block.weights} weights, and {values.shape[-1]} columns are no "
            "multiple of it; use F16"
        )
    rows = np.ascontiguousarray(values).reshape(-1, block.weights)
    data = np.empty((len(rows), block.bytes), dtype=np.uint8)
    step = _PIECE_WEIGHTS // block.weights
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        if not np.isfinite(piece).all():
            raise CheckpointError(
                "a tensor holds NaN or infinite values; the checkpoint is damaged, export an earlier one"
            )
        data[start : start + step] = encode(piece)
    return data.reshape(-1)


def _encode_f32(rows: Float32Array) -> Bytes:
    return rows.astype("<f4").view(np.uint8)


def _encode_f16(rows: Float32Array) -> Bytes:
    _check_half(float(np.abs(rows).max()))
    return rows.astype("<f2").view(np.uint8)


def _encode_bf16(rows: Float32Array) -> Bytes:
    """The upper half of the bits, after adding just under half of the lower one's range, or exactly half if odd."""
    bits = rows.view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    rounded = bits + (np.uint32(0x7FFF) + odd) >> np.uint32(16)
    if (rounded & np.uint32(0x7F80) == np.uint32(0x7F80)).any():
        raise CheckpointError(f"a tensor holds {np.abs(rows).max():.6g}, which BF16 rounds to infinity; use F32")
    return rounded.astype("<u2").view(np.uint8)


def _encode_q8_0(rows: Float32Array) -> Bytes:
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scales = largest / np.float32(127)
    _check_half(float(scales.max()))
    # The reciprocal, not a division, and half away from zero: what llama.cpp computes.
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    scaled = rows * inverse
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    whole += magnitude - whole >= 0.5
    data = np.empty((len(rows), 34), dtype=np.uint8)
    data[:, :2] = scales.astype("<f2").view(np.uint8)
    data[:, 2:] = np.copysign(whole, scaled).astype(np.int8).view(np.uint8)
    return data


def _check_half(value: float) -> None:
    # Numbers up to half a step above the largest one round down to it.
    if value >= _LARGEST_HALF + 16:
        raise CheckpointError(f"a tensor holds {value:.6g}, and fp16 ends at {_LARGEST_HALF:.0f}; use BF16 or F32")


NUMBER_TYPES: Mapping[str, Callable[[Float32Array], Bytes]] = MappingProxyType({
    "F32": _encode_f32,
    "F16": _encode_f16,
    "BF16": _encode_bf16,
    "Q8_0": _encode_q8_0,
})  # fmt: skip
"""Type name -> float32 rows [n, weights a block] to bytes [n, bytes a block]."""
