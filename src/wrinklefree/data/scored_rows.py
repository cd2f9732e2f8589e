"""Rows of each source, and of the texts that the mixture should serve, for influence to score apart from the stream.

A pool holds a sample of a text set as tokens, taken once: some documents, of a long one a stretch only. Rows number n of
a pool are a function of (seed, n): scoring advances no stream, and a resumed run scores what the undisturbed one did.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from wrinklefree.data.config import FinetuneData, PretrainData, TextSource, TokensSource
from wrinklefree.data.finetune_dataset import encode_examples, task_examples
from wrinklefree.data.packing import Packer, Piece, Row, collate, cut_to_length, next_token_piece, pack_whole
from wrinklefree.data.pretrain_dataset import held_out_documents, held_out_of
from wrinklefree.data.sources import open_source, source_labels, source_name
from wrinklefree.data.tasks import get_task
from wrinklefree.data.token_shards import check_tokenizer
from wrinklefree.data.tokens import Tokenizer, Tokens, encode_documents
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.utils.errors import ConfigError, DataError

POOL_DOCUMENTS = 512
"""Documents of a pool: the beginning of a stream, a random choice of what lies on this machine."""
ROWS_A_DOCUMENT = 8
"""A document longer than so many rows gives a stretch of that length, so that one book is not the whole pool."""
CHARACTERS_A_TOKEN = 6
"""Rather many: what is cut off before tokenizing."""
READ_AT_ONCE = 64


class RowPool:
    """A sample of a text set, from which packed rows are drawn by number."""

    def __init__(
        self, pieces: Sequence[Piece], *, length: int, pad_token_id: int, seed: int, name: str, whole: bool = False
    ) -> None:
        """Hold the pieces.

        Args:
            pieces: At most `length` tokens each.
            length: Positions of a row.
            pad_token_id: Fills rows of whole pieces.
            seed: Of every choice.
            name: What messages call the text.
            whole: Cut no piece where a row ends (examples of a task).

        Raises:
            DataError: no piece has a target.
        """
        self._pieces = [piece for piece in pieces if bool((piece.labels != IGNORE).any())]
        if not self._pieces:
            raise DataError(f"{name} holds nothing to score for influence; check its text and held_out_percent")
        self._length, self._pad_token_id, self._seed, self._whole = length, pad_token_id, seed, whole

    def rows(self, count: int, number: int) -> list[Row]:
        """`count` rows; a small pool repeats its pieces, in another order each time."""
        generator = np.random.default_rng([self._seed, number])
        packer = Packer(self._length)
        rows: list[Row] = []
        while len(rows) < count:
            order = generator.permutation(len(self._pieces))
            pieces = (self._pieces[index] for index in order)
            if self._whole:
                rows.extend(pack_whole(pieces, self._length))
                continue
            for piece in pieces:
                rows.extend(packer.add(piece))
                if len(rows) >= count:
                    break
        return rows[:count]

    def batches(self, count: int, number: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """This rank's part of `count` rows, which `world_size` divides, in batches of at most `batch_size`."""
        share = count // world_size
        mine = self.rows(count, number)[rank * share : (rank + 1) * share]
        return [
            collate(mine[first : first + batch_size], self._length, self._pad_token_id)
            for first in range(0, share, batch_size)
        ]


def mixed_text(config: PretrainData | FinetuneData) -> PretrainData | None:
    """The text whose sources a run mixes by weight: its own, or what a task replays."""
    return config.replay if isinstance(config, FinetuneData) else config


def source_pools(config: PretrainData, tokenizer: Tokenizer, *, length: int, seed: int) -> dict[str, RowPool]:
    """Training text of every source, by label, in the order of the sources.

    Raises:
        DataError: a source that is missing, damaged, empty, or tokenized by another tokenizer.
        NetworkError: a source that needs a network that is not there.
    """
    pools: dict[str, RowPool] = {}
    labels = source_labels(config.sources)
    for index, (label, source) in enumerate(zip(labels, config.sources, strict=True)):
        if isinstance(source, TokensSource):
            check_tokenizer(source, tokenizer)
        numbers = _seed(seed, 0, index)
        documents = _some_training_documents(source, config.held_out_percent, numbers)
        pools[label] = _pool(documents, tokenizer, length, numbers, source_name(source))
    return pools


def probe_pools(
    config: PretrainData | FinetuneData, probes: Sequence[TextSource], tokenizer: Tokenizer, *, length: int, seed: int
) -> dict[str, RowPool]:
    """What the mixture should serve: the given texts by label; without any, what the run is validated on.

    A probe that is one of the run's sources gives its validation documents, any other text all of its documents.

    Raises:
        ConfigError: nothing is held out that could serve.
        DataError: as `source_pools`.
        NetworkError: as `source_pools`.
    """
    if not probes:
        return {"validation": _validation_pool(config, tokenizer, length, _seed(seed, 1, 0))}
    text = mixed_text(config)
    trained_on = [] if text is None else [_unweighted(source) for source in text.sources]
    pools: dict[str, RowPool] = {}
    for index, (label, probe) in enumerate(zip(source_labels(probes), probes, strict=True)):
        numbers = _seed(seed, 1, index)
        if text is not None and _unweighted(probe) in trained_on:
            documents: Sequence[Any] = list(
                islice(held_out_of(probe, text.held_out_percent, "validation"), POOL_DOCUMENTS)
            )
            if not documents:
                raise ConfigError(
                    f"influence.probes: {source_name(probe)} is trained on, and data.held_out_percent="
                    f"{text.held_out_percent:g} keeps no document of it out; raise it, or give another text"
                )
        else:
            if isinstance(probe, TokensSource):
                check_tokenizer(probe, tokenizer)
            documents = _some_training_documents(probe, 0.0, numbers)
        pools[label] = _pool(documents, tokenizer, length, numbers, source_name(probe))
    return pools


def _validation_pool(
    config: PretrainData | FinetuneData, tokenizer: Tokenizer, length: int, numbers: list[int]
) -> RowPool:
    if isinstance(config, FinetuneData):
        task = get_task(config.task)
        generator = np.random.default_rng(numbers)
        examples = task_examples(config, "validation")
        chosen = [examples[index] for index in generator.permutation(len(examples))[:POOL_DOCUMENTS]]
        return RowPool(
            encode_examples(task, chosen, tokenizer, length), length=length, pad_token_id=tokenizer.pad_token_id,
            seed=int(generator.integers(2**31)), name=f"task {config.task}", whole=True,
        )  # fmt: skip
    documents = held_out_documents(config, "validation")[:POOL_DOCUMENTS]
    if not documents:
        raise ConfigError(
            f"influence needs text that the mixture should serve, and data.held_out_percent={config.held_out_percent:g} "
            "keeps no document out; raise it, or name the text with influence.probes=[{kind: local, path: ...}]"
        )
    return _pool(documents, tokenizer, length, numbers, f"the held-out text of {config.name}")


def _some_training_documents(source: TextSource, held_out_percent: float, numbers: list[int]) -> list[Any]:
    """Texts, or token arrays, of at most one pass over the source."""
    reader = open_source(source, held_out_percent=held_out_percent)(_as_seed(numbers))
    documents: list[Any] = []
    while len(documents) < POOL_DOCUMENTS and reader.epoch == 0:
        documents.extend(reader.read(READ_AT_ONCE))
    return documents


def _pool(documents: Sequence[Any], tokenizer: Tokenizer, length: int, numbers: list[int], name: str) -> RowPool:
    generator = np.random.default_rng(numbers)
    stretches = _stretches(documents, length, generator)
    if documents and isinstance(documents[0], str):
        encoded: Sequence[Tokens] = encode_documents(list(stretches), tokenizer)
    else:
        encoded = list(stretches)
    pieces = [
        piece
        for document in encoded
        for piece in cut_to_length(next_token_piece(np.asarray(document)), length)[:ROWS_A_DOCUMENT]
    ]
    return RowPool(
        pieces, length=length, pad_token_id=tokenizer.pad_token_id, seed=int(generator.integers(2**31)), name=name
    )


def _stretches(documents: Sequence[Any], length: int, generator: np.random.Generator) -> Iterator[Any]:
    """Each document, or a random stretch of a long one, so that little is tokenized in vain."""
    for document in documents:
        per_token = CHARACTERS_A_TOKEN if isinstance(document, str) else 1
        limit = ROWS_A_DOCUMENT * length * per_token
        if len(document) <= limit:
            yield document
            continue
        first = int(generator.integers(len(document) - limit + 1))
        if isinstance(document, str):
            # From a word's beginning, where the script has spaces.
            first = document.rfind(" ", max(0, first - 100), first + 1) + 1 or first
        yield document[first : first + limit]


def _unweighted(source: TextSource) -> TextSource:
    return source.model_copy(update={"weight": 1.0})


def _seed(seed: int, kind: int, index: int) -> list[int]:
    """Apart from the seeds of the training stream, which have two numbers."""
    return [seed, 0x1F1, kind, index]


def _as_seed(numbers: list[int]) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
