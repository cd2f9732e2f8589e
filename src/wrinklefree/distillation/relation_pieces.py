"""Which positions a relation loss compares at a time.

On a CPU a piece is one document of one row, for as many heads as the byte budget holds: no pair is computed that does not
count, and a packed row costs what its documents cost alone. On other devices reading the borders would stall, so the one
piece is the whole batch, and pairs across documents are masked.

Shapes: B rows, H heads, T positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wrinklefree.models.runs import Run, find_runs

CPU_BLOCK_BYTES = 2**20
"""Bytes a thread of one float32 block of scores on a CPU, where a few of them should stay in the threads' caches."""
DEFAULT_BLOCK_BYTES = 256 * 2**20
"""On every other device: accelerators need larger blocks to be busy."""
CPU_ROWS = 128
"""Positions of a block on a CPU. Matrix products of fewer rows are slower, more rows take memory."""


@dataclass(frozen=True)
class Piece:
    """A part of a batch whose positions are compared with each other and with nothing else."""

    place: tuple[slice, slice, slice]
    """Rows, heads and positions of states [B, H, T, width]."""
    length: int
    """Positions."""
    block_rows: int
    """Positions whose scores are held at a time."""
    documents: Tensor | None
    """[B, T], where pairs across documents and padding (id 0) must be masked; None: every pair of the piece counts."""

    def blocks(self) -> list[slice]:
        """Positions of each block, in order."""
        starts = range(0, self.length, self.block_rows)
        return [slice(start, min(start + self.block_rows, self.length)) for start in starts]


def find_pieces(states: Tensor, documents: Tensor | None, block_rows: int | None) -> Iterator[Piece]:
    """Pieces of states [B, H, T, width] with these documents [B, T].

    `documents` None: all positions of a row see each other, padding too. `block_rows` None: by the device's byte budget.
    """
    if states.device.type == "cpu":
        yield from document_pieces(states, documents, block_rows)
    else:
        yield whole_batch(states, documents, block_rows)


def whole_batch(states: Tensor, documents: Tensor | None, block_rows: int | None) -> Piece:
    """Everything as one piece, masked; nothing is read from the device."""
    rows, heads, length, _ = states.shape
    fitting = max(16, DEFAULT_BLOCK_BYTES // (4 * rows * heads * length))
    everything = (slice(0, rows), slice(0, heads), slice(0, length))
    return Piece(everything, length, min(length, block_rows or fitting), documents)


def document_pieces(states: Tensor, documents: Tensor | None, block_rows: int | None) -> Iterator[Piece]:
    """A piece a document and group of heads; padding is in none. Reads the documents."""
    rows, heads, length, _ = states.shape
    budget = CPU_BLOCK_BYTES * torch.get_num_threads()
    runs = ((Run(0, length, is_padding=False),),) * rows if documents is None else find_runs(documents)
    for row, runs_of_row in enumerate(runs):
        for run in runs_of_row:
            if run.is_padding:
                continue
            size = run.end - run.start
            height = min(size, block_rows or CPU_ROWS)
            together = max(1, budget // (4 * height * size))
            for head in range(0, heads, together):
                place = (slice(row, row + 1), slice(head, min(head + together, heads)), slice(run.start, run.end))
                yield Piece(place, size, height, None)


def same_document(documents_BT: Tensor, rows: slice, columns: slice) -> Tensor:
    """Pairs that count, bool [B, 1, rows, columns]: of one document, padding never."""
    own, other = documents_BT[:, rows, None], documents_BT[:, None, columns]
    return ((own == other) & (own != 0)).unsqueeze(1)


def mask_blocks(blocks: Tensor, allowed: Tensor | None, fill: float) -> Tensor:
    """Blocks [B * H, rows, columns] with `fill` wherever a pair of `allowed` [B, 1, rows, columns] is false, in place."""
    if allowed is not None:
        by_row: Tensor = blocks.view(allowed.shape[0], -1, *blocks.shape[1:])
        by_row.masked_fill_(~allowed, fill)
    return blocks
