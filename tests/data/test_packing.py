"""Packing laws: nothing lost, nothing doubled, nothing across a border."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wrinklefree.data.packing import Packer, Piece, best_fit, collate, cut_to_length, next_token_piece, pack, pack_whole
from wrinklefree.models.records import IGNORE

PAD = 999_999
STRIDE = 1000
lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=20)
row_lengths = st.integers(2, 16)


def numbered(lengths: list[int]) -> list[Piece]:
    """Document i has the tokens i*1000, i*1000 + 1, ...: every token tells where it belongs."""
    return [
        next_token_piece(np.arange(number * STRIDE, number * STRIDE + length, dtype=np.int32))
        for number, length in enumerate(lengths)
    ]


@given(lengths_of_documents, row_lengths, st.booleans())
def test_every_token_stands_once_and_every_successor_is_a_target_once(
    lengths: list[int], length: int, enabled: bool
) -> None:
    batch = collate(pack(numbered(lengths), length, enabled=enabled), length, PAD)
    real = batch.document_ids > 0
    tokens = [number * STRIDE + offset for number, size in enumerate(lengths) for offset in range(size)]
    assert sorted(batch.input_ids[real].tolist()) == tokens
    targets = batch.labels[batch.labels != IGNORE].tolist()
    assert sorted(targets) == [token for token in tokens if token % STRIDE]
    assert (batch.labels[batch.labels != IGNORE] == batch.input_ids[batch.labels != IGNORE] + 1).all()
    assert (batch.input_ids[~real] == PAD).all()
    assert (batch.labels[~real] == IGNORE).all()
    assert (batch.position_ids[~real] == 0).all()


@given(lengths_of_documents, row_lengths)
def test_a_document_id_covers_consecutive_tokens_with_positions_from_zero(lengths: list[int], length: int) -> None:
    batch = collate(pack(numbered(lengths), length), length, PAD)
    for tokens, positions, documents in zip(batch.input_ids, batch.position_ids, batch.document_ids, strict=True):
        for number in range(1, int(documents.max()) + 1):
            inside = documents == number
            assert positions[inside].tolist() == list(range(int(inside.sum())))
            assert (tokens[inside].diff() == 1).all()
            assert len(set((tokens[inside] // STRIDE).tolist())) == 1


@given(lengths_of_documents, row_lengths)
def test_only_the_last_row_of_a_packed_stream_has_padding(lengths: list[int], length: int) -> None:
    rows = pack(numbered(lengths), length)
    assert [len(row) for row in rows[:-1]] == [length] * (len(rows) - 1)
    assert len(rows) == -(-sum(lengths) // length)


@given(lengths_of_documents, row_lengths)
def test_full_pieces_of_a_long_document_have_rows_of_their_own(lengths: list[int], length: int) -> None:
    rows = pack(numbered(lengths), length)
    alone = sum(1 for row in rows if len(row.pieces) == 1 and len(row) == length)
    assert alone >= sum(size // length for size in lengths)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=30), st.integers(8, 20))
def test_examples_stay_whole(lengths: list[int], length: int) -> None:
    rows = pack_whole(numbered(lengths), length)
    assert sorted(len(piece) for row in rows for piece in row.pieces) == sorted(lengths)
    assert all(len(row) <= length for row in rows)


@given(lengths_of_documents, row_lengths)
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths: list[int], length: int) -> None:
    pieces = [part for piece in numbered(lengths) for part in cut_to_length(piece, length)]
    rows = best_fit(pieces, length)
    packed = sorted((piece.tokens.tolist() for row in rows for piece in row.pieces), key=lambda tokens: tokens[0])
    assert packed == sorted((piece.tokens.tolist() for piece in pieces), key=lambda tokens: tokens[0])
    assert all(len(row) <= length for row in rows)
    # No row's content would fit into another row; so at most one row is not more than half full.
    assert sum(len(row) * 2 <= length for row in rows) <= 1


@given(lengths_of_documents, row_lengths)
def test_best_fit_is_the_textbook_algorithm(lengths: list[int], length: int) -> None:
    """Written out: pieces from long to short, each into the fullest row that has room."""
    pieces = [part for piece in numbered(lengths) for part in cut_to_length(piece, length)]
    filled: list[int] = []
    for size in sorted(map(len, pieces), reverse=True):
        fitting = [index for index, used in enumerate(filled) if used + size <= length]
        if fitting:
            filled[max(fitting, key=lambda index: filled[index])] += size
        else:
            filled.append(size)
    assert sorted(len(row) for row in best_fit(pieces, length)) == sorted(filled)


def test_first_fit_looks_into_the_rows_still_open() -> None:
    sizes = [[len(piece) for piece in row.pieces] for row in pack_whole(numbered([5, 6, 3, 2, 4]), 8)]
    assert sizes == [[5, 3], [6, 2], [4]]
    sizes = [[len(piece) for piece in row.pieces] for row in pack_whole(numbered([5, 6, 3]), 8, open_rows=1)]
    assert sizes == [[5], [6], [3]]
    assert len(pack_whole(numbered([1, 1, 1]), 8, enabled=False)) == 3


def test_packing_off_gives_each_piece_a_row() -> None:
    rows = pack(numbered([3, 9, 4]), 4, enabled=False)
    assert [[len(piece) for piece in row.pieces] for row in rows] == [[3], [4], [4], [1], [4]]


def test_a_small_case_by_hand() -> None:
    rows = pack(numbered([3, 6]), 5)
    batch = collate(rows, 5, PAD)
    assert batch.input_ids.tolist() == [[1000, 1001, 1002, 1003, 1004], [0, 1, 2, 1005, PAD]]
    assert batch.labels.tolist() == [[1001, 1002, 1003, 1004, 1005], [1, 2, IGNORE, IGNORE, IGNORE]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 0]]
    assert batch.document_ids.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 2, 0]]
    assert batch.input_ids.dtype == torch.int64


@given(lengths_of_documents, row_lengths, st.data())
def test_a_packer_continues_from_its_state(lengths: list[int], length: int, data: st.DataObject) -> None:
    pieces = numbered(lengths)
    stop = data.draw(st.integers(0, len(pieces)))
    first, second = Packer(length), Packer(length)
    for piece in pieces[:stop]:
        first.add(piece)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    ends = []
    for packer in (first, second):
        rows = [row for piece in pieces[stop:] for row in packer.add(piece)] + packer.flush()
        ends.append([[piece.tokens.tolist() for piece in row.pieces] for row in rows])
    assert ends[0] == ends[1]


def test_cutting_keeps_the_label_across_the_cut() -> None:
    head, tail = cut_to_length(next_token_piece(np.arange(7, dtype=np.int32)), 4)
    assert head.labels.tolist() == [1, 2, 3, 4]
    assert tail.labels.tolist() == [5, 6, IGNORE]


def test_a_piece_that_may_not_be_cut_must_fit() -> None:
    with pytest.raises(ValueError, match="a piece of 6 tokens does not fit a row of 5"):
        pack_whole(numbered([6]), 5)
    with pytest.raises(ValueError, match="a piece of 6 tokens does not fit a row of 5"):
        best_fit(numbered([6]), 5)
