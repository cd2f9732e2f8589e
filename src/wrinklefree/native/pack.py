"""Weights in the order in which the C kernels read them (csrc/kernels.h draws the tiles).

Everything is padded: rows to 64, columns to 4, with zero weights; float vectors to 64 with zeros. Packing is a few numpy
passes a block of rows, at some hundred million weights a second.
"""

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS, COLUMNS = 64, 4
HUGE_PAGE = 1 << 21
NIBBLE_COLUMNS, NIBBLE_BYTES, NIBBLE_LEVELS = 32, 1088, 63
"""Columns that share a multiplier, bytes of 64 rows of them, largest multiplier (csrc/kernels.h)."""
SHRINKS = (1.0, 0.93, 0.86, 0.79, 0.72)
"""Parts of the exact range that are tried: cutting the largest weights makes the steps of all others finer."""
BLOCKS_AT_ONCE = 16
"""Blocks of rows that one pass handles: what it needs meanwhile stays small."""


@dataclass(frozen=True)
class PackedLinear:
    """A ternary weight in tiles, with its scale."""

    tiles: NDArray[np.uint8]
    """[rows / 64, columns / 4, 64], padded."""
    scale: float
    rows: int
    """Output features, without padding."""
    columns: int
    """Input features, without padding."""
    bias: NDArray[np.float32] | None = None
    """Padded to a multiple of 64."""


def padded(size: int, multiple: int = ROWS) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def huge_array(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Zeroed memory of its own, in huge pages where the system has them: 4 KB pages cost an eighth of the reading speed."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not hasattr(mmap, "MADV_HUGEPAGE") or nbytes < HUGE_PAGE:
        return np.zeros(shape, dtype)
    # Private, as Linux gives shared memory small pages; one page more, so that the array can start at a huge one.
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE
    return np.frombuffer(memory, dtype, count=int(np.prod(shape)), offset=start).reshape(shape)


def one_after_another(arrays: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Copies of small arrays in huge pages that they share; each starts at a cache line."""
    starts = [0]
    for array in arrays:
        starts.append(starts[-1] + padded(array.nbytes))
    memory = huge_array((starts[-1],), np.uint8)
    copies: list[NDArray[np.uint8]] = []
    for start, array in zip(starts[:-1], arrays, strict=True):
        copies.append(memory[start : start + array.nbytes].reshape(array.shape))
        copies[-1][:] = array
    return copies


def padded_vector(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 with zeros up to a multiple of 64."""
    result = np.zeros(padded(len(values)), np.float32)
    result[: len(values)] = values
    return result


def pack_ternary(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Codes -1, 0, 1 [rows, columns] as tiles [rows / 64, columns / 4, 64].

    Byte 4 r + j of a tile holds column j of the rows r, 16 + r, 32 + r, 48 + r in its four pairs of bits, as code + 1.
    """
    rows, columns = codes.shape
    groups = padded(columns, COLUMNS) // COLUMNS
    tiles = huge_array((padded(rows) // ROWS, groups, ROWS), np.uint8)
    for start in range(0, len(tiles), BLOCKS_AT_ONCE):
        blocks = min(BLOCKS_AT_ONCE, len(tiles) - start)
        stored = np.ones((blocks * ROWS, groups * COLUMNS), np.uint8)
        part = codes[start * ROWS : (start + blocks) * ROWS]
        np.add(part, 1, out=stored[: len(part), :columns], casting="unsafe")
        planes = stored.reshape(blocks, 4, 16, groups, COLUMNS)
        merged = planes[:, 0] | planes[:, 1] << 2 | planes[:, 2] << 4 | planes[:, 3] << 6
        tiles[start : start + blocks] = merged.swapaxes(1, 2).reshape(blocks, groups, ROWS)
    return tiles


def unpack_ternary(tiles: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.int8]:
    """The inverse of `pack_ternary`."""
    blocks, groups, _ = tiles.shape
    merged = tiles.reshape(blocks, groups, 16, COLUMNS).swapaxes(1, 2)
    planes = np.stack([merged >> 2 * plane & 3 for plane in range(4)], axis=1)
    return (planes.reshape(blocks * ROWS, groups * COLUMNS)[:rows, :columns].astype(np.int8) - 1).astype(np.int8)


def pack_linear(codes: NDArray[np.int8], scale: float, bias: NDArray[np.float32] | None = None) -> PackedLinear:
    """A projection [out_features, in_features] ready for C."""
    rows, columns = codes.shape
    return PackedLinear(pack_ternary(codes), scale, rows, columns, None if bias is None else padded_vector(bias))


Reader = Callable[[NDArray[Any]], NDArray[np.float32]]
"""What makes float32 of some rows of a stored weight."""


def _read(rows: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(rows, np.float32)


def pack_bytes(weight: NDArray[Any], read: Reader = _read) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """8-bit tiles [rows / 64, columns / 4, 256] of a weight [rows, columns], and one scale a row (padded).

    weight = scale * q with q = round(weight / scale), scale = max |row| / 127; stored are q + 128.
    """
    rows, columns = weight.shape
    groups = padded(columns, COLUMNS) // COLUMNS
    tiles = huge_array((padded(rows) // ROWS, groups, ROWS * COLUMNS), np.uint8)
    scales = np.zeros(padded(rows), np.float32)
    for start in range(0, len(tiles), BLOCKS_AT_ONCE):
        blocks = min(BLOCKS_AT_ONCE, len(tiles) - start)
        part = read(weight[start * ROWS : (start + blocks) * ROWS])
        scale = np.maximum(np.abs(part).max(axis=1) / 127, np.finfo(np.float32).tiny)
        scales[start * ROWS : start * ROWS + len(part)] = scale
        stored = np.full((blocks * ROWS, groups * COLUMNS), 128, np.uint8)
        stored[: len(part), :columns] = np.rint(part / scale[:, None]) + 128
        ordered = stored.reshape(blocks, ROWS, groups, COLUMNS).swapaxes(1, 2)
        tiles[start : start + blocks] = ordered.reshape(blocks, groups, ROWS * COLUMNS)
    return tiles, scales


def pack_nibbles(weight: NDArray[Any], read: Reader = _read) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """4-bit tiles [rows / 64, columns / 32, 1088] of a weight [rows, columns], and one scale a row (padded).

    weight = scale * multiplier * q with q from -8 to 7 and, for every 32 columns of a row, the multiplier (0 to 63) whose
    squared error is smallest of a few; stored are q + 8 and the multipliers.
    """
    rows, columns = weight.shape
    groups = padded(columns, NIBBLE_COLUMNS) // NIBBLE_COLUMNS
    tiles = huge_array((padded(rows) // ROWS, groups, NIBBLE_BYTES), np.uint8)
    scales = np.zeros(padded(rows), np.float32)
    for index in range(len(tiles)):
        block = np.zeros((ROWS, groups, NIBBLE_COLUMNS), np.float32)
        part = read(weight[index * ROWS : (index + 1) * ROWS])
        block.reshape(ROWS, -1)[: len(part), :columns] = part
        codes, multipliers, scale = _nibbles(block)
        scales[index * ROWS : (index + 1) * ROWS] = scale
        # [plane pair, nibble, 16 rows, group, tile, 4 columns]: byte 4 r + j of a tile's half has two rows' nibbles.
        planes = (codes + 8).astype(np.uint8).reshape(2, 2, 16, groups, 8, COLUMNS)
        merged = planes[:, 0] | planes[:, 1] << 4
        tiles[index, :, :1024] = merged.transpose(2, 3, 0, 1, 4).reshape(groups, 1024)
        tiles[index, :, 1024:] = multipliers.T
    return tiles, scales


def unpack_nibbles(tiles: NDArray[np.uint8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weight that 4-bit tiles stand for, float32 [rows, columns], both padded."""
    blocks, groups, _ = tiles.shape
    merged = tiles[:, :, :1024].reshape(blocks, groups, 8, 2, 16, COLUMNS)
    planes = (
        np.stack([merged & 15, merged >> 4], axis=4).astype(np.float32) - 8
    )  # [block, group, tile, pair, nibble, row, column]
    codes = planes.transpose(0, 3, 4, 5, 1, 2, 6).reshape(blocks, ROWS, groups, NIBBLE_COLUMNS)
    factors = tiles[:, :, 1024:].swapaxes(1, 2).astype(np.float32) * scales.reshape(blocks, ROWS, 1)
    return (codes * factors[..., None]).reshape(blocks * ROWS, groups * NIBBLE_COLUMNS).astype(np.float32)


def _nibbles(block: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]:
    """Codes and multipliers of a block [rows, groups, 32], and one scale a row."""
    largest = np.abs(block).max(axis=2)
    scale = np.maximum(largest.max(axis=1) / (7 * NIBBLE_LEVELS), np.finfo(np.float32).tiny)
    best_codes, best, error = np.zeros_like(block), np.zeros(largest.shape, np.uint8), np.full(largest.shape, np.inf)
    for shrink in SHRINKS:
        multipliers = np.clip(np.rint(largest * (shrink / 7) / scale[:, None]), 1, NIBBLE_LEVELS)
        step = (multipliers * scale[:, None])[..., None]
        codes = np.clip(np.rint(block / step), -8, 7)
        wrong = np.square(codes * step - block).sum(axis=2)
        better = wrong < error
        best_codes[better], best[better], error[better] = codes[better], multipliers[better], wrong[better]
    return best_codes, best, scale
