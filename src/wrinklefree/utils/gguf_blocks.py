"""How GGUF stores tensors: the table of types, and what turns their bytes back into numbers.

A tensor is a run of equal blocks along its rows. A block's bytes hold integers and what scales them; d and m are its
fp16 scale and minimum:

    Q4_0  w = d (q - 8)        Q4_1  w = d q + m        Q8_0  w = d q
    Q6_K  w = d s (q - 32), an int8 scale s for 16 weights
    TQ1_0, TQ2_0, Q2_0  w = d (q - 1): ternary, 5 weights a byte (base 3) or 4 (two bits)
    I2_S  w = scale (q - 1), one float32 scale behind the whole tensor

I2_S is BitNet.cpp's, and its file does not tell which weights share a byte: that depended on the CPU of the program
that wrote it. Two layouts are known here by name, "x86" and "arm" (`I2_S_LAYOUTS`); whoever decodes must say which.
BitNet.cpp of 2024 wrote and read the x86 layout on every CPU; since November 2025 its ARM builds have their own.

Type numbers 36 to 39 mean different things in different programs: 36 to 38 were interleaved 4-bit types of llama.cpp
that no file may contain any more, and are I2_S, I8_S and TL1 in BitNet.cpp; 39 is MXFP4 in llama.cpp and TL2 in
BitNet.cpp. The table takes 36 as I2_S, leaves 37 and 38 unknown, and takes 39 as MXFP4, whose size is known and whose
values nobody here decodes. Types without a decoder are listed so that the header of any file can be read.

Encoders live in `quantization.packing`; they share nothing with this file but the table, so each checks the other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Int8Array = NDArray[np.int8]
Bytes = NDArray[np.uint8]
Bytes2D = NDArray[np.uint8]

I2_S_LAYOUTS = MappingProxyType({"x86": 128, "arm": 64})
"""Name of a byte order of I2_S -> weights a block; columns must be a multiple of it."""

_PIECE_WEIGHTS = 1 << 20
"""Weights decoded at a time, so that temporaries stay small whatever the tensor."""


class BlockError(ValueError):
    """Stored values that are not what was asked for; the caller knows file and tensor and says them."""


@dataclass(frozen=True)
class BlockFormat:
    """How a tensor type stores weights."""

    name: str
    weights: int
    """Weights a block."""
    bytes: int
    """Bytes a block."""
    decode: Callable[[Bytes2D], Float32Array] | None = None
    """[blocks, bytes] -> [blocks, weights]; None: see `integers`, and if that is None too, known size only."""
    integers: Callable[[Bytes2D], tuple[Int8Array, Float32Array]] | None = None
    """[blocks, bytes] -> integers [blocks, weights] and scales [blocks, 1], whose product are the weights."""
    tail: int = 0
    """Bytes behind the last block of a tensor."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor whose rows are whole blocks."""
        return prod(shape) // self.weights * self.bytes + self.tail

    @property
    def decodable(self) -> bool:
        """Whether the values can be read here."""
        return self.decode is not None or self.integers is not None or self.name == "I2_S"


def decode_tensor(block: BlockFormat, data: Bytes, shape: tuple[int, ...], layout: str | None = None) -> Float32Array:
    """Values of a tensor as float32, in memory of their own. A scale that is not finite gives values that are not.

    Args:
        block: The tensor's type; `decodable`.
        data: All its bytes.
        shape: Slowest dimension first.
        layout: Byte order of I2_S, a key of `I2_S_LAYOUTS`; unused by other types.

    Raises:
        BlockError: I2_S that does not hold ternary codes, or a layout that does not fit the columns.
    """
    if block.name == "I2_S":
        codes, scale = _decode_i2_s(data, shape, layout)
        return np.multiply(codes, scale, dtype=np.float32)
    blocks = data.reshape(-1, block.bytes)
    values = np.empty((len(blocks), block.weights), dtype=np.float32)
    step = max(1, _PIECE_WEIGHTS // block.weights)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(blocks), step):
            piece = blocks[start : start + step]
            if block.decode is not None:
                values[start : start + step] = block.decode(piece)
            else:
                assert block.integers is not None
                integers, scales = block.integers(piece)
                np.multiply(integers, scales, out=values[start : start + step])
    return values.reshape(shape)


def decode_ternary(
    block: BlockFormat, data: Bytes, shape: tuple[int, ...], layout: str | None = None
) -> tuple[Int8Array, np.float32]:
    """Codes -1, 0, 1 (int8, in `shape`) and the one scale of a ternary tensor; arguments as of `decode_tensor`.

    Exact: nothing is rounded. Types that hold plain numbers are ternary when all magnitudes but zero are equal.

    Raises:
        BlockError: blocks differ in scale, a value is not ternary, or the scale is negative or not finite.
    """
    if block.name == "I2_S":
        codes, scale = _decode_i2_s(data, shape, layout)
    elif block.integers is not None:
        codes, scale = _ternary_blocks(block.integers, data.reshape(-1, block.bytes), block.weights)
    else:
        codes, scale = _ternary_values(decode_tensor(block, data, shape))
    if not np.isfinite(scale) or scale < 0:
        raise BlockError(f"its scale is {scale}, expected a positive number")
    return codes.reshape(shape), scale


def _ternary_blocks(
    integers: Callable[[Bytes2D], tuple[Int8Array, Float32Array]], blocks: Bytes2D, weights: int
) -> tuple[Int8Array, np.float32]:
    codes = np.empty((len(blocks), weights), dtype=np.int8)
    step = max(1, _PIECE_WEIGHTS // weights)
    scale: np.float32 | None = None
    for start in range(0, len(blocks), step):
        values, scales = integers(blocks[start : start + step])
        first = np.float32(scales[0, 0])
        scale = first if scale is None else scale
        # Bits, not values: NaN equals itself here, and is refused by the caller.
        differing = np.flatnonzero(scales[:, 0].view(np.uint32) != np.asarray(scale).view(np.uint32))
        if differing.size:
            at = int(differing[0])
            raise BlockError(f"block {start + at} has the scale {scales[at, 0]}, block 0 has {scale}")
        _check_ternary(values)
        codes[start : start + step] = values
    assert scale is not None
    return codes, scale


def _ternary_values(values: Float32Array) -> tuple[Int8Array, np.float32]:
    flat = values.reshape(-1)
    scale = np.float32(max(flat.max(), -flat.min()))
    if not np.isfinite(scale):
        return np.zeros(values.shape, dtype=np.int8), scale
    codes = np.empty(flat.shape, dtype=np.int8)
    for start in range(0, len(flat), _PIECE_WEIGHTS):
        piece = flat[start : start + _PIECE_WEIGHTS]
        signs = np.sign(piece)
        wrong = np.flatnonzero(signs * scale != piece)
        if wrong.size:
            raise BlockError(f"it holds {piece[wrong[0]]}, where 0 and ±{scale} would be ternary")
        codes[start : start + _PIECE_WEIGHTS] = signs
    return codes.reshape(values.shape), scale


def _check_ternary(integers: Int8Array) -> None:
    if integers.min() < -1 or integers.max() > 1:
        raise BlockError(f"it holds the codes {integers.min()} to {integers.max()}, ternary is -1 to 1")


def _decode_i2_s(data: Bytes, shape: tuple[int, ...], layout: str | None) -> tuple[Int8Array, np.float32]:
    """A block's n/4 bytes hold its quarters in bits 6-7, 4-5, 2-3 and 0-1; the scale opens the tensor's 32-byte tail."""
    if layout is None or layout not in I2_S_LAYOUTS:
        raise BlockError(f"its byte order {layout!r} is not one of {', '.join(I2_S_LAYOUTS)}")
    weights = I2_S_LAYOUTS[layout]
    if shape[-1] % weights:
        raise BlockError(f"rows of {shape[-1]} weights are no whole blocks of {weights}, as the {layout} layout has")
    count = prod(shape)
    quarter = weights // 4
    blocks = data[: count // 4].reshape(-1, quarter)
    codes = np.empty((len(blocks), 4, quarter), dtype=np.int8)
    for index, shift in enumerate((6, 4, 2, 0)):
        codes[:, index] = (blocks >> shift) & 3
    codes -= 1
    _check_ternary(codes)
    scale = np.float32(data[count // 4 : count // 4 + 4].view("<f4")[0])
    return codes.reshape(shape), scale


def _half(blocks: Bytes2D, at: int) -> Float32Array:
    """The fp16 number that starts at byte `at` of every block, as a [blocks, 1] column."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes2D) -> Bytes2D:
    """Low halves of all bytes, then high halves."""
    return np.concatenate([packed & np.uint8(0x0F), packed >> np.uint8(4)], axis=1)


def _decode_f32(blocks: Bytes2D) -> Float32Array:
    return blocks.view("<f4").astype(np.float32)


def _decode_f16(blocks: Bytes2D) -> Float32Array:
    return blocks.view("<f2").astype(np.float32)


def _decode_bf16(blocks: Bytes2D) -> Float32Array:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _decode_q4_1(blocks: Bytes2D) -> Float32Array:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _decode_q6_k(blocks: Bytes2D) -> Float32Array:
    """128 + 64 + 16 + 2 bytes: four low bits, two high bits, sixteen scales, d; in two halves of 128 weights."""
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    quarters = [low[:, :, 0] & 0x0F, low[:, :, 1] & 0x0F, low[:, :, 0] >> 4, low[:, :, 1] >> 4]
    codes = np.stack([quarter | ((high[:, :, 0] >> (2 * i) & 3) << 4) for i, quarter in enumerate(quarters)], axis=2)
    centred = codes.reshape(-1, 16, 16).astype(np.float32) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)[:, :, None]
    return (_half(blocks, 208)[:, :, None] * scales * centred).reshape(-1, 256)


def _integers_q4_0(blocks: Bytes2D) -> tuple[Int8Array, Float32Array]:
    return _nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8), _half(blocks, 0)


def _integers_q8_0(blocks: Bytes2D) -> tuple[Int8Array, Float32Array]:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0)


def _integers_q2_0(blocks: Bytes2D) -> tuple[Int8Array, Float32Array]:
    """d, then 16 bytes of four neighbours each, the first in the lowest bits."""
    pairs = blocks[:, 2:, None] >> np.array([0, 2, 4, 6], dtype=np.uint8) & 3
    return pairs.reshape(-1, 64).view(np.int8) - np.int8(1), _half(blocks, 0)


def _integers_tq2_0(blocks: Bytes2D) -> tuple[Int8Array, Float32Array]:
    """Two halves of 128 weights in 32 bytes, whose bit pairs from the lowest hold 32 neighbours each; then d."""
    halves = blocks[:, :64].reshape(-1, 2, 1, 32)
    pairs = halves >> np.array([[0], [2], [4], [6]], dtype=np.uint8) & 3
    return pairs.reshape(-1, 256).view(np.int8) - np.int8(1), _half(blocks, 64)


def _integers_tq1_0(blocks: Bytes2D) -> tuple[Int8Array, Float32Array]:
    """32 + 16 bytes of five trits and 4 bytes of four, then d.

    A byte b is a fraction b / 256 in base 3. The trit after n others is the integer part of 3 frac(3^n b / 256), which
    eight bits of arithmetic give exactly; a byte's trits lie as far apart as the group has bytes.
    """
    groups: list[NDArray[np.uint8]] = []
    for start, end, trits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        rest = blocks[:, start:end].copy()
        for _ in range(trits):
            tripled = rest.astype(np.uint16) * 3
            groups.append((tripled >> 8).astype(np.uint8))
            rest = tripled.astype(np.uint8)
    return np.concatenate(groups, axis=1).view(np.int8) - np.int8(1), _half(blocks, 52)


FORMATS_BY_ID: Mapping[int, BlockFormat] = MappingProxyType({
    0: BlockFormat("F32", 1, 4, _decode_f32),
    1: BlockFormat("F16", 1, 2, _decode_f16),
    2: BlockFormat("Q4_0", 32, 18, integers=_integers_q4_0),
    3: BlockFormat("Q4_1", 32, 20, _decode_q4_1),
    6: BlockFormat("Q5_0", 32, 22),
    7: BlockFormat("Q5_1", 32, 24),
    8: BlockFormat("Q8_0", 32, 34, integers=_integers_q8_0),
    9: BlockFormat("Q8_1", 32, 36),
    10: BlockFormat("Q2_K", 256, 84),
    11: BlockFormat("Q3_K", 256, 110),
    12: BlockFormat("Q4_K", 256, 144),
    13: BlockFormat("Q5_K", 256, 176),
    14: BlockFormat("Q6_K", 256, 210, _decode_q6_k),
    15: BlockFormat("Q8_K", 256, 292),
    16: BlockFormat("IQ2_XXS", 256, 66),
    17: BlockFormat("IQ2_XS", 256, 74),
    18: BlockFormat("IQ3_XXS", 256, 98),
    19: BlockFormat("IQ1_S", 256, 50),
    20: BlockFormat("IQ4_NL", 32, 18),
    21: BlockFormat("IQ3_S", 256, 110),
    22: BlockFormat("IQ2_S", 256, 82),
    23: BlockFormat("IQ4_XS", 256, 136),
    24: BlockFormat("I8", 1, 1),
    25: BlockFormat("I16", 1, 2),
    26: BlockFormat("I32", 1, 4),
    27: BlockFormat("I64", 1, 8),
    28: BlockFormat("F64", 1, 8),
    29: BlockFormat("IQ1_M", 256, 56),
    30: BlockFormat("BF16", 1, 2, _decode_bf16),
    34: BlockFormat("TQ1_0", 256, 54, integers=_integers_tq1_0),
    35: BlockFormat("TQ2_0", 256, 66, integers=_integers_tq2_0),
    36: BlockFormat("I2_S", 4, 1, tail=32),
    39: BlockFormat("MXFP4", 32, 17),
    40: BlockFormat("NVFP4", 64, 36),
    41: BlockFormat("Q1_0", 128, 18),
    42: BlockFormat("Q2_0", 64, 18, integers=_integers_q2_0),
})  # fmt: skip

FORMATS_BY_NAME: Mapping[str, BlockFormat] = MappingProxyType({block.name: block for block in FORMATS_BY_ID.values()})

TYPE_IDS: Mapping[str, int] = MappingProxyType({block.name: number for number, block in FORMATS_BY_ID.items()})
