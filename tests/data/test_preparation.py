"""Prepared tokens train as the text does, bit for bit; what is dropped is counted; a failure leaves nothing behind."""

import json
from pathlib import Path

import pytest
import torch

from wrinklefree.data.config import FactsSource, FilterConfig, LocalSource, PackingConfig, PretrainData, TokensSource
from wrinklefree.data.preparation import PreparationOptions, describe, prepare
from wrinklefree.data.pretrain_dataset import (
    data_fingerprint,
    held_out_documents,
    held_out_rows,
    pretrain_stream,
    training_documents,
)
from wrinklefree.utils.errors import ConfigError, DataError, StorageError
from wrinklefree.utils.manifest import read_manifest
from wrinklefree.utils.tokenizer import TextTokenizer, train_tokenizer

OFF = FilterConfig(**dict.fromkeys(FilterConfig.model_fields))


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return train_tokenizer([f"text number {n} about something" for n in range(50)], 270)


def text_data(tmp_path: Path, count: int = 120) -> PretrainData:
    sources = []
    for name, weight in (("first", 0.75), ("second", 0.25)):
        file = tmp_path / f"{name}.jsonl"
        rows = [{"text": f"{name} document {n} " + "about something else " * (n % 6)} for n in range(count)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sources.append(LocalSource(path=str(file), weight=weight))
    return PretrainData(name="text", sources=tuple(sources), held_out_percent=10)


def as_tokens(data: PretrainData, folders: list[Path]) -> PretrainData:
    sources = tuple(
        TokensSource(path=str(folder), weight=source.weight)
        for folder, source in zip(folders, data.sources, strict=True)
    )
    return data.model_copy(update={"sources": sources})


@pytest.mark.parametrize("workers", [0, 2])
def test_tokens_train_and_score_as_their_text_does(tmp_path: Path, trained: TextTokenizer, workers: int) -> None:
    data = text_data(tmp_path).model_copy(update={"num_workers": workers})
    options = PreparationOptions(tmp_path / "out", filters=OFF, deduplicate="none", tokens_a_shard=500)
    reports = prepare(data, trained, options)
    tokens = as_tokens(data, [report.folder for report in reports])
    streams = [
        pretrain_stream(each, trained, batch_size=2, max_seq_length=48, packing=PackingConfig(), seed=3)
        for each in (data, tokens)
    ]
    for _ in range(60):
        left, right = (stream.next_batch() for stream in streams)
        assert torch.equal(left.input_ids, right.input_ids)
        assert torch.equal(left.labels, right.labels)
    streams[0].close()
    for split in ("validation", "test"):
        assert sorted(held_out_documents(data, split)) == sorted(held_out_documents(tokens, split))
        rows = [
            held_out_rows(each, trained, split=split, max_tokens=9999, max_seq_length=48, batch_size=2)
            for each in (data, tokens)
        ]
        assert rows[0].fingerprint == rows[1].fingerprint
    assert sum(report.written + report.held_out for report in reports) == 240
    assert "shard-00001.tokens" in read_manifest(reports[0].folder)["files"]
    assert data_fingerprint(tokens, "t") != data_fingerprint(data, "t")


def test_what_is_dropped_is_counted_and_stays_out(tmp_path: Path, trained: TextTokenizer) -> None:
    data = text_data(tmp_path, 40)
    texts = ["first document 3 about something else about something else about something else ", "!?" * 90, "tiny"]
    with (tmp_path / "second.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    filters = OFF.model_copy(update={"min_characters": 10, "max_symbol_share": 0.5})
    first, second = prepare(data, trained, PreparationOptions(tmp_path / "out", filters=filters))
    assert not first.dropped
    assert second.dropped == {"exact_duplicate": 1, "max_symbol_share": 1, "min_characters": 1}
    assert second.written + second.held_out == second.read - 3 == 40
    summary = describe([first, second], data)
    assert "3 of 43 dropped" in summary
    assert f"{{kind: tokens, path: {second.folder}, weight: 0.25}}]' data.held_out_percent=10" in summary
    assert read_manifest(second.folder)["report"]["dropped"] == dict(second.dropped)


def test_limits(tmp_path: Path, trained: TextTokenizer) -> None:
    data = text_data(tmp_path).model_copy(update={"held_out_percent": 30.0})
    options = PreparationOptions(tmp_path / "out", filters=OFF, max_documents=50, held_out_documents=2)
    first, _ = prepare(data, trained, options)
    assert first.read == 50
    assert first.written + first.held_out == 50
    assert first.held_out > 10
    tokens = as_tokens(data, [report.folder for report in (first, _)])
    assert len(held_out_documents(tokens, "test")) == len(held_out_documents(tokens, "validation")) == 4


def test_nothing_left_and_nothing_left_behind(tmp_path: Path, trained: TextTokenizer) -> None:
    data = text_data(tmp_path, 20)
    filters = OFF.model_copy(update={"min_characters": 5000})
    with pytest.raises(DataError, match=r"nothing is left of 20 documents \(min_characters 20; 0 held out\)"):
        prepare(data, trained, PreparationOptions(tmp_path / "out", filters=filters))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_line_leaves_nothing_behind(tmp_path: Path, trained: TextTokenizer) -> None:
    data = text_data(tmp_path, 20)
    with (tmp_path / "first.jsonl").open("a") as file:
        file.write('{"text": "cut of')
    with pytest.raises(DataError, match=r"first.jsonl, line 21: not valid JSON"):
        prepare(data, trained, PreparationOptions(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_prepared(tmp_path: Path, trained: TextTokenizer) -> None:
    facts = PretrainData(name="f", sources=(FactsSource(),))
    with pytest.raises(ConfigError, match="generated facts is generated while training: leave it out"):
        prepare(facts, trained, PreparationOptions(tmp_path / "out"))
    data = text_data(tmp_path)
    (tmp_path / "again" / "0-first").mkdir(parents=True)
    with pytest.raises(StorageError, match="0-first exists; remove it, or give another output="):
        prepare(data, trained, PreparationOptions(tmp_path / "again"))
    with pytest.raises(ConfigError, match="holds tokens, and a new tokenizer is trained on text"):
        list(training_documents(PretrainData(name="t", sources=(TokensSource(path="x"),))))
