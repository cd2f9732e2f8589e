"""Held-out text: disjoint from training, every byte scored once, weights respected, identities that move."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from wrinklefree.data import pretrain_dataset
from wrinklefree.data.config import (
    FactsSource,
    FinetuneData,
    HubSource,
    LocalSource,
    PackagedSource,
    PackingConfig,
    PretrainData,
)
from wrinklefree.data.pretrain_dataset import (
    HELD_OUT_CHARACTERS,
    HeldOut,
    data_fingerprint,
    held_out_documents,
    held_out_rows,
    pretrain_stream,
    training_documents,
)
from wrinklefree.data.tokens import Tokenizer
from wrinklefree.models.records import IGNORE
from wrinklefree.utils.errors import DataError


def text_folder(folder: Path, name: str, count: int) -> LocalSource:
    folder = folder / name
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.txt").write_text(f"{name} {number} é " * (1 + number % 7), encoding="utf-8")
    return LocalSource(path=str(folder))


def config(*sources: LocalSource | FactsSource | PackagedSource, percent: float = 10.0) -> PretrainData:
    return PretrainData(name="here", sources=sources, held_out_percent=percent, normalize_weights=True)


def rows_of(data: PretrainData, tokenizer: Tokenizer, **changes: int) -> HeldOut:
    arguments = {"max_tokens": 100_000, "max_seq_length": 32, "batch_size": 4} | changes
    return held_out_rows(data, tokenizer, split="test", **arguments)


def test_train_validation_and_test_share_no_document_and_lose_none(tmp_path: Path) -> None:
    data = config(text_folder(tmp_path, "a", 200))
    parts = [set(training_documents(data)), *(set(held_out_documents(data, s)) for s in ("validation", "test"))]
    assert all(parts)
    assert sum(len(part) for part in parts) == len(set.union(*parts)) == 200


def test_training_never_draws_a_held_out_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = config(text_folder(tmp_path, "a", 60), percent=20)
    held_out = {text.encode()[:20] for s in ("validation", "test") for text in held_out_documents(data, s)}
    stream = pretrain_stream(
        data, tokenizer, batch_size=4, max_seq_length=200, packing=PackingConfig(enabled=False), seed=0
    )
    for _ in range(60):
        for row in stream.next_batch().input_ids:
            assert bytes(row[1:21].clamp(max=255).tolist()) not in held_out


def test_every_byte_of_a_document_is_a_target_exactly_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = config(text_folder(tmp_path, "a", 100))
    held_out = rows_of(data, tokenizer)
    texts = held_out_documents(data, "test")
    # Windows of one document may be packed out of order; as a multiset of bytes nothing is missing or doubled.
    scored = scored_text_bytes(held_out)
    assert [sorted(text.encode()) for text in texts] == [sorted(scored[index]) for index in range(len(texts))]
    assert held_out.document_bytes == [len(text.encode()) for text in texts]


def scored_text_bytes(held_out: HeldOut) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for batch, index in zip(held_out.batches, held_out.document_index, strict=True):
        assert torch.equal(batch.labels == IGNORE, index == -1)
        for label, document in zip(batch.labels[index >= 0].tolist(), index[index >= 0].tolist(), strict=True):
            found.setdefault(document, []).append(label)
    return found


def test_every_window_opens_with_the_start_token_and_predicts_its_first_token(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    for batch in rows_of(config(text_folder(tmp_path, "a", 60)), tokenizer).batches:
        first = (batch.position_ids == 0) & (batch.document_ids > 0)
        assert (batch.input_ids[first] == tokenizer.eos_token_id).all()
        assert (batch.labels[first] != IGNORE).all()


def test_a_bos_model_is_conditioned_on_its_bos(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "bos_token_id", 300)
    monkeypatch.setattr(tokenizer, "add_bos", True)
    batch = rows_of(config(text_folder(tmp_path, "a", 60)), tokenizer).batches[0]
    assert batch.input_ids[0, 0] == 300


def test_long_documents_are_cut_to_whole_characters(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"{number} " + "é" * 5 * HELD_OUT_CHARACTERS, encoding="utf-8")
        (folder / f"w{number}.txt").write_text(f"{number} " + "word " * HELD_OUT_CHARACTERS, encoding="utf-8")
    held_out = rows_of(config(LocalSource(path=str(folder)), percent=30), tokenizer)
    scored = scored_text_bytes(held_out)
    assert held_out.document_bytes == [len(scored[index]) for index in range(len(scored))]
    assert max(held_out.document_bytes) <= 2 * HELD_OUT_CHARACTERS
    assert all(bytes(sorted(ids)).count(b"\xc3") == bytes(ids).count(b"\xa9") for ids in scored.values())


def test_the_budget_ends_the_set_at_a_whole_document(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = config(text_folder(tmp_path, "a", 200))
    whole, part = rows_of(data, tokenizer), rows_of(data, tokenizer, max_tokens=300)
    assert part.document_bytes == whole.document_bytes[: len(part.document_bytes)]
    assert sum(part.document_bytes[:-1]) < 300 <= sum(part.document_bytes)
    assert part.fingerprint != whole.fingerprint
    assert whole.fingerprint == rows_of(data, tokenizer).fingerprint


def test_held_out_text_mixes_sources_by_weight(tmp_path: Path) -> None:
    first = text_folder(tmp_path, "a", 400).model_copy(update={"weight": 3.0})
    data = config(first, text_folder(tmp_path, "b", 400), percent=30)
    half = held_out_documents(data, "validation")[:80]
    sizes = {name: sum(len(text) for text in half if text.startswith(name)) for name in "ab"}
    assert abs(sizes["a"] / sizes["b"] - 3) < 0.3


def test_facts_are_never_held_out(tokenizer: Tokenizer) -> None:
    held_out = rows_of(config(FactsSource()), tokenizer)
    assert held_out.batches == []
    assert held_out.document_bytes == []


def test_everything_held_out_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text_folder(tmp_path, "a", 1)
    data = config(LocalSource(path=str(tmp_path / "a")), percent=49.999)
    with pytest.raises(DataError, match=r"all 1 documents are held out by held_out_percent=49\.999"):
        pretrain_stream(data, tokenizer, batch_size=1, max_seq_length=8, packing=PackingConfig(), seed=0)


def test_generated_facts_stream_new_wordings(tokenizer: Tokenizer) -> None:
    stream = pretrain_stream(
        config(FactsSource()), tokenizer, batch_size=8, max_seq_length=256, packing=PackingConfig(enabled=False), seed=3
    )
    rows = np.concatenate([stream.next_batch().input_ids.numpy() for _ in range(100)])
    texts = [bytes(row[(row < 256)].tolist()).decode() for row in rows]
    assert len(set(texts)) > 780
    assert all(text.endswith(".") for text in texts)


def test_the_data_fingerprint_moves_with_every_part(tmp_path: Path) -> None:
    base = config(text_folder(tmp_path, "a", 5))
    changed = [
        base.model_copy(update={"held_out_percent": 3.0}),
        base.model_copy(update={"shuffle_buffer": 7}),
        config(base.sources[0].model_copy(update={"weight": 2.0})),  # pyright: ignore[reportArgumentType]
        config(text_folder(tmp_path, "b", 5)),
        config(FactsSource()),
        config(PackagedSource(name="boolq_passages")),
        FinetuneData(name="f", task="recall"),
        FinetuneData(name="f", task="in_context_lookup"),
        FinetuneData(name="f", task="recall", max_examples=5),
        FinetuneData(name="f", task="recall", replay=base, replay_share=0.5),
        FinetuneData(name="f", task="recall", replay=base, replay_share=0.25),
    ]
    values = [data_fingerprint(data, "tokenizer") for data in [base, *changed]]
    values.append(data_fingerprint(base, "another tokenizer"))
    assert len(set(values)) == len(values)
    assert data_fingerprint(base.model_copy(update={"name": "other"}), "tokenizer") == values[0]


def test_python_documentation_needs_no_network(tokenizer: Tokenizer) -> None:
    data = config(PackagedSource(name="python_docs"))
    stream = pretrain_stream(data, tokenizer, batch_size=2, max_seq_length=64, packing=PackingConfig(), seed=0)
    assert stream.next_batch().num_targets > 100
    assert rows_of(data, tokenizer, max_tokens=2000).document_bytes


def test_a_hub_source_holds_out_and_names_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"body": f"hub text {n}"} for n in range(500)]

    def stream(source: HubSource) -> Iterator[dict[str, str]]:
        assert source.path == "owner/set"
        return iter(rows)

    monkeypatch.setattr(pretrain_dataset, "open_hub_stream", stream)
    source = HubSource(path="owner/set", text_column="body", revision="a" * 40)
    data = PretrainData(name="hub", sources=(source,), held_out_percent=10)
    found = [set(held_out_documents(data, split)) for split in ("validation", "test")]
    assert all(30 < len(part) < 70 for part in found)
    assert not found[0] & found[1]
    other = data.model_copy(update={"sources": (source.model_copy(update={"revision": "b" * 40}),)})
    assert data_fingerprint(data, "t") != data_fingerprint(other, "t")
