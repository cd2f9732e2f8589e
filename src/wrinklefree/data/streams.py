"""Endless batches that continue bit for bit from a saved state.

Text is read in blocks: documents of a block are tokenized together, cut into pieces of at most a row, and shuffled. A
block is a pure function of where its reader stood, so the state of a shuffle is that position and an index, never the
texts. The next block is prepared by a thread while the current one is used; blocks start small, so the first step does
not wait for a full one.

Sources share the stream by *tokens*: the next piece comes from the source that is furthest behind its weight. Shares
then hold at any moment, whatever the lengths of the documents, and need no random draw that a resume would have to
repeat.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from wrinklefree.data.packing import Packer, Piece, Row, collate, cut_to_length, next_token_piece
from wrinklefree.data.sources import DocumentReader
from wrinklefree.data.tokens import Tokenizer, encode_documents
from wrinklefree.models.records import Batch
from wrinklefree.utils.errors import DataError

FIRST_BLOCK = 64
"""Documents of a source's first block; blocks double up to the shuffle buffer."""
LARGEST_FINITE_BLOCK = 1024
"""Documents of a block where the reader has shuffled already."""


class BatchStream(Protocol):
    """What the trainer draws from."""

    @property
    def tokens_per_batch(self) -> int:
        """Positions of a batch: rows x length."""
        ...

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of one pass over a task's examples; None for text."""
        ...

    @property
    def padding_share(self) -> float:
        """Share of all positions so far that were padding."""
        ...

    def next_batch(self) -> Batch:
        """The next batch; there is always one."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next batches; JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        ...


@dataclass(frozen=True)
class _Block:
    """Shuffled pieces, and where the reader stood before them."""

    number: int
    reader_state: dict[str, Any]
    pieces: list[Piece]


class PieceCursor:
    """Shuffled pieces of one source."""

    def __init__(
        self, reader: DocumentReader, tokenizer: Tokenizer, *, name: str, length: int, block_size: int, seed: int,
        rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        self._reader = reader
        self._tokenizer = tokenizer
        self._name = name
        self._length = length
        self._block_size = block_size
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._block: _Block | None = None
        self._ahead: Future[_Block] | None = None
        self._index = 0

    def next_piece(self) -> Piece:
        """The next piece.

        Raises:
            DataError: the source holds no document for training.
        """
        block = self._block
        if block is None:
            block = self._block = self._make_block(0)
            self._prepare(1)
        while self._index >= len(block.pieces):
            block = self._block = self._take_ahead(block.number + 1)
            self._index = 0
            self._prepare(block.number + 1)
        self._index += 1
        return block.pieces[self._index - 1]

    def state_dict(self) -> dict[str, Any]:
        """Position of the reader before the current block, and how much of the block is used."""
        if self._block is None:
            return {"block": 0, "index": 0, "reader": self._reader.state_dict()}
        return {"block": self._block.number, "index": self._index, "reader": self._block.reader_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Read the block again and continue inside it."""
        if self._ahead is not None:
            # The thread may be reading; let it finish before the reader moves.
            self._ahead.exception()
            self._ahead = None
        self._reader.load_state_dict(state["reader"])
        self._index = state["index"]
        self._block = self._make_block(state["block"])
        self._prepare(state["block"] + 1)

    def _prepare(self, number: int) -> None:
        self._ahead = self._pool.submit(self._make_block, number)

    def _take_ahead(self, number: int) -> _Block:
        return self._ahead.result() if self._ahead is not None else self._make_block(number)

    def _make_block(self, number: int) -> _Block:
        """Blocks are numbered from 0; the number seeds the shuffle and sets the size."""
        reader_state, first_epoch = self._reader.state_dict(), self._reader.epoch
        size = min(self._block_size, FIRST_BLOCK << min(number, 32))
        pieces: list[Piece] = []
        while not pieces:
            # Rank r takes every world_size-th document of what all ranks read alike.
            texts = self._reader.read(size * self._world_size)[self._rank :: self._world_size]
            for document in encode_documents(texts, self._tokenizer):
                pieces.extend(cut_to_length(next_token_piece(document), self._length))
            if not pieces and self._reader.epoch > first_epoch + 1:
                raise DataError(f"{self._name} holds no document to train on; check its text and held_out_percent")
        order = np.random.default_rng([self._seed, number]).permutation(len(pieces))
        return _Block(number, reader_state, [pieces[index] for index in order])


class TextStream:
    """Packed rows of text from one or more sources; every token is a target."""

    batches_per_epoch: int | None = None

    def __init__(
        self, cursors: Sequence[PieceCursor], weights: Sequence[float], *, batch_size: int, length: int,
        packing: bool, pad_token_id: int,
    ) -> None:  # fmt: skip
        self._cursors = list(cursors)
        self._weights = list(weights)
        self._batch_size, self._length, self._pad_token_id = batch_size, length, pad_token_id
        self._packer = Packer(length, enabled=packing)
        self._served = [0] * len(self._cursors)
        self._positions = self._padding = 0

    @property
    def tokens_per_batch(self) -> int:
        """See `BatchStream`."""
        return self._batch_size * self._length

    @property
    def padding_share(self) -> float:
        """See `BatchStream`."""
        return self._padding / max(1, self._positions)

    @property
    def tokens_by_source(self) -> tuple[int, ...]:
        """Tokens drawn from each source so far."""
        return tuple(self._served)

    def next_row(self) -> Row:
        """The next row."""
        while True:
            behind = min(range(len(self._served)), key=lambda index: self._served[index] / self._weights[index])
            piece = self._cursors[behind].next_piece()
            self._served[behind] += len(piece)
            # A piece is at most a row long, so it completes at most one.
            for row in self._packer.add(piece):
                self._positions += self._length
                self._padding += self._length - len(row)
                return row

    def next_batch(self) -> Batch:
        """See `BatchStream`."""
        return collate([self.next_row() for _ in range(self._batch_size)], self._length, self._pad_token_id)

    def state_dict(self) -> dict[str, Any]:
        """See `BatchStream`."""
        return {
            "served": list(self._served),
            "cursors": [cursor.state_dict() for cursor in self._cursors],
            "packer": self._packer.state_dict(),
            "positions": self._positions,
            "padding": self._padding,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BatchStream`."""
        self._served = list(state["served"])
        for cursor, saved in zip(self._cursors, state["cursors"], strict=True):
            cursor.load_state_dict(saved)
        self._packer.load_state_dict(state["packer"])
        self._positions, self._padding = state["positions"], state["padding"]
