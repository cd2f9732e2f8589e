"""Streams continue bit for bit from any point, realise their weights, and share documents between ranks."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from wrinklefree.data.packing import Piece
from wrinklefree.data.sources import FiniteReader, StreamReader
from wrinklefree.data.splits import split_by_hash
from wrinklefree.data.streams import BatchStream, PieceCursor, TextStream
from wrinklefree.data.tokens import Tokenizer
from wrinklefree.models.records import Batch
from wrinklefree.utils.errors import DataError

WORDS = ("ternary", "weights", "keep", "the", "sign", "of", "what", "they", "were", "and", "lose", "the", "rest")


def documents(name: str, count: int) -> list[str]:
    return [f"{name}{n}: " + " ".join(WORDS[: 1 + n % len(WORDS)]) * (1 + n % 5) for n in range(count)]


def cursor(
    texts: Sequence[str], tokenizer: Tokenizer, *, seed: int = 0, rank: int = 0, world_size: int = 1, length: int = 32
) -> PieceCursor:
    reader = FiniteReader(lambda _: texts, seed)
    return PieceCursor(
        reader, tokenizer, name="here", length=length, block_size=100, seed=seed, rank=rank, world_size=world_size
    )


def two_sources(tokenizer: Tokenizer, *, packing: bool = True) -> TextStream:
    cursors = [cursor(documents("a", 150), tokenizer, seed=1), cursor(documents("b", 90), tokenizer, seed=2)]
    return TextStream(cursors, [3.0, 1.0], batch_size=4, length=32, packing=packing, pad_token_id=257)


def stream_file(tmp_path: Path, count: int = 250) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents("s", count)), encoding="utf-8")
    return file


def streamed_reader(file: Path, held_out_percent: float = 0.0) -> StreamReader:
    def open_stream() -> Any:
        return datasets.load_dataset("json", data_files=str(file), split="train", streaming=True)

    return StreamReader(open_stream, "text", held_out_percent, "the stream")


def streamed(tokenizer: Tokenizer, file: Path) -> TextStream:
    one = PieceCursor(streamed_reader(file), tokenizer, name="stream", length=32, block_size=80, seed=5)
    return TextStream([one], [1.0], batch_size=4, length=32, packing=True, pad_token_id=257)


def assert_equal(left: Batch, right: Batch) -> None:
    for name in ("input_ids", "labels", "position_ids", "document_ids"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def assert_resumes(make: Any, stops: Sequence[int], more: int) -> None:
    for stop in stops:
        whole: BatchStream = make()
        for _ in range(stop):
            whole.next_batch()
        state = json.loads(json.dumps(whole.state_dict()))
        resumed: BatchStream = make()
        resumed.load_state_dict(state)
        used: BatchStream = make()
        used.next_batch()
        used.load_state_dict(state)
        for _ in range(more):
            batch = whole.next_batch()
            assert_equal(batch, resumed.next_batch())
            assert_equal(batch, used.next_batch())
        assert whole.state_dict() == resumed.state_dict()
        assert whole.padding_share == resumed.padding_share


@pytest.mark.parametrize("packing", [True, False])
def test_text_resumes_exactly(tokenizer: Tokenizer, packing: bool) -> None:
    assert_resumes(lambda: two_sources(tokenizer, packing=packing), stops=[0, 1, 7, 33, 200], more=60)


def test_a_shuffled_stream_resumes_exactly(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = stream_file(tmp_path)
    assert_resumes(lambda: streamed(tokenizer, file), stops=[0, 3, 41, 150, 260], more=60)


def test_states_are_small(tokenizer: Tokenizer) -> None:
    stream = two_sources(tokenizer)
    for _ in range(50):
        stream.next_batch()
    assert len(json.dumps(stream.state_dict())) < 1500


def test_the_order_is_a_function_of_the_seed(tokenizer: Tokenizer) -> None:
    first, again = cursor(documents("a", 50), tokenizer, seed=1), cursor(documents("a", 50), tokenizer, seed=1)
    other = cursor(documents("a", 50), tokenizer, seed=2)
    drawn = [[c.next_piece().tokens.tolist() for _ in range(60)] for c in (first, again, other)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def pieces_of_epoch(source: PieceCursor, tokens: int) -> list[Piece]:
    pieces, total = [], 0
    while total < tokens:
        pieces.append(source.next_piece())
        total += len(pieces[-1])
    assert total == tokens
    return pieces


def test_an_epoch_holds_every_document_once_and_the_next_is_shuffled_anew(tokenizer: Tokenizer) -> None:
    texts = documents("a", 300)
    tokens = sum(len(text.encode()) + 2 for text in texts)
    source = cursor(texts, tokenizer)
    epochs = [[piece.tokens.tolist() for piece in pieces_of_epoch(source, tokens)] for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    counted = Counter(token for piece in epochs[0] for token in piece)
    assert counted == Counter(token for text in texts for token in [256, *text.encode(), 256])


def test_weights_are_shares_of_tokens(tokenizer: Tokenizer) -> None:
    stream = two_sources(tokenizer)
    for _ in range(100):
        stream.next_batch()
        first, second = stream.tokens_by_source
        assert abs(first - 3 * second) <= 3 * 32
    assert stream.padding_share == 0


def test_unpacked_rows_count_their_padding(tokenizer: Tokenizer) -> None:
    stream = two_sources(tokenizer, packing=False)
    batches = [stream.next_batch() for _ in range(20)]
    padding = sum(int((batch.document_ids == 0).sum()) for batch in batches)
    assert stream.padding_share == padding / (20 * stream.tokens_per_batch)
    assert padding > 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_documents_of_an_epoch(tokenizer: Tokenizer, world_size: int) -> None:
    texts = [f"document {n}" for n in range(101)]
    seen: list[str] = []
    for rank in range(world_size):
        mine = cursor(texts, tokenizer, rank=rank, world_size=world_size)
        share = len(range(rank, 101, world_size))
        seen.extend(bytes(mine.next_piece().tokens[1:-1].tolist()).decode() for _ in range(share))
    assert sorted(seen) == sorted(texts)


def test_a_stream_skips_what_is_held_out(tmp_path: Path) -> None:
    reader = streamed_reader(stream_file(tmp_path), held_out_percent=20)
    texts = reader.read(1000)
    expected = [t for t in documents("s", 250) if split_by_hash(t, validation=0.2, test=0.2) == "train"]
    assert texts == expected
    assert reader.epoch == 1
    assert reader.read(3) == expected[:3]


def test_a_source_with_nothing_to_train_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "blank.jsonl"
    file.write_text('{"text": " "}\n', encoding="utf-8")
    empty = PieceCursor(streamed_reader(file), tokenizer, name="stream X", length=8, block_size=4, seed=0)
    with pytest.raises(DataError, match="stream X holds no document to train on"):
        empty.next_piece()


def test_a_stream_without_the_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"title": "t", "body": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="the stream has no column 'text'; its columns are title, body"):
        streamed_reader(file).read(1)
