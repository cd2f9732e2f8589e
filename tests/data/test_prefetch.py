"""Batches made ahead are the batches of the stream, states are those of what was taken, weights come when promised."""

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch

from wrinklefree.data.config import FinetuneData, LocalSource, PackingConfig, PretrainData
from wrinklefree.data.finetune_dataset import finetune_stream
from wrinklefree.data.prefetch import PrefetchedStream
from wrinklefree.data.pretrain_dataset import pretrain_stream
from wrinklefree.data.streams import BatchStream, TextStream
from wrinklefree.data.tokens import Tokenizer
from wrinklefree.models.records import Batch
from wrinklefree.utils.errors import ConfigError, DataError


@pytest.fixture
def data(tmp_path: Path) -> PretrainData:
    sources = []
    for name in "ab":
        file = tmp_path / f"{name}.jsonl"
        rows = (json.dumps({"text": f"{name}{n} " * (1 + n % 9)}) for n in range(400))
        file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        sources.append(LocalSource(path=str(file), weight=0.5))
    return PretrainData(name="two", sources=tuple(sources), held_out_percent=0.0)


def text_stream(data: PretrainData, tokenizer: Tokenizer) -> TextStream:
    return pretrain_stream(data, tokenizer, batch_size=2, max_seq_length=32, packing=PackingConfig(), seed=1)


def take(stream: BatchStream, count: int) -> list[Batch]:
    return [stream.next_batch() for _ in range(count)]


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("ahead", [1, 5])
def test_batches_and_states_are_those_of_the_stream(data: PretrainData, tokenizer: Tokenizer, ahead: int) -> None:
    plain = text_stream(data, tokenizer)
    with closing(PrefetchedStream(text_stream(data, tokenizer), ahead=ahead)) as stream:
        assert_same(take(stream, 30), take(plain, 30))
        state = stream.state_dict()
        assert state["stream"] == plain.state_dict()
        assert stream.padding_share == plain.padding_share
        assert stream.seconds_waited > 0
        with closing(PrefetchedStream(text_stream(data, tokenizer), ahead=ahead)) as resumed:
            take(resumed, 2)
            resumed.load_state_dict(json.loads(json.dumps(state)))
            assert_same(take(resumed, 20), take(stream, 20))


def test_weights_hold_from_the_promised_batch_whatever_was_made_ahead(data: PretrainData, tokenizer: Tokenizer) -> None:
    plain = text_stream(data, tokenizer)
    expected = take(plain, 10 + 4)
    plain.set_weights([0.9, 0.1])
    expected += take(plain, 30)
    with closing(PrefetchedStream(text_stream(data, tokenizer), ahead=4)) as stream:
        found = take(stream, 10)
        stream.set_weights([0.2, 0.8])
        stream.set_weights([0.9, 0.1])
        found += take(stream, 2)
        state = json.loads(json.dumps(stream.state_dict()))
        with closing(PrefetchedStream(text_stream(data, tokenizer), ahead=4)) as resumed:
            # The change is still to come: a resume must know of it.
            resumed.load_state_dict(state)
            assert_same(take(resumed, 32), expected[12:])
        assert_same(found + take(stream, 32), expected)


def test_an_error_of_the_stream_reaches_whoever_asks(data: PretrainData, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n', encoding="utf-8")
    bad = data.model_copy(update={"sources": (LocalSource(path=str(tmp_path / "a.jsonl"), stream=True),)})
    said = r"a\.jsonl, line 2: column 'text' holds 3, not text"
    with (
        closing(PrefetchedStream(text_stream(bad, tokenizer), ahead=2)) as stream,
        pytest.raises(DataError, match=said),
    ):
        take(stream, 2)


def test_a_task_without_text_has_no_weights(tokenizer: Tokenizer) -> None:
    task = finetune_stream(
        FinetuneData(name="f", task="recall", max_examples=50), tokenizer, batch_size=2, max_seq_length=128,
        packing=PackingConfig(), seed=0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="has no sources to weigh"):
        task.set_weights([1.0])
    with closing(PrefetchedStream(task, ahead=2)) as stream:
        assert stream.batches_per_epoch == task.batches_per_epoch
        assert stream.next_batch().num_targets > 0
