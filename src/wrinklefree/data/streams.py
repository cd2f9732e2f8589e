"""Endless batches that continue bit for bit from a saved state, on any number of processes that divides their lanes.

Text is read in blocks: documents of a block are tokenized together, cut into pieces of at most a row, and shuffled (or
packed into rows, which are shuffled). A block is a pure function of where its reader stood, so the state of a shuffle
is that position and an index, never the texts. The next block is prepared by a thread, and its tokens by worker processes
where there are any, while the current one is used; blocks start small, so the first step does not wait for a full one.

Documents are dealt to *lanes*: lane l of L takes every L-th document of what all lanes read alike, and packs its own
rows. Row n of the whole job comes from lane n mod L, and process r of W takes the rows n with n mod W = r. So every
document is trained on exactly once an epoch, each lane is served by one process, and when a run goes on with another
number of processes that divides L, all rows stay the same; only who computes them changes.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from wrinklefree.data.mixture import Mixture
from wrinklefree.data.packing import Packer, Piece, Row, best_fit, collate, cut_to_length, next_token_piece
from wrinklefree.data.sources import DocumentReader
from wrinklefree.data.tokens import Tokens
from wrinklefree.models.records import Batch
from wrinklefree.utils.errors import CheckpointError, DataError

FIRST_BLOCK = 64
"""Documents of a source's first block; blocks double up to the shuffle buffer."""
LARGEST_FINITE_BLOCK = 1024
"""Documents of a block where the reader has shuffled already."""

Document = TypeVar("Document")
Packing = Literal["none", "concat", "best_fit"]


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
        """Everything that decides the next batches of this process; JSON. See `merge_states` for several."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        ...


@dataclass(frozen=True)
class _Block:
    """Shuffled groups of pieces, and where the reader stood before them."""

    number: int
    reader_state: dict[str, Any]
    groups: list[tuple[Piece, ...]]


class PieceCursor(Generic[Document]):
    """One lane's shuffled pieces of one source, in groups: a piece alone, or with `best_fit` all pieces of a row."""

    def __init__(
        self, reader: DocumentReader[Document], encode: Callable[[Sequence[Document]], list[Tokens]], *, name: str,
        length: int, block_size: int, seed: int, packing: Packing = "concat", shuffle: bool = True, lane: int = 0,
        lane_count: int = 1,
    ) -> None:  # fmt: skip
        self._reader, self._encode = reader, encode
        self._name = name
        self._length = length
        self._block_size = block_size
        self._seed = seed
        self._packing, self._shuffle = packing, shuffle
        self._lane, self._lane_count = lane, lane_count
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._block: _Block | None = None
        self._ahead: Future[_Block] | None = None
        self._index = 0

    def next_group(self) -> tuple[Piece, ...]:
        """The next piece, or row of pieces.

        Raises:
            DataError: the source holds no document for training.
        """
        block = self._block
        if block is None:
            block = self._block = self._make_block(0)
            self._prepare(1)
        while self._index >= len(block.groups):
            block = self._block = self._take_ahead(block.number + 1)
            self._index = 0
            self._prepare(block.number + 1)
        self._index += 1
        return block.groups[self._index - 1]

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

    def settle(self) -> None:
        """Wait for the block that is being made ahead: afterwards nothing reads the source until the next call."""
        if self._ahead is not None:
            self._ahead.exception()

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
            # Every lane reads the same documents and takes its own of each lane_count.
            documents = self._reader.read(size * self._lane_count)[self._lane :: self._lane_count]
            for document in self._encode(documents):
                pieces.extend(cut_to_length(next_token_piece(document), self._length))
            if not pieces and self._reader.epoch > first_epoch + 1:
                raise DataError(f"{self._name} holds no document to train on; check its text and held_out_percent")
        if self._packing == "best_fit":
            groups = [row.pieces for row in best_fit(pieces, self._length)]
        else:
            groups = [(piece,) for piece in pieces]
        if self._shuffle or self._packing == "best_fit":
            order = np.random.default_rng([self._seed, number]).permutation(len(groups))
            groups = [groups[index] for index in order]
        return _Block(number, reader_state, groups)


class Lane:
    """Rows of the documents that one lane was dealt, the sources mixed by weight."""

    def __init__(
        self, cursors: Sequence[PieceCursor[Any]], weights: Sequence[float], *, length: int, packing: Packing
    ) -> None:
        self.mixture = Mixture(weights)
        self.rows = self.padding = 0
        """Rows so far, and the positions in them that are padding."""
        self._cursors = list(cursors)
        self._length, self._packing = length, packing
        self._packer = Packer(length, enabled=packing != "none")

    def settle(self) -> None:
        """See `PieceCursor`."""
        for cursor in self._cursors:
            cursor.settle()

    def next_row(self) -> Row:
        """The next row."""
        row: Row | None = None
        while row is None:
            source = self.mixture.next_source()
            group = self._cursors[source].next_group()
            self.mixture.count(source, sum(map(len, group)))
            # A piece is at most a row long, so it completes at most one.
            whole = self._packing == "best_fit"
            row = Row(group) if whole else next(iter(self._packer.add(group[0])), None)
        self.rows += 1
        self.padding += self._length - len(row)
        return row

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next rows."""
        return {
            "mixture": self.mixture.state_dict(),
            "cursors": [cursor.state_dict() for cursor in self._cursors],
            "packer": self._packer.state_dict(),
            "rows": self.rows,
            "padding": self.padding,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at `state_dict`."""
        self.mixture.load_state_dict(state["mixture"])
        for cursor, saved in zip(self._cursors, state["cursors"], strict=True):
            cursor.load_state_dict(saved)
        self._packer.load_state_dict(state["packer"])
        self.rows, self.padding = state["rows"], state["padding"]


class TextStream:
    """Packed rows of text from one or more sources; every token is a target.

    Args:
        make_lane: (lane, lane_count) -> the lane. Called for the lanes of this process only.
        lane_count: Lanes of a fresh stream; one that is resumed keeps those of its state.
        close: Ends what the lanes share.
    """

    batches_per_epoch: int | None = None

    def __init__(
        self, make_lane: Callable[[int, int], Lane], *, lane_count: int, batch_size: int, length: int, pad_token_id: int,
        rank: int = 0, world_size: int = 1, close: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._make_lane = make_lane
        self._batch_size, self._length, self._pad_token_id = batch_size, length, pad_token_id
        self._rank, self._world_size = rank, world_size
        self._close = close
        self._row = 0
        """Rows that all processes together have drawn: each draws one of the next `world_size`."""
        self._lane_count = lane_count
        self._lanes = self._own_lanes()

    @property
    def tokens_per_batch(self) -> int:
        """See `BatchStream`."""
        return self._batch_size * self._length

    @property
    def padding_share(self) -> float:
        """See `BatchStream`; of this process's lanes."""
        positions = self._length * sum(lane.rows for lane in self._lanes.values())
        return sum(lane.padding for lane in self._lanes.values()) / max(1, positions)

    @property
    def tokens_by_source(self) -> tuple[int, ...]:
        """Tokens drawn from each source so far, by this process's lanes."""
        return tuple(map(sum, zip(*(lane.mixture.served for lane in self._lanes.values()), strict=True)))

    def set_weights(self, weights: Sequence[float]) -> None:
        """Mix the sources by other weights from the next row on. Every process must say so after the same batch."""
        for lane in self._lanes.values():
            lane.mixture.set_weights(weights)

    def next_row(self) -> Row:
        """The next row of this process."""
        lane = (self._row + self._rank) % self._lane_count
        self._row += self._world_size
        return self._lanes[lane].next_row()

    def next_batch(self) -> Batch:
        """See `BatchStream`."""
        return collate([self.next_row() for _ in range(self._batch_size)], self._length, self._pad_token_id)

    def state_dict(self) -> dict[str, Any]:
        """See `BatchStream`."""
        return {
            "row": self._row,
            "lane_count": self._lane_count,
            "lanes": {str(number): lane.state_dict() for number, lane in self._lanes.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BatchStream`.

        Raises:
            CheckpointError: the saved lanes cannot be shared among this many processes, or some are missing.
        """
        moved = state["row"] % self._world_size != self._row % self._world_size
        self._row = state["row"]
        if moved or state["lane_count"] != self._lane_count:
            self._lane_count = state["lane_count"]
            self._lanes = self._own_lanes()
        for number, lane in self._lanes.items():
            if str(number) not in state["lanes"]:
                raise CheckpointError(
                    f"the checkpoint holds the data lanes {', '.join(state['lanes'])} of {self._lane_count}, not lane "
                    f"{number}; merge the states of all processes before another number of them loads it"
                )
            lane.load_state_dict(state["lanes"][str(number)])

    def close(self) -> None:
        """End worker processes; no thread reads a source any more."""
        for lane in self._lanes.values():
            lane.settle()
        if self._close is not None:
            self._close()

    def _own_lanes(self) -> dict[int, Lane]:
        if self._lane_count % self._world_size:
            raise CheckpointError(
                f"the documents are dealt to {self._lane_count} lanes, which {self._world_size} processes cannot share "
                "evenly; use a number of processes that divides them, or begin the run anew with more lanes"
            )
        first = (self._row + self._rank) % self._world_size
        own = range(first, self._lane_count, self._world_size)
        return {number: self._make_lane(number, self._lane_count) for number in own}


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state that any process can load, from those of all processes after the same batch.

    Raises:
        CheckpointError: the processes are not after the same batch.
    """
    merged = dict(states[0])
    for name, value in merged.items():
        others = [state[name] for state in states]
        if name == "lanes":
            merged[name] = {number: lane for lanes in others for number, lane in lanes.items()}
        elif isinstance(value, dict):
            merged[name] = merge_states(others)
        elif any(other != value for other in others):
            raise CheckpointError(
                f"the processes' data streams disagree on {name} ({others}): they were not saved after the same batch"
            )
    return merged
