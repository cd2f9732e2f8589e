"""Streams continue bit for bit from any point, realise their weights, and share documents between ranks."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from wrinklefree.data.config import LocalSource, PackingConfig, PretrainData
from wrinklefree.data.encoding import DocumentEncoder
from wrinklefree.data.packing import Piece
from wrinklefree.data.pretrain_dataset import pretrain_stream
from wrinklefree.data.sources import FiniteReader, StreamReader
from wrinklefree.data.splits import split_by_hash
from wrinklefree.data.streams import BatchStream, Lane, Packing, PieceCursor, TextStream, merge_states
from wrinklefree.data.tokens import Tokenizer
from wrinklefree.models.records import Batch
from wrinklefree.utils.errors import CheckpointError, DataError

WORDS = ("ternary", "weights", "keep", "the", "sign", "of", "what", "they", "were", "and", "lose", "the", "rest")


def documents(name: str, count: int) -> list[str]:
    return [f"{name}{n}: " + " ".join(WORDS[: 1 + n % len(WORDS)]) * (1 + n % 5) for n in range(count)]


def cursor(
    texts: Sequence[str], tokenizer: Tokenizer, *, seed: int = 0, lane: int = 0, lane_count: int = 1, length: int = 32,
    packing: Packing = "concat",
) -> PieceCursor[str]:  # fmt: skip
    return PieceCursor(
        FiniteReader(lambda _: texts, seed), DocumentEncoder(tokenizer), name="here", length=length, block_size=100,
        seed=seed, packing=packing, lane=lane, lane_count=lane_count,
    )  # fmt: skip


def two_sources(tokenizer: Tokenizer, *, packing: Packing = "concat", lanes: int = 1, **ranks: int) -> TextStream:
    first, second = documents("a", 150), documents("b", 90)

    def make_lane(lane: int, lane_count: int) -> Lane:
        arguments: dict[str, Any] = {"packing": packing, "lane": lane, "lane_count": lane_count}
        cursors = [cursor(first, tokenizer, seed=1, **arguments), cursor(second, tokenizer, seed=2, **arguments)]
        return Lane(cursors, [3.0, 1.0], length=32, packing=packing)

    return TextStream(make_lane, lane_count=lanes, batch_size=4, length=32, pad_token_id=257, **ranks)


def stream_file(tmp_path: Path, count: int = 250) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents("s", count)), encoding="utf-8")
    return file


def streamed_reader(file: Path, held_out_percent: float = 0.0) -> StreamReader:
    def open_stream() -> Any:
        return datasets.load_dataset("json", data_files=str(file), split="train", streaming=True)

    return StreamReader(open_stream, "text", held_out_percent, "the stream")


def streamed(tokenizer: Tokenizer, file: Path) -> TextStream:
    def make_lane(lane: int, lane_count: int) -> Lane:
        encode = DocumentEncoder(tokenizer)
        one = PieceCursor(streamed_reader(file), encode, name="stream", length=32, block_size=80, seed=5)
        return Lane([one], [1.0], length=32, packing="concat")

    return TextStream(make_lane, lane_count=1, batch_size=4, length=32, pad_token_id=257)


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


@pytest.mark.parametrize("packing", ["concat", "best_fit", "none"])
def test_text_resumes_exactly(tokenizer: Tokenizer, packing: Packing) -> None:
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
    drawn = [[c.next_group()[0].tokens.tolist() for _ in range(60)] for c in (first, again, other)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def pieces_of_epoch(source: PieceCursor[str], tokens: int) -> list[Piece]:
    pieces, total = [], 0
    while total < tokens:
        pieces.extend(source.next_group())
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
    stream = two_sources(tokenizer, packing="none")
    batches = [stream.next_batch() for _ in range(20)]
    padding = sum(int((batch.document_ids == 0).sum()) for batch in batches)
    assert stream.padding_share == padding / (20 * stream.tokens_per_batch)
    assert padding > 0


@pytest.mark.parametrize("lane_count", [2, 3])
def test_lanes_share_the_documents_of_an_epoch(tokenizer: Tokenizer, lane_count: int) -> None:
    texts = [f"document {n}" for n in range(101)]
    seen: list[str] = []
    for lane in range(lane_count):
        mine = cursor(texts, tokenizer, lane=lane, lane_count=lane_count)
        share = len(range(lane, 101, lane_count))
        seen.extend(bytes(mine.next_group()[0].tokens[1:-1].tolist()).decode() for _ in range(share))
    assert sorted(seen) == sorted(texts)


def global_rows(streams: Sequence[TextStream], rows: int) -> list[list[int]]:
    """The next rows of a job, in its order: each process takes one in turn."""
    return [
        [token for piece in streams[number % len(streams)].next_row().pieces for token in piece.tokens.tolist()]
        for number in range(rows)
    ]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_job_goes_on_with_another_number_of_processes(tokenizer: Tokenizer, packing: Packing) -> None:
    def job(world_size: int) -> list[TextStream]:
        return [
            two_sources(tokenizer, packing=packing, lanes=4, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]

    expected = global_rows(job(1), 160)
    streams, found = job(2), []
    # 2 -> 4 -> 1 -> 2 processes; 6 rows are no multiple of 4, so lanes change hands.
    for world_size, rows in ((4, 6), (1, 36), (2, 7), (2, 20)):
        found += global_rows(streams, rows)
        states = [json.loads(json.dumps(stream.state_dict())) for stream in streams]
        streams = job(world_size)
        for stream in streams:
            stream.load_state_dict(merge_states(states))
    found += global_rows(streams, 160 - len(found))
    assert found == expected


def test_processes_that_do_not_divide_the_lanes(tokenizer: Tokenizer) -> None:
    state = two_sources(tokenizer, lanes=2).state_dict()
    with pytest.raises(CheckpointError, match="dealt to 2 lanes, which 3 processes cannot share evenly"):
        two_sources(tokenizer, lanes=3, rank=0, world_size=3).load_state_dict(state)
    alone = two_sources(tokenizer, lanes=2, rank=0, world_size=2).state_dict()
    with pytest.raises(CheckpointError, match="holds the data lanes 0 of 2, not lane 1; merge the states"):
        two_sources(tokenizer, lanes=2).load_state_dict(alone)


def test_states_of_different_steps_do_not_merge(tokenizer: Tokenizer) -> None:
    streams = [two_sources(tokenizer, lanes=2, rank=rank, world_size=2) for rank in range(2)]
    streams[0].next_batch()
    with pytest.raises(CheckpointError, match="disagree on row"):
        merge_states([stream.state_dict() for stream in streams])


def test_new_weights_hold_from_the_next_row_and_survive_a_resume(tokenizer: Tokenizer) -> None:
    stream = two_sources(tokenizer)
    for _ in range(20):
        stream.next_batch()
    before = stream.tokens_by_source
    stream.set_weights([1.0, 4.0])
    again = two_sources(tokenizer)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    for _ in range(50):
        assert_equal(stream.next_batch(), again.next_batch())
    first, second = (now - then for now, then in zip(stream.tokens_by_source, before, strict=True))
    assert abs(4 * first - second) <= 5 * 32


def test_a_buffer_of_zero_keeps_the_order_of_the_stream(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = stream_file(tmp_path, 90)
    source = LocalSource(path=str(file), stream=True)
    data = PretrainData(name="here", sources=(source,), held_out_percent=0.0, shuffle_buffer=0)
    arguments: dict[str, Any] = {"batch_size": 1, "max_seq_length": 4096, "packing": PackingConfig(), "seed": 0}
    row = pretrain_stream(data, tokenizer, **arguments).next_row()
    expected = documents("s", 90)
    found = [bytes(piece.tokens[1:-1].tolist()).decode() for piece in row.pieces[:20]]
    assert found == expected[:20]
    shuffled = pretrain_stream(data.model_copy(update={"shuffle_buffer": 80}), tokenizer, **arguments).next_row()
    texts = [bytes(piece.tokens[1:-1].tolist()).decode() for piece in shuffled.pieces[:20]]
    assert texts != expected[:20]
    assert set(texts) <= set(expected[:64])


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
    encode = DocumentEncoder(tokenizer)
    empty = PieceCursor(streamed_reader(file), encode, name="stream X", length=8, block_size=4, seed=0)
    with pytest.raises(DataError, match="stream X holds no document to train on"):
        empty.next_group()


def test_a_stream_without_the_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"title": "t", "body": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="the stream, row 1 has no column 'text'; its columns are title, body"):
        streamed_reader(file).read(1)
