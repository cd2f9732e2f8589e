"""Text into folders of tokens (`data.token_shards`): filtered, deduplicated, split, tokenized, checksummed.

Each source of a `data` config becomes a folder that a source of kind `tokens` reads. Documents are read once, in the
order of the source, so memory holds a block of them and the hashes of those seen. Duplicates are sought across sources,
before the split: a document and its near copy cannot stand on both sides of it. A folder appears when it is complete.
"""

import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from wrinklefree.data.config import FilterConfig, HubSource, LocalSource, PackagedSource, PretrainData, TextSource
from wrinklefree.data.deduplication import Deduplication, Deduplicator
from wrinklefree.data.encoding import DocumentEncoder
from wrinklefree.data.filters import reason_to_drop
from wrinklefree.data.hub import open_hub_stream, text_of
from wrinklefree.data.local_files import LocalStream
from wrinklefree.data.sources import load_documents, source_fingerprint, source_name
from wrinklefree.data.splits import split_by_hash
from wrinklefree.data.token_shards import (
    TOKENS_A_SHARD,
    TokenShardWriter,
    TokensRecord,
    manifest_extra,
    write_held_out,
)
from wrinklefree.utils.errors import ConfigError, DataError, StorageError
from wrinklefree.utils.manifest import commit_folder, write_manifest
from wrinklefree.utils.storage import temporary_folder
from wrinklefree.utils.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

BLOCK = 1024
"""Documents that are filtered and tokenized together."""
SECONDS_A_LINE = 30.0
"""Between lines of progress."""


@dataclass(frozen=True)
class PreparationOptions:
    """What `scripts/prepare_data.py` is told beside sources and tokenizer."""

    output: Path
    filters: FilterConfig = field(default_factory=FilterConfig)
    deduplicate: Deduplication = "exact"
    near_threshold: float = 0.8
    max_documents: int | None = None
    """Documents read of each source."""
    max_tokens: int | None = None
    """Training tokens written of each source; ends behind the block that reaches it."""
    held_out_documents: int = 10_000
    """Texts kept of each of validation and test; more are left out of training and forgotten."""
    tokens_a_shard: int = TOKENS_A_SHARD


@dataclass
class SourceReport:
    """What became of the documents of a source."""

    name: str
    folder: Path
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter[str])
    """Reason -> documents."""
    held_out: int = 0
    written: int = 0
    tokens: int = 0
    bytes: int = 0
    """UTF-8 bytes of the documents written."""
    seconds: float = 0.0

    def as_record(self) -> dict[str, Any]:
        """For the manifest: what depends on the data alone."""
        kept = ("name", "read", "held_out", "written", "tokens", "bytes")
        return {key: getattr(self, key) for key in kept} | {"dropped": dict(sorted(self.dropped.items()))}


def prepare(data: PretrainData, tokenizer: TextTokenizer, options: PreparationOptions) -> list[SourceReport]:
    """Write a folder for every source; what stands at its place already is refused, not replaced.

    Raises:
        ConfigError: a source that is generated, or tokens already.
        DataError: a source that is missing or damaged, or of which nothing is left.
        StorageError: a folder that exists, or a disk that is full or refuses.
    """
    folders = [options.output / f"{index}-{_slug(source)}" for index, source in enumerate(data.sources)]
    for folder in folders:
        if folder.exists():
            raise StorageError(f"{folder} exists; remove it, or give another output=")
    duplicates = Deduplicator(options.deduplicate, near_threshold=options.near_threshold)
    with closing(DocumentEncoder(tokenizer, data.num_workers)) as encode:
        return [
            _SourcePreparation(source, data, folder, tokenizer, options, duplicates, encode).run()
            for source, folder in zip(data.sources, folders, strict=True)
        ]


class _SourcePreparation:
    """One source on its way into a folder."""

    def __init__(
        self, source: TextSource, data: PretrainData, folder: Path, tokenizer: TextTokenizer,
        options: PreparationOptions, duplicates: Deduplicator, encode: DocumentEncoder,
    ) -> None:  # fmt: skip
        self._source, self._share = source, data.held_out_percent / 100
        self._tokenizer, self._options, self._duplicates, self._encode = tokenizer, options, duplicates, encode
        self._held_out: dict[str, list[str]] = {"validation": [], "test": []}
        self._report = SourceReport(source_name(source), folder)
        self._data = data

    def run(self) -> SourceReport:
        """Read, write, commit."""
        report, began = self._report, time.monotonic()
        texts = islice(source_texts(self._source), self._options.max_documents)
        temporary = temporary_folder(report.folder)
        writer = TokenShardWriter(
            temporary, vocab_size=self._tokenizer.vocab_size, tokens_a_shard=self._options.tokens_a_shard
        )
        said = began
        try:
            while block := list(islice(texts, BLOCK)):
                self._add(block, writer)
                if time.monotonic() - said > SECONDS_A_LINE:
                    said = time.monotonic()
                    logger.info(
                        "%s: %d documents read, %d tokens written, %.0f tokens/s",
                        report.name, report.read, writer.tokens, writer.tokens / (said - began),
                    )  # fmt: skip
                if self._options.max_tokens is not None and writer.tokens >= self._options.max_tokens:
                    break
            writer.close()
            self._finish(temporary, writer)
        except BaseException:
            writer.discard()
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        report.seconds = time.monotonic() - began
        return report

    def _add(self, texts: list[str], writer: TokenShardWriter) -> None:
        """Filter before looking for duplicates, which costs more and must not remember what is dropped anyhow."""
        report = self._report
        report.read += len(texts)
        reasons = [reason_to_drop(text, self._options.filters) for text in texts]
        report.dropped.update(reason for reason in reasons if reason is not None)
        good = [text for text, reason in zip(texts, reasons, strict=True) if reason is None]
        again = self._duplicates.reasons(good)
        report.dropped.update(reason for reason in again if reason is not None)
        training: list[str] = []
        for text in (text for text, reason in zip(good, again, strict=True) if reason is None):
            split = split_by_hash(text, validation=self._share, test=self._share)
            if split == "train":
                training.append(text)
            else:
                report.held_out += 1
                if len(self._held_out[split]) < self._options.held_out_documents:
                    self._held_out[split].append(text)
        for document in self._encode(training):
            writer.add(document)
        report.bytes += sum(len(text.encode("utf-8", "replace")) for text in training)

    def _finish(self, temporary: Path, writer: TokenShardWriter) -> None:
        report = self._report
        report.written, report.tokens = writer.documents, writer.tokens
        if writer.documents == 0:
            dropped = ", ".join(f"{reason} {count}" for reason, count in report.dropped.most_common()) or "none dropped"
            raise DataError(
                f"{report.name}: nothing is left of {report.read} documents ({dropped}; {report.held_out} held out); "
                "loosen filters, or set one to null"
            )
        held_out = write_held_out(temporary, [*self._held_out["validation"], *self._held_out["test"]])
        record = TokensRecord(
            tokenizer=self._tokenizer.fingerprint,
            source=report.name,
            source_fingerprint=source_fingerprint(self._source),
            held_out_percent=self._data.held_out_percent,
            documents=writer.documents,
            tokens=writer.tokens,
            shards=writer.shards,
            dtype=writer.dtype,
        )
        digests = writer.digests | {"held_out.jsonl": held_out}
        write_manifest(temporary, manifest_extra(record, report.as_record()), digests=digests)
        commit_folder(temporary, report.folder)


def source_texts(source: TextSource) -> Iterator[str]:
    """All texts of a source once, in its own order, blank ones left out.

    Raises:
        ConfigError: a source that is generated anew in every epoch, or tokens already.
    """
    if isinstance(source, PackagedSource):
        yield from load_documents(source)
        return
    if not isinstance(source, HubSource | LocalSource):
        kind = "is generated while training" if source.kind == "facts" else "holds tokens already"
        raise ConfigError(f"{source_name(source)} {kind}: leave it out of what is prepared")
    rows = open_hub_stream(source) if isinstance(source, HubSource) else LocalStream(source)
    for row in rows:
        text = text_of(row, source.text_column, source_name(source))
        if text.strip():
            yield text


def describe(reports: list[SourceReport], data: PretrainData) -> str:
    """What was done, and the overrides that train on it."""
    lines: list[str] = []
    for report in reports:
        dropped = sum(report.dropped.values())
        lines.append(
            f"{report.folder}: {report.written:,} documents, {report.tokens:,} tokens "
            f"({report.bytes / max(1, report.tokens):.2f} bytes each), {report.held_out:,} documents held out, "
            f"{dropped:,} of {report.read:,} dropped, {report.tokens / max(1e-9, report.seconds):,.0f} tokens/s"
        )
        lines += [f"    {reason} {count:,}" for reason, count in report.dropped.most_common()]
    sources = ", ".join(
        f"{{kind: tokens, path: {report.folder}, weight: {source.weight:g}}}"
        for report, source in zip(reports, data.sources, strict=True)
    )
    lines.append(f"train with: data=tokens 'data.sources=[{sources}]' data.held_out_percent={data.held_out_percent:g}")
    if data.normalize_weights:
        lines[-1] += " data.normalize_weights=true"
    return "\n".join(lines)


def _slug(source: TextSource) -> str:
    if isinstance(source, HubSource):
        return source.path.replace("/", "_")
    if isinstance(source, PackagedSource):
        return source.name
    return Path(source.path).stem or "local" if isinstance(source, LocalSource) else source.kind
