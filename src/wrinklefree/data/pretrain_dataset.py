"""Text to pretrain on, and the text kept out of it: streams for training, fixed rows for bits per byte.

Bits per byte compares models with different tokenizers, so bytes and predictions must cover the same text. Each held-out
document is cut to whole characters first; every one of its tokens is a target, because a start token stands before the
first; and all bytes of the cut count. A document longer than a row is scored in windows, each with its start token.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from wrinklefree.data.config import (
    DataConfig,
    FactsSource,
    FinetuneData,
    HubSource,
    LocalSource,
    PackagedSource,
    PackingConfig,
    PretrainData,
    TextSource,
    TokensSource,
)
from wrinklefree.data.encoding import DocumentEncoder, already_encoded
from wrinklefree.data.facts import biographies
from wrinklefree.data.hub import open_hub_stream, text_of
from wrinklefree.data.local_files import LocalStream
from wrinklefree.data.packing import Piece, Row, collate, pack_whole
from wrinklefree.data.sources import (
    is_streamed,
    load_documents,
    open_source,
    source_fingerprint,
    source_name,
    training_part,
)
from wrinklefree.data.splits import hash_share, split_by_hash
from wrinklefree.data.streams import LARGEST_FINITE_BLOCK, Lane, Packing, PieceCursor, TextStream
from wrinklefree.data.tasks import get_task
from wrinklefree.data.token_shards import check_tokenizer, held_out_texts
from wrinklefree.data.tokens import Tokenizer, start_token_id
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.utils.errors import ConfigError

HELD_OUT_CHARACTERS = 2000
"""Characters scored of one held-out document, so that one long document does not become the whole measure."""
STREAM_HELD_OUT_DOCUMENTS = 128
SCANNED_DOCUMENTS = 50_000
"""A stream's held-out text is looked for among this many documents at its beginning."""
TOKENIZER_BIOGRAPHY_EPOCHS = 5
TOKENIZER_STREAM_DOCUMENTS = 20_000


@dataclass(frozen=True)
class HeldOut:
    """Rows to score, and which document each target belongs to."""

    batches: list[Batch]
    document_index: list[Tensor]
    """For each batch, int64 [B, T]: index of the document whose token is predicted there; -1 without a target."""
    document_bytes: list[int]
    """UTF-8 bytes scored of each document."""
    fingerprint: str
    """Identity of texts, tokenizer and row length."""


def pretrain_stream(
    config: PretrainData, tokenizer: Tokenizer, *, batch_size: int, max_seq_length: int, packing: PackingConfig,
    seed: int, rank: int = 0, world_size: int = 1, lanes: int | None = None,
) -> TextStream:  # fmt: skip
    """An endless stream of packed text, in an order that depends on the seed and the number of lanes only.

    With `world_size` processes each reads and tokenizes its own documents only; `lanes` (by default one a process, a
    multiple of `world_size`) is how many processes the run may ever continue on.

    Raises:
        ConfigError: lanes that the processes cannot share.
        DataError: a source that is missing, damaged, empty, or tokenized by another tokenizer.
        NetworkError: a source that needs a network that is not there.
    """
    if lanes is not None and lanes % world_size:
        raise ConfigError(f"{lanes} lanes of documents cannot be shared by {world_size} processes; give a multiple")
    for source in config.sources:
        if isinstance(source, TokensSource):
            check_tokenizer(source, tokenizer)
    readers = [open_source(source, held_out_percent=config.held_out_percent) for source in config.sources]
    encode = DocumentEncoder(tokenizer, config.num_workers)
    packer: Packing = packing.packer if packing.enabled else "none"

    def make_lane(lane: int, lane_count: int) -> Lane:
        cursors = [
            PieceCursor(
                open_reader(_source_seed(seed, index)),
                already_encoded if isinstance(source, TokensSource) else encode,
                name=source_name(source),
                length=max_seq_length,
                block_size=(config.shuffle_buffer or LARGEST_FINITE_BLOCK)
                if is_streamed(source)
                else LARGEST_FINITE_BLOCK,
                seed=_source_seed(seed, index),
                packing=packer,
                shuffle=config.shuffle_buffer > 0 or not is_streamed(source),
                lane=lane,
                lane_count=lane_count,
            )
            for index, (source, open_reader) in enumerate(zip(config.sources, readers, strict=True))
        ]
        return Lane(cursors, [source.weight for source in config.sources], length=max_seq_length, packing=packer)

    return TextStream(
        make_lane,
        lane_count=lanes or world_size,
        batch_size=batch_size,
        length=max_seq_length,
        pad_token_id=tokenizer.pad_token_id,
        rank=rank,
        world_size=world_size,
        close=encode.close,
    )


def training_documents(config: PretrainData) -> Iterator[str]:
    """Training text of every source once (the beginning of a stream): what a tokenizer is trained on."""
    for index, source in enumerate(config.sources):
        if isinstance(source, FactsSource):
            for epoch in range(TOKENIZER_BIOGRAPHY_EPOCHS):
                yield from biographies(index, epoch)
        elif isinstance(source, TokensSource):
            raise ConfigError(
                f"{source_name(source)} holds tokens, and a new tokenizer is trained on text: give text sources"
            )
        elif is_streamed(source):
            yield from open_source(source, held_out_percent=config.held_out_percent)(0).read(TOKENIZER_STREAM_DOCUMENTS)
        else:
            assert isinstance(source, PackagedSource | LocalSource)
            yield from training_part(load_documents(source), config.held_out_percent, source_name(source))


def held_out_documents(config: PretrainData, split: str) -> list[str]:
    """Documents of `validation` or `test`, so ordered that any beginning mixes the sources by their weights in bytes.

    Generated facts have no held-out part: a recall task asks for them.
    """
    by_source = [
        (source.weight, sorted(held_out_of(source, config.held_out_percent, split), key=hash_share))
        for source in config.sources
        if not isinstance(source, FactsSource)
    ]
    return list(_interleave(by_source))


def held_out_rows(
    config: PretrainData, tokenizer: Tokenizer, *, split: str, max_tokens: int, max_seq_length: int, batch_size: int
) -> HeldOut:
    """Held-out documents, whole but for `HELD_OUT_CHARACTERS`, until they have `max_tokens` tokens.

    The set is empty where nothing is held out.
    """
    texts, encoded, total = [], [], 0
    digest = hashlib.sha256(f"{tokenizer.fingerprint} {max_seq_length}".encode())
    for document in held_out_documents(config, split):
        if total >= max_tokens:
            break
        text = _cut_text(document, HELD_OUT_CHARACTERS)
        ids = tokenizer.encode(text)
        texts.append(text)
        encoded.append(ids)
        total += len(ids)
        digest.update(hashlib.sha256(text.encode()).digest())
    start = start_token_id(tokenizer)
    pieces = [
        piece for index, ids in enumerate(encoded) for piece in _scored_windows(ids, start, max_seq_length, index)
    ]
    rows = pack_whole(pieces, max_seq_length)
    groups = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    return HeldOut(
        batches=[collate(group, max_seq_length, tokenizer.pad_token_id) for group in groups],
        document_index=[_document_index(group, max_seq_length) for group in groups],
        document_bytes=[len(text.encode()) for text in texts],
        fingerprint=digest.hexdigest(),
    )


def data_fingerprint(config: DataConfig, tokenizer_fingerprint: str) -> str:
    """Identity of everything a data config reads: contents, not paths, and the tokenizer that reads them."""
    digest = hashlib.sha256(tokenizer_fingerprint.encode())
    for part in _identities(config):
        digest.update(f"\n{part}".encode())
    return digest.hexdigest()


def _identities(config: DataConfig) -> Iterator[str]:
    if isinstance(config, FinetuneData):
        yield f"task {get_task(config.task).identity()} {config.max_examples} {config.replay_share}"
        if config.replay is not None:
            yield from _identities(config.replay)
        return
    yield f"text {config.held_out_percent} {config.shuffle_buffer}"
    for source in config.sources:
        yield f"{source.kind} {source.weight} {source_fingerprint(source)}"


def _source_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


def held_out_of(source: TextSource, percent: float, split: str) -> list[str]:
    """A source's documents of `validation` or `test`; of a stream those near its beginning."""
    documents: Iterable[str]
    if isinstance(source, HubSource) or (isinstance(source, LocalSource) and source.stream):
        rows = islice(
            open_hub_stream(source) if isinstance(source, HubSource) else LocalStream(source), SCANNED_DOCUMENTS
        )
        documents = (text_of(row, source.text_column, source_name(source)) for row in rows)
    elif isinstance(source, FactsSource):
        return []
    elif isinstance(source, TokensSource):
        documents = held_out_texts(source)
    else:
        documents = load_documents(source)
    share = percent / 100
    chosen = (text for text in documents if text.strip() and split_by_hash(text, validation=share, test=share) == split)
    return list(islice(chosen, STREAM_HELD_OUT_DOCUMENTS)) if is_streamed(source) else list(chosen)


def _interleave(by_source: Sequence[tuple[float, list[str]]]) -> Iterator[str]:
    """Documents of all sources: the next is of the source furthest behind its weight, counted in scored bytes."""
    positions, served = [0] * len(by_source), [0.0] * len(by_source)
    while True:
        left = [index for index, (_, documents) in enumerate(by_source) if positions[index] < len(documents)]
        if not left:
            return
        chosen = min(left, key=lambda index: served[index] / by_source[index][0])
        text = by_source[chosen][1][positions[chosen]]
        positions[chosen] += 1
        served[chosen] += min(len(text), HELD_OUT_CHARACTERS)
        yield text


def _cut_text(text: str, characters: int) -> str:
    """The beginning of a text, ended at a space where there is one."""
    if len(text) <= characters:
        return text
    cut = text[:characters]
    return cut[: cut.rfind(" ")] if " " in cut.strip() else cut


def _scored_windows(ids: Sequence[int], start: int, length: int, document: int) -> list[Piece]:
    """Windows of at most `length` positions in which every token of the document is a target once."""
    windows: list[Piece] = []
    for first in range(0, len(ids), length):
        targets = np.asarray(ids[first : first + length], dtype=np.int32)
        windows.append(Piece(np.concatenate([[start], targets[:-1]]).astype(np.int32), targets, document))
    return windows


def _document_index(rows: Sequence[Row], length: int) -> Tensor:
    index = np.full((len(rows), length), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        first = 0
        for piece in row.pieces:
            index[number, first : first + len(piece)] = np.where(piece.labels == IGNORE, -1, piece.document)
            first += len(piece)
    return torch.from_numpy(index)
