"""Tokenized text on disk: memory-mapped shards with a manifest, for corpora that are read more than once.

A folder holds, for each shard, `shard-00000.tokens` (the documents end to end, each with its start and end token, as
little-endian uint16, or uint32 where the vocabulary is larger) and `shard-00000.offsets` (uint64: where each document
begins, and the end of the last); `held_out.jsonl` (the texts that are kept out of training: scoring needs their bytes);
and `manifest.json` (size and SHA-256 of every file, the tokenizer, source, counts). Reading a document touches its pages
only, so the size of a corpus is not bounded by memory, and a training process starts at once.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from wrinklefree.data.config import TokensSource
from wrinklefree.data.tokens import Tokenizer, Tokens
from wrinklefree.utils.errors import CheckpointError, DataError
from wrinklefree.utils.manifest import MANIFEST, read_manifest, verify_manifest
from wrinklefree.utils.storage import explained

FORMAT = "wrinklefree tokens 1"
HELD_OUT_FILE = "held_out.jsonl"
TOKENS_A_SHARD = 1 << 27
"""256 MiB of uint16: few files, and a size that every tool copies easily."""
LARGEST_UINT16 = 1 << 16


@dataclass(frozen=True)
class TokensRecord:
    """What the manifest says about the tokens."""

    tokenizer: str
    """Fingerprint of the tokenizer that made them."""
    source: str
    """What the texts came from, for people."""
    source_fingerprint: str
    held_out_percent: float
    documents: int
    tokens: int
    shards: int
    dtype: str
    """`uint16` or `uint32`."""


class TokenShardWriter:
    """Writes the shards of one source into a folder; the caller adds the manifest and commits the folder."""

    def __init__(self, folder: Path, *, vocab_size: int, tokens_a_shard: int = TOKENS_A_SHARD) -> None:
        self._folder, self._tokens_a_shard = folder, tokens_a_shard
        self._dtype = np.dtype("<u2" if vocab_size <= LARGEST_UINT16 else "<u4")
        self._file: BinaryIO | None = None
        self._offsets: list[int] = [0]
        self._digest = hashlib.sha256()
        self.digests: dict[str, str] = {}
        """SHA-256 by file, of what was meant to be written."""
        self.documents = self.tokens = self.shards = 0

    @property
    def dtype(self) -> str:
        """`uint16` or `uint32`."""
        return self._dtype.name

    def add(self, document: Tokens) -> None:
        """Append a document."""
        if self._file is None:
            with explained(self._folder):
                self._file = (self._folder / f"{_shard(self.shards)}.tokens").open("wb")
        if document.max(initial=0) > np.iinfo(self._dtype).max:
            raise ValueError(f"token {document.max()} does not fit {self._dtype}; the tokenizer's vocab_size is wrong")
        content = document.astype(self._dtype).tobytes()
        with explained(self._folder):
            self._file.write(content)
        self._digest.update(content)
        self._offsets.append(self._offsets[-1] + len(document))
        self.documents, self.tokens = self.documents + 1, self.tokens + len(document)
        if self._offsets[-1] >= self._tokens_a_shard:
            self.close()

    def close(self) -> None:
        """Finish the open shard; the next document begins another."""
        if self._file is None:
            return
        name = _shard(self.shards)
        offsets = np.asarray(self._offsets, dtype="<u8").tobytes()
        with explained(self._folder):
            self._file.close()
            (self._folder / f"{name}.offsets").write_bytes(offsets)
        self.digests[f"{name}.tokens"] = self._digest.hexdigest()
        self.digests[f"{name}.offsets"] = hashlib.sha256(offsets).hexdigest()
        self._file, self._offsets, self._digest = None, [0], hashlib.sha256()
        self.shards += 1

    def discard(self) -> None:
        """Let go of an unfinished shard, after an error."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


class TokenDocuments(Sequence[Tokens]):
    """All documents of a folder, by index; nothing is read before it is asked for."""

    def __init__(self, folder: Path, record: TokensRecord) -> None:
        dtype = np.dtype(record.dtype).newbyteorder("<")
        names = [folder / _shard(number) for number in range(record.shards)]
        self._offsets = [_map(path.with_suffix(".offsets"), np.dtype("<u8")) for path in names]
        self._tokens = [_map(path.with_suffix(".tokens"), dtype) for path in names]
        self._ends = list(itertools.accumulate(len(offsets) - 1 for offsets in self._offsets))
        ends = [(int(offsets[-1]), len(tokens)) for offsets, tokens in zip(self._offsets, self._tokens, strict=True)]
        if sum(end for end, _ in ends) != record.tokens or any(end != size for end, size in ends):
            raise DataError(f"{folder}: its offsets and tokens do not belong together; prepare the data again")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self._ends, index)
        offsets = self._offsets[shard]
        within = index - (self._ends[shard] - (len(offsets) - 1))
        return self._tokens[shard][int(offsets[within]) : int(offsets[within + 1])].astype(np.int32)


def read_record(path: str | Path) -> TokensRecord:
    """The record of a folder of tokens; its files are not looked at.

    Raises:
        DataError: the folder is none, or was never completed.
    """
    folder = Path(path).expanduser()
    # A run of scripts/prepare_data.py writes a folder a source: a likely mistake is to give what holds them.
    inner = sorted(file.parent.name for file in folder.glob("*/manifest.json"))
    if inner and not (folder / MANIFEST).exists():
        raise DataError(f"data source path={path} holds the prepared folders {', '.join(inner)}: give one of them")
    manifest = _manifest(folder)
    if manifest.get("format") != FORMAT:
        raise DataError(f"data source path={path} holds no tokens of scripts/prepare_data.py; run it first")
    return TokensRecord(**manifest["record"])


def manifest_extra(record: TokensRecord, report: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest holds beside the list of files."""
    return {"format": FORMAT, "record": vars(record), "report": dict(report)}


def open_tokens(source: TokensSource, *, held_out_percent: float) -> TokenDocuments:
    """The training documents of a folder.

    Raises:
        DataError: files that are missing, truncated or damaged, or a folder that holds out another share of documents.
    """
    record = read_record(source.path)
    if record.held_out_percent != held_out_percent:
        raise DataError(
            f"data source path={source.path} was prepared with held_out_percent={record.held_out_percent:g}, the run says "
            f"{held_out_percent:g}: set data.held_out_percent={record.held_out_percent:g}, or prepare it again"
        )
    folder = Path(source.path).expanduser()
    _manifest(folder, verify=source.verify)
    if record.documents == 0:
        raise DataError(f"data source path={source.path} holds no document to train on; prepare it from more text")
    return TokenDocuments(folder, record)


def check_tokenizer(source: TokensSource, tokenizer: Tokenizer) -> None:
    """Refuse tokens that another tokenizer made.

    Raises:
        DataError: with both fingerprints.
    """
    record = read_record(source.path)
    if record.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"data source path={source.path} was tokenized by another tokenizer ({record.tokenizer[:12]}) than the "
            f"model's ({tokenizer.fingerprint[:12]}); run scripts/prepare_data.py again with this model"
        )


def held_out_texts(source: TokensSource) -> Iterator[str]:
    """Texts that were kept out of training."""
    file = Path(source.path).expanduser() / HELD_OUT_FILE
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} is missing or damaged ({error}); prepare the data again") from error


def write_held_out(folder: Path, texts: Iterable[str]) -> str:
    """Write the texts that are kept out of training; returns the file's SHA-256."""
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode(
        "utf-8", "replace"
    )
    with explained(folder):
        (folder / HELD_OUT_FILE).write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def tokens_fingerprint(source: TokensSource) -> str:
    """Identity of a folder's contents, from its manifest."""
    read_record(source.path)
    return _manifest(Path(source.path).expanduser())["digest"]


def _manifest(folder: Path, *, verify: bool = False) -> dict[str, Any]:
    try:
        manifest = verify_manifest(folder) if verify else read_manifest(folder)
    except CheckpointError as error:
        if not folder.exists():
            raise DataError(f"data source path={folder}: no such folder; run scripts/prepare_data.py first") from error
        raise DataError(f"data source path={folder}: {error}") from error
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["size"]:
            size = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise DataError(f"{file} is {size}, {entry['size']} bytes were written; copy or prepare the data again")
    return manifest


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    with explained(path):
        return np.memmap(path, dtype=dtype, mode="r")


def _shard(number: int) -> str:
    return f"shard-{number:05}"
