"""Ternary codes, and the few tensors that stay numbers, as bytes.

Two families. `TERNARY_FORMATS` are the block formats of GGUF that hold ternary weights without loss: codes as they are,
the scale once a block in fp16 or once a tensor in float32. (Quantizers made for ordinary weights derive a scale of
their own from each block: that wrecks ternary weights, so they are not used.) `pack_codes` is the plain form for
tensors in motion between processes: four codes a byte, row by row, on any device.

Formats by bits a weight: TQ1_0 1.69, I2_S 2.00, TQ2_0 2.06, Q2_0 2.25, Q4_0 4.5. Decoding is in `utils.gguf_blocks` and
was written apart from this file: each is the other's test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.gguf_blocks import FORMATS_BY_NAME, I2_S_LAYOUTS, BlockError, decode_ternary

Bytes = NDArray[np.uint8]
Int8Array = NDArray[np.int8]

CODES_PER_BYTE = 4
_PIECE_WEIGHTS = 1 << 22
"""Weights encoded at a time: temporaries are a few bytes a weight, so they stay below 64 MB."""
_SMALLEST_HALF = 2.0**-14
"""Smallest fp16 number of full precision; below it the relative error of a scale grows without bound."""
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class TernaryFormat:
    """A GGUF block format that holds ternary weights exactly."""

    name: str
    """What a user asks for; I2_S has one name for each family of CPUs."""
    gguf_type: str
    """Name in `gguf_blocks.FORMATS_BY_NAME`."""
    block_size: int
    """Weights a block; the columns must be a multiple of it."""
    _encode: Callable[[Bytes, Bytes], None]
    """Writes digits [blocks, block_size] (code + 1) into the bytes [blocks, bytes a block], all but the scale."""
    _scale_at: int | None
    """Byte of a block where its fp16 scale stands; None: one float32 behind the tensor."""
    layout: str | None = None
    """Byte order of I2_S, the value of the metadata key `wrinklefree.i2_s_layout`."""

    @property
    def block_bytes(self) -> int:
        """Bytes a block."""
        block = FORMATS_BY_NAME[self.gguf_type]
        return self.block_size // block.weights * block.bytes

    def stored_scale(self, scale: float) -> np.float32:
        """The scale that a reader gets back: rounded to fp16 where blocks hold it so.

        Raises:
            CheckpointError: fp16 cannot hold the scale with its full precision.
        """
        value = np.float32(scale)
        if not np.isfinite(value) or value <= 0:
            raise CheckpointError(f"a ternary weight has the scale {scale}; it must be positive and finite")
        if self._scale_at is None:
            return value
        if not _SMALLEST_HALF <= value <= _LARGEST_HALF:
            raise CheckpointError(
                f"the scale {scale:.6g} of a ternary weight is outside fp16's range of {_SMALLEST_HALF:.3g} to "
                f"{_LARGEST_HALF:.0f}, in which {self.name} stores it; use I2_S or F32, which keep it in float32"
            )
        return np.float32(np.float16(value))

    def pack(self, codes: Int8Array, scale: float) -> Bytes:
        """All bytes of a tensor, flat.

        Args:
            codes: -1, 0 and 1, [rows, columns].
            scale: What multiplies them; every block carries it, one of zeros only too.

        Raises:
            CheckpointError: the columns are no multiple of the block, or the scale does not fit.
            ValueError: `codes` are not two-dimensional int8 of -1, 0 and 1.
        """
        if codes.ndim != 2 or codes.dtype != np.int8:
            raise ValueError(f"codes are {codes.dtype} {codes.shape}, expected int8 [rows, columns]")
        stored = self.stored_scale(scale)
        rows, columns = codes.shape
        self._check_columns(columns)
        blocks_a_row = columns // self.block_size
        size = rows * blocks_a_row * self.block_bytes
        data = np.zeros(size + FORMATS_BY_NAME[self.gguf_type].tail, dtype=np.uint8)
        blocks = data[:size].reshape(-1, self.block_bytes)
        if self._scale_at is None:
            data[size : size + 4] = np.frombuffer(stored.astype("<f4").tobytes(), dtype=np.uint8)
        else:
            half = np.frombuffer(np.float16(stored).astype("<f2").tobytes(), dtype=np.uint8)
            blocks[:, self._scale_at : self._scale_at + 2] = half
        step = max(1, _PIECE_WEIGHTS // columns)
        for start in range(0, rows, step):
            piece = codes[start : start + step]
            if piece.min() < -1 or piece.max() > 1:
                raise ValueError(f"codes are {piece.min()} to {piece.max()}, expected -1 to 1")
            digits = (piece + np.int8(1)).view(np.uint8).reshape(-1, self.block_size)
            self._encode(digits, blocks[start * blocks_a_row : start * blocks_a_row + len(digits)])
        return data

    def unpack(self, data: Bytes, rows: int, columns: int) -> tuple[Int8Array, np.float32]:
        """Codes [rows, columns] and scale out of the bytes that `pack` wrote.

        Raises:
            CheckpointError: the columns are no multiple of the block.
            BlockError: the bytes hold something else than one ternary tensor.
        """
        self._check_columns(columns)
        block = FORMATS_BY_NAME[self.gguf_type]
        if data.size != block.nbytes((rows, columns)):
            raise BlockError(
                f"{data.size} bytes, but {rows}x{columns} {self.name} takes {block.nbytes((rows, columns))}"
            )
        return decode_ternary(block, data, (rows, columns), self.layout)

    def _check_columns(self, columns: int) -> None:
        if columns == 0 or columns % self.block_size:
            raise CheckpointError(
                f"{self.name} stores rows in blocks of {self.block_size} weights, and {columns} columns are no multiple "
                "of it; pad the model, or use Q2_0 (blocks of 64) or Q4_0 (32)"
            )


def _encode_tq1_0(digits: Bytes, blocks: Bytes) -> None:
    """240 digits five a byte, 16 digits four a byte; a byte's digits are 32, 16 or 4 weights apart, first one highest.

    A byte is the base-3 number n of five digits as a fraction of 3^5, rounded up to 1/256: ceil(256 n / 243). So
    multiplying by 3 and taking the carry yields digit after digit, without a division.
    """
    numbers = np.arange(3**5, dtype=np.uint16)
    fractions = ((numbers * 256 + 242) // 243).astype(np.uint8)
    for start, end, groups, at in ((0, 160, 5, 0), (160, 240, 5, 32), (240, 256, 4, 48)):
        width = (end - start) // groups
        grouped = digits[:, start:end].reshape(-1, groups, width)
        number = np.zeros((len(digits), width), dtype=np.uint8)
        for group in range(groups):
            number *= 3
            number += grouped[:, group]
        # The 16 digits of the last four bytes leave the lowest place empty.
        number *= 3 ** (5 - groups)
        blocks[:, at : at + width] = fractions[number]


def _encode_tq2_0(digits: Bytes, blocks: Bytes) -> None:
    """Each half of 128 weights in 32 bytes: weights j, j + 32, j + 64, j + 96 from the lowest bits of byte j up."""
    quarters = digits.reshape(-1, 2, 4, 32)
    packed = blocks[:, :64].reshape(-1, 2, 32)
    _gather_bits(packed, [quarters[:, :, index] for index in range(4)])
    blocks[:, :64] = packed.reshape(-1, 64)


def _encode_q2_0(digits: Bytes, blocks: Bytes) -> None:
    """Four neighbours a byte, the first in the lowest bits: a little-endian word of four digits, folded."""
    words = digits.view("<u4")
    blocks[:, 2:] = (words | words >> 6 | words >> 12 | words >> 18).astype(np.uint8)


def _encode_q4_0(digits: Bytes, blocks: Bytes) -> None:
    """Weight j in the low, weight j + 16 in the high half of byte j, as 8 + code."""
    blocks[:, 2:] = (digits[:, :16] + 7) | (digits[:, 16:] + 7) << 4


def _encode_i2_s(digits: Bytes, blocks: Bytes) -> None:
    """The block's quarters in the highest bits, the next, the next and the lowest of its bytes."""
    quarters = digits.reshape(len(digits), 4, -1)
    _gather_bits(blocks, [quarters[:, index] for index in (3, 2, 1, 0)])


def _gather_bits(out: Bytes, lanes: list[Bytes]) -> None:
    """Four digits a byte, the first lane in the lowest bits."""
    np.left_shift(lanes[3], 2, out=out)
    for lane in (lanes[2], lanes[1]):
        out |= lane
        out <<= 2
    out |= lanes[0]


_FORMATS = (
    TernaryFormat("TQ1_0", "TQ1_0", 256, _encode_tq1_0, 52),
    TernaryFormat("TQ2_0", "TQ2_0", 256, _encode_tq2_0, 64),
    TernaryFormat("Q2_0", "Q2_0", 64, _encode_q2_0, 0),
    TernaryFormat("Q4_0", "Q4_0", 32, _encode_q4_0, 0),
    TernaryFormat("I2_S_X86", "I2_S", I2_S_LAYOUTS["x86"], _encode_i2_s, None, "x86"),
    TernaryFormat("I2_S_ARM", "I2_S", I2_S_LAYOUTS["arm"], _encode_i2_s, None, "arm"),
)

TERNARY_FORMATS: Mapping[str, TernaryFormat] = MappingProxyType({entry.name: entry for entry in _FORMATS})


def pack_codes(codes: Tensor) -> Tensor:
    """Codes int8 [..., columns] of -1, 0, 1 as uint8 [..., ceil(columns / 4)], on the same device.

    Code + 1 in two bits, the first of four neighbours in the lowest; the last byte of a row is filled up with code 0.
    Values are not checked: that would synchronise with a GPU.
    """
    digits = torch.nn.functional.pad(codes + 1, (0, -codes.shape[-1] % CODES_PER_BYTE), value=1).view(torch.uint8)
    lanes = digits.reshape(*digits.shape[:-1], -1, CODES_PER_BYTE)
    return lanes[..., 0] | lanes[..., 1] << 2 | lanes[..., 2] << 4 | lanes[..., 3] << 6


def unpack_codes(packed: Tensor, columns: int) -> Tensor:
    """Codes int8 [..., columns] out of what `pack_codes` made.

    Raises:
        ValueError: the last dimension is not what `columns` codes take.
    """
    if packed.shape[-1] != -(-columns // CODES_PER_BYTE) or packed.dtype != torch.uint8:
        raise ValueError(f"{packed.dtype} {list(packed.shape)} does not hold rows of {columns} codes")
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    digits = packed.unsqueeze(-1) >> shifts & 3
    return digits.flatten(-2)[..., :columns].view(torch.int8) - 1
