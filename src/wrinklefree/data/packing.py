"""Rows of a fixed length T out of documents of any length, with borders that nothing crosses.

A document longer than T is cut, never truncated: its full-length pieces become rows of their own, and only its tail
shares a row with others, so long documents keep as much context as the row allows. A piece restarts positions at 0 and
is a document of its own for attention; its last position still predicts the document's next token, so cutting loses no
target. Every token but a document's first is a target exactly once.

`Packer` concatenates tails greedily and cuts them where a row ends: no padding until it is flushed. `best_fit` looks at
many pieces at once and cuts none: each goes, longest first, to the fullest row that has room, and what stays free is
padding. `pack_whole` is for examples of a task in an order that should be kept: first fit into a few open rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from wrinklefree.data.tokens import Tokens
from wrinklefree.models.records import IGNORE, Batch

OPEN_ROWS = 16
"""Rows that `pack_whole` looks for room in; an epoch's order of examples is kept but for so many rows."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one document, with what each must predict (`IGNORE` where nothing)."""

    tokens: Tokens
    labels: Tokens
    document: int = -1
    """Index of the document in its set, where somebody keeps count."""

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, at: int) -> tuple["Piece", "Piece"]:
        """The first `at` tokens and the rest."""
        head = Piece(self.tokens[:at], self.labels[:at], self.document)
        return head, Piece(self.tokens[at:], self.labels[at:], self.document)


@dataclass(frozen=True)
class Row:
    """Pieces that share a row, in order; the rest of the row is padding."""

    pieces: tuple[Piece, ...]

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.pieces)


def next_token_piece(document: Tokens) -> Piece:
    """A document in which every token predicts the next; its last token predicts nothing."""
    labels = np.full_like(document, IGNORE)
    labels[:-1] = document[1:]
    return Piece(document, labels)


def cut_to_length(piece: Piece, length: int) -> list[Piece]:
    """Pieces of at most `length` tokens; all but the last are full."""
    pieces: list[Piece] = []
    while len(piece) > length:
        head, piece = piece.cut(length)
        pieces.append(head)
    return [*pieces, piece]


@dataclass
class Packer:
    """Fills rows of `length` tokens; holds at most one open row, which is its whole state."""

    length: int
    enabled: bool = True
    """False: every piece gets a row to itself."""
    _open: list[Piece] = field(default_factory=list)
    _filled: int = 0

    def add(self, piece: Piece) -> list[Row]:
        """Rows that became complete by this piece."""
        rows: list[Row] = []
        for part in cut_to_length(piece, self.length):
            rows.extend(self._place(part))
        return rows

    def flush(self) -> list[Row]:
        """The open row, if there is one, short as it is."""
        if not self._open:
            return []
        row = Row(tuple(self._open))
        self._open, self._filled = [], 0
        return [row]

    def state_dict(self) -> dict[str, Any]:
        """The open row."""
        return {"pieces": [[piece.tokens.tolist(), piece.labels.tolist(), piece.document] for piece in self._open]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the open row of `state_dict`."""
        self._open = [
            Piece(np.asarray(tokens, dtype=np.int32), np.asarray(labels, dtype=np.int32), document)
            for tokens, labels, document in state["pieces"]
        ]
        self._filled = sum(len(piece) for piece in self._open)

    def _place(self, piece: Piece) -> list[Row]:
        if not len(piece):
            return []
        if not self.enabled or len(piece) == self.length:
            return [Row((piece,))]
        space = self.length - self._filled
        rows: list[Row] = []
        if len(piece) > space:
            head, piece = piece.cut(space)
            self._append(head)
            rows.extend(self.flush())
        self._append(piece)
        if self._filled == self.length:
            rows.extend(self.flush())
        return rows

    def _append(self, piece: Piece) -> None:
        self._open.append(piece)
        self._filled += len(piece)


def pack(pieces: Iterable[Piece], length: int, *, enabled: bool = True) -> list[Row]:
    """All rows of a finite list of pieces, which may be cut."""
    packer = Packer(length, enabled=enabled)
    rows = [row for piece in pieces for row in packer.add(piece)]
    return rows + packer.flush()


def pack_whole(pieces: Iterable[Piece], length: int, *, enabled: bool = True, open_rows: int = OPEN_ROWS) -> list[Row]:
    """All rows of a finite list of pieces, none of which is cut: first fit into the rows that are open.

    Raises:
        ValueError: a piece longer than a row.
    """
    closed: list[Row] = []
    filling: list[list[Piece]] = []
    for piece in pieces:
        if len(piece) > length:
            raise ValueError(f"a piece of {len(piece)} tokens does not fit a row of {length}")
        room = (row for row in filling if sum(map(len, row)) + len(piece) <= length)
        chosen = next(room, None) if enabled else None
        if chosen is None:
            chosen = []
            filling.append(chosen)
        chosen.append(piece)
        if len(filling) > open_rows:
            closed.append(Row(tuple(filling.pop(0))))
    return closed + [Row(tuple(row)) for row in filling]


def best_fit(pieces: Sequence[Piece], length: int) -> list[Row]:
    """All rows of a finite list of pieces, none of which is cut: best fit, longest first.

    Rows come in the order in which they were opened; a caller who minds that long pieces come first shuffles them.

    Raises:
        ValueError: a piece longer than a row.
    """
    rows: list[list[Piece]] = []
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]
    """Free positions -> rows that have exactly so many; the last opened is taken first."""
    free = 0
    """Bit f is set where `open_rows[f]` holds a row: the smallest room that suffices is the lowest bit from a length on."""
    for piece in sorted((piece for piece in pieces if len(piece)), key=len, reverse=True):
        size = len(piece)
        if size > length:
            raise ValueError(f"a piece of {size} tokens does not fit a row of {length}")
        fitting = free >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                free ^= 1 << room
            rows[row].append(piece)
        else:
            row, room = len(rows), length
            rows.append([piece])
        open_rows[room - size].append(row)
        free |= 1 << (room - size)
    return [Row(tuple(row)) for row in rows]


def collate(rows: Sequence[Row], length: int, pad_token_id: int) -> Batch:
    """Rows as int64 tensors [B, T]; padding has document 0, position 0 and no target."""
    shape = (len(rows), length)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    document_ids = np.zeros(shape, dtype=np.int64)
    for index, row in enumerate(rows):
        start = 0
        for number, piece in enumerate(row.pieces, start=1):
            span = slice(start, start + len(piece))
            input_ids[index, span] = piece.tokens
            labels[index, span] = piece.labels
            position_ids[index, span] = np.arange(len(piece))
            document_ids[index, span] = number
            start += len(piece)
    return Batch(*(torch.from_numpy(array) for array in (input_ids, labels, position_ids, document_ids)))
