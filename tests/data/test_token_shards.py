"""Tokens on disk come back as they were; whatever is wrong with a folder is found and named."""

import json
from pathlib import Path

import numpy as np
import pytest

from wrinklefree.data.config import TokensSource
from wrinklefree.data.token_shards import (
    TokenShardWriter,
    TokensRecord,
    check_tokenizer,
    held_out_texts,
    manifest_extra,
    open_tokens,
    read_record,
    tokens_fingerprint,
    write_held_out,
)
from wrinklefree.data.tokens import Tokenizer
from wrinklefree.utils.errors import DataError
from wrinklefree.utils.manifest import write_manifest

DOCUMENTS = [np.arange(first, first + size, dtype=np.int32) for first, size in ((0, 5), (7, 1), (100, 9), (3, 4))]


def write(folder: Path, *, vocab_size: int = 1000, tokens_a_shard: int = 6, percent: float = 2.0) -> TokensSource:
    folder.mkdir()
    writer = TokenShardWriter(folder, vocab_size=vocab_size, tokens_a_shard=tokens_a_shard)
    for document in DOCUMENTS:
        writer.add(document)
    writer.close()
    digests = writer.digests | {"held_out.jsonl": write_held_out(folder, ["é held\nout", "too"])}
    record = TokensRecord("bytes", "here", "f", percent, writer.documents, writer.tokens, writer.shards, writer.dtype)
    write_manifest(folder, manifest_extra(record, {}), digests=digests)
    return TokensSource(path=str(folder))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_documents_come_back(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    source = write(tmp_path / "t", vocab_size=vocab_size)
    assert read_record(source.path).dtype == dtype
    documents = open_tokens(source, held_out_percent=2.0)
    assert len(documents) == len(DOCUMENTS)
    for found, expected in zip(documents, DOCUMENTS, strict=True):
        assert found.tolist() == expected.tolist()
        assert found.dtype == np.int32
    assert [found.tolist() for found in documents[1:3]] == [d.tolist() for d in DOCUMENTS[1:3]]
    assert [(tmp_path / "t" / f"shard-0000{n}.tokens").exists() for n in range(4)] == [True, True, True, False]
    with pytest.raises(IndexError):
        documents[4]
    assert list(held_out_texts(source)) == ["é held\nout", "too"]


def test_a_token_outside_of_the_vocabulary(tmp_path: Path) -> None:
    writer = TokenShardWriter(tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match="token 70000 does not fit uint16"):
        writer.add(np.asarray([70_000], dtype=np.int32))
    writer.discard()


def test_a_flipped_bit_and_a_truncated_file(tmp_path: Path) -> None:
    source = write(tmp_path / "t")
    file = tmp_path / "t" / "shard-00000.tokens"
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1, *content[1:]]))
    with pytest.raises(DataError, match=r"shard-00000.tokens is corrupt: its SHA-256"):
        open_tokens(source, held_out_percent=2.0)
    unverified = source.model_copy(update={"verify": False})
    assert open_tokens(unverified, held_out_percent=2.0)[0].tolist() == [1, 1, 2, 3, 4]
    file.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"shard-00000.tokens is 10 bytes, 12 bytes were written"):
        open_tokens(unverified, held_out_percent=2.0)
    file.unlink()
    with pytest.raises(DataError, match=r"shard-00000.tokens is missing"):
        open_tokens(unverified, held_out_percent=2.0)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; run scripts/prepare_data.py first"):
        read_record(tmp_path / "nowhere")
    write(tmp_path / "0-a")
    with pytest.raises(DataError, match="holds the prepared folders 0-a: give one of them"):
        read_record(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_manifest(other, {"kind": "artifact"})
    with pytest.raises(DataError, match="holds no tokens of scripts/prepare_data.py"):
        read_record(other)


def test_another_tokenizer_and_another_split_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "t", percent=1.5)
    check_tokenizer(source, tokenizer)
    monkeypatch.setattr(tokenizer, "fingerprint", "f" * 64)
    with pytest.raises(DataError, match=r"tokenized by another tokenizer \(bytes\) than the model's \(ffffffffffff\)"):
        check_tokenizer(source, tokenizer)
    with pytest.raises(
        DataError, match=r"prepared with held_out_percent=1.5, the run says 2: set data.held_out_percent=1.5"
    ):
        open_tokens(source, held_out_percent=2.0)


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    first, same = write(tmp_path / "a"), write(tmp_path / "b")
    other = write(tmp_path / "c", percent=3.0)
    assert tokens_fingerprint(first) == tokens_fingerprint(same) != tokens_fingerprint(other)


def test_damaged_held_out_texts(tmp_path: Path) -> None:
    source = write(tmp_path / "t")
    (tmp_path / "t" / "held_out.jsonl").write_text(json.dumps({"other": 1}))
    with pytest.raises(DataError, match=r"held_out.jsonl is missing or damaged"):
        list(held_out_texts(source))
