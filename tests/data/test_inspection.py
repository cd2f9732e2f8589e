"""What a person is shown of a row."""

import io
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from wrinklefree.data.inspection import show_row
from wrinklefree.data.packing import Piece, Row, collate, next_token_piece
from wrinklefree.models.records import IGNORE


class Letters:
    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def encoded(text: str) -> np.ndarray:
    return np.asarray([ord(letter) for letter in text], dtype=np.int32)


def test_borders_targets_masks_and_padding() -> None:
    example = Piece(encoded("Q: 2+2 4"), np.asarray([IGNORE] * 6 + [ord("4"), IGNORE], dtype=np.int32))
    cut = next_token_piece(encoded("^longer"))
    row = Row((example, next_token_piece(encoded("^text$")), cut.cut(5)[0]))
    console = Console(width=60, file=io.StringIO())
    console.print(show_row(collate([row], 22, ord("_")), 0, Letters()))
    lines = [line.rstrip(" ─") for line in console.file.getvalue().splitlines()]
    assert lines == [
        "row 0: 22 positions, 11 targets",
        "  document 1, positions 0-7, 1 targets",
        "  ‹Q: 2+2 ›4",
        "  document 2, positions 8-13, 5 targets",
        "  ‹^›text$",
        "  document 3, positions 14-18, 5 targets",
        "  ‹^›long",
        "  goes on elsewhere; next token 'e'",
        "  padding, positions 19-21",
    ]
