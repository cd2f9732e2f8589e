"""Rows for influence: a function of their number, of training text only, probes of held-out text only."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from wrinklefree.data.config import FactsSource, FinetuneData, HubSource, LocalSource, PackagedSource, PretrainData
from wrinklefree.data.packing import Row, next_token_piece
from wrinklefree.data.scored_rows import ROWS_A_DOCUMENT, RowPool, probe_pools, source_pools
from wrinklefree.data.sources import source_labels
from wrinklefree.data.splits import split_by_hash
from wrinklefree.data.tokens import Tokenizer
from wrinklefree.models.records import IGNORE
from wrinklefree.utils.errors import ConfigError, DataError

LENGTH = 32


def write(file: Path, texts: list[str]) -> LocalSource:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return LocalSource(path=str(file), weight=0.5)


@pytest.fixture
def data(tmp_path: Path) -> PretrainData:
    sources = tuple(write(tmp_path / f"{name}.jsonl", [f"{name}{n}." for n in range(200)]) for name in "ab")
    return PretrainData(name="two", sources=sources, held_out_percent=20.0)


def texts_of(rows: list[Row], tokenizer: Tokenizer) -> list[str]:
    """The whole documents in some rows: a row's last one may be cut."""
    found = []
    for row in rows:
        ids = np.concatenate([piece.tokens for piece in row.pieces])
        joined = "".join("|" if index == tokenizer.eos_token_id else chr(index) for index in ids)
        found.extend(part for part in joined.split("|") if re.fullmatch(r"[abc]\d+\.", part))
    return found


def test_rows_are_a_function_of_their_number(data: PretrainData, tokenizer: Tokenizer) -> None:
    one, other = (source_pools(data, tokenizer, length=LENGTH, seed=3)["a"] for _ in range(2))
    third = [batch.input_ids for batch in one.batches(12, 3, batch_size=5)]
    assert [len(part) for part in third] == [5, 5, 2]
    again = torch.cat([batch.input_ids for batch in other.batches(12, 3, batch_size=12)])
    assert torch.equal(torch.cat(third), again)
    assert not torch.equal(again, other.batches(12, 4, batch_size=12)[0].input_ids)
    reseeded = source_pools(data, tokenizer, length=LENGTH, seed=4)["a"].batches(12, 3, batch_size=12)[0]
    assert not torch.equal(again, reseeded.input_ids)


def test_ranks_have_the_rows_of_one_process_in_order(data: PretrainData, tokenizer: Tokenizer) -> None:
    pool = source_pools(data, tokenizer, length=LENGTH, seed=3)["b"]
    whole = pool.batches(12, 0, batch_size=12)[0].input_ids
    parts = [pool.batches(12, 0, batch_size=4, rank=rank, world_size=3)[0].input_ids for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_sources_give_training_text_and_probes_what_is_held_out(data: PretrainData, tokenizer: Tokenizer) -> None:
    pools = source_pools(data, tokenizer, length=LENGTH, seed=0)
    assert list(pools) == ["a", "b"]
    seen = texts_of(pools["a"].rows(60, 0), tokenizer)
    splits = {split_by_hash(text, validation=0.2, test=0.2) for text in seen}
    assert splits == {"train"}
    assert {text[0] for text in seen} == {"a"}
    own = probe_pools(data, (), tokenizer, length=LENGTH, seed=0)["validation"]
    found = texts_of(own.rows(60, 0), tokenizer)
    assert {split_by_hash(text, validation=0.2, test=0.2) for text in found} == {"validation"}
    assert {text[0] for text in found} == {"a", "b"}


def test_a_probe_that_is_trained_on_is_its_held_out_part(
    data: PretrainData, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    own = data.sources[0].model_copy(update={"weight": 0.125})
    other = write(tmp_path / "c.jsonl", [f"c{n}." for n in range(100)])
    pools = probe_pools(data, (own, other), tokenizer, length=LENGTH, seed=0)
    assert list(pools) == ["a", "c"]
    own_texts = texts_of(pools["a"].rows(60, 0), tokenizer)
    assert {split_by_hash(text, validation=0.2, test=0.2) for text in own_texts} == {"validation"}
    other_texts = set(texts_of(pools["c"].rows(100, 0), tokenizer))
    assert {split_by_hash(text, validation=0.2, test=0.2) for text in other_texts} == {"train", "validation", "test"}
    everything = data.model_copy(update={"held_out_percent": 0.0})
    with pytest.raises(
        ConfigError, match=r"influence.probes: data source path=.*a.jsonl is trained on, and .*=0 keeps no"
    ):
        probe_pools(everything, (own,), tokenizer, length=LENGTH, seed=0)
    with pytest.raises(ConfigError, match=r"data.held_out_percent=0 keeps no document out; raise it, or name the text"):
        probe_pools(everything, (), tokenizer, length=LENGTH, seed=0)


def test_one_long_document_is_not_the_whole_pool(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = write(tmp_path / "long.jsonl", ["x" * 100_000, *("y" * 200 for _ in range(50))])
    data = PretrainData(name="d", sources=(long,), held_out_percent=0.0, normalize_weights=True)
    pool = source_pools(data, tokenizer, length=LENGTH, seed=0)["long"]
    tokens = np.concatenate([piece.tokens for piece in pool._pieces])
    assert (tokens == ord("x")).sum() <= ROWS_A_DOCUMENT * LENGTH
    assert (tokens == ord("y")).sum() == 50 * 200


def test_a_small_pool_repeats_and_an_empty_one_is_an_error(tokenizer: Tokenizer) -> None:
    piece = next_token_piece(np.arange(20, dtype=np.int32))
    pool = RowPool([piece], length=LENGTH, pad_token_id=0, seed=0, name="t")
    assert [len(row) for row in pool.rows(5, 0)] == [LENGTH] * 5
    with pytest.raises(DataError, match="t holds nothing to score"):
        RowPool([next_token_piece(np.arange(1, dtype=np.int32))], length=LENGTH, pad_token_id=0, seed=0, name="t")


def test_a_task_is_probed_by_whole_validation_examples(tokenizer: Tokenizer) -> None:
    task = FinetuneData(name="f", task="recall")
    pool = probe_pools(task, (), tokenizer, length=160, seed=0)["validation"]
    (batch,) = pool.batches(6, 0, batch_size=6)
    targets = batch.labels != IGNORE
    assert bool(targets.any(1).all())
    assert float(targets.float().mean()) < 0.5
    # No example is cut: every document of a row has its response.
    for row, documents in zip(targets, batch.document_ids, strict=True):
        assert set(documents[row].tolist()) == set(documents[documents > 0].tolist())


def test_labels_are_short_and_tell_sources_apart() -> None:
    sources = [
        HubSource(path="HuggingFaceFW/fineweb", name="sample-100BT"), PackagedSource(name="python_docs"),
        LocalSource(path="/data/mail/*.jsonl"), FactsSource(),
    ]  # fmt: skip
    assert source_labels(sources) == ["fineweb-sample-100BT", "python_docs", "mail", "facts"]
    assert source_labels([LocalSource(path="x/a.txt"), LocalSource(path="y/a.txt")]) == ["a-1", "a-2"]
