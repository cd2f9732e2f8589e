"""Text sources as readers: they hand out training documents in a seeded order and can say where they are.

A reader never crosses the end of an epoch within one `read`; the next call begins the next epoch. Its state is small
(an index, or the position of a stream), because whoever shuffles does so within what one `read` returned and can read
it again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from httpx2 import HTTPError
from numpy.typing import NDArray
from pyarrow import ArrowException

from wrinklefree.data.config import FactsSource, HubSource, LocalSource, PackagedSource, TextSource, TokensSource
from wrinklefree.data.corpora import corpus_fingerprint, load_corpus
from wrinklefree.data.facts import biographies, facts_fingerprint
from wrinklefree.data.hub import ResumableStream, hub_revision, open_hub_stream, text_of
from wrinklefree.data.local_files import LocalStream, load_local, local_fingerprint
from wrinklefree.data.splits import split_by_hash
from wrinklefree.data.token_shards import open_tokens, tokens_fingerprint
from wrinklefree.data.tokens import Tokens
from wrinklefree.utils.errors import DataError, NetworkError

Document = TypeVar("Document")
ReadDocument = TypeVar("ReadDocument", covariant=True)


class DocumentReader(Protocol[ReadDocument]):
    """Training documents of one source, epoch after epoch."""

    @property
    def epoch(self) -> int:
        """Passes over the source that were begun before the next document."""
        ...

    def read(self, count: int) -> Sequence[ReadDocument]:
        """The next documents, at most `count`, fewer at the end of an epoch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the next `read` begins; JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at `state_dict`."""
        ...


@dataclass
class FiniteReader(Generic[Document]):
    """Documents that can be had by index, shuffled whole in every epoch: the order depends on (seed, epoch) only."""

    documents_of: Callable[[int], Sequence[Document]]
    """Epoch -> its documents; constant but for generated text."""
    seed: int
    epoch: int = 0
    _index: int = 0
    _order: tuple[int, Sequence[Document], NDArray[np.int64]] | None = None
    """Epoch, its documents, and their order; documents themselves may be far too many to gather here."""

    def read(self, count: int) -> list[Document]:
        """See `DocumentReader`."""
        if self._order is None or self._order[0] != self.epoch:
            documents = self.documents_of(self.epoch)
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(documents))
            self._order = (self.epoch, documents, order)
        _, documents, order = self._order
        taken = [documents[index] for index in order[self._index : self._index + count].tolist()]
        self._index += len(taken)
        if self._index >= len(documents):
            self.epoch, self._index = self.epoch + 1, 0
        return taken

    def state_dict(self) -> dict[str, Any]:
        """See `DocumentReader`."""
        return {"epoch": self.epoch, "index": self._index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `DocumentReader`."""
        self.epoch, self._index = state["epoch"], state["index"]


@dataclass
class StreamReader:
    """Documents of a stream, in its own order; those that are held out are passed over."""

    open_stream: Callable[[], ResumableStream]
    text_column: str
    held_out_percent: float
    where: str
    """What messages call the stream."""
    epoch: int = 0
    _row: int = 0
    """Rows of this epoch that were read, for messages."""
    _stream: ResumableStream | None = None
    _rows: Iterator[Mapping[str, Any]] | None = None
    _position: dict[str, Any] | None = field(default=None)

    def read(self, count: int) -> list[str]:
        """See `DocumentReader`."""
        texts: list[str] = []
        rows = self._open_rows()
        try:
            while len(texts) < count:
                row = next(rows, None)
                if row is None:
                    self.epoch, self._row = self.epoch + 1, 0
                    self._rows, self._stream, self._position = None, None, None
                    break
                self._row += 1
                text = text_of(row, self.text_column, f"{self.where}, row {self._row}")
                if text.strip() and _is_training(text, self.held_out_percent):
                    texts.append(text)
        except (OSError, HTTPError) as error:
            raise NetworkError(
                f"{self.where} broke off ({str(error)[:150]}); run the command again to go on from the last checkpoint"
            ) from error
        except (ValueError, ArrowException) as error:
            # The `datasets` library names the damaged file in its log only; the row tells how far it came.
            reason = str(error).strip().partition("\n")[0][:150]
            raise DataError(
                f"{self.where}, behind row {self._row}: damaged data ({reason}); download or write it again"
            ) from error
        return texts

    def state_dict(self) -> dict[str, Any]:
        """See `DocumentReader`."""
        position = self._stream.state_dict() if self._stream is not None and self._rows is not None else self._position
        return {"epoch": self.epoch, "row": self._row, "position": position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `DocumentReader`."""
        self.epoch, self._row, self._position = state["epoch"], state["row"], state["position"]
        self._rows = None

    def _open_rows(self) -> Iterator[Mapping[str, Any]]:
        if self._rows is None:
            # A fresh stream each time: a state loaded into one that was already read is not always honoured.
            self._stream = self.open_stream()
            if self._position is not None:
                self._stream.load_state_dict(self._position)
            self._rows = iter(self._stream)
        return self._rows


def load_documents(source: PackagedSource | LocalSource) -> Sequence[str]:
    """All documents of a source that lies on this machine, in a fixed order, blank ones left out.

    Raises:
        DataError: files that are missing, damaged or empty.
        NetworkError: a package that is neither cached nor reachable.
    """
    if isinstance(source, LocalSource):
        return load_local(source)
    return [text for text in load_corpus(source.name) if text.strip()]


def training_part(documents: Sequence[str], held_out_percent: float, where: str) -> list[str]:
    """Documents that belong to neither validation nor test.

    Raises:
        DataError: none is left.
    """
    kept = [text for text in documents if _is_training(text, held_out_percent)]
    if not kept:
        raise DataError(
            f"{where}: all {len(documents)} documents are held out by held_out_percent={held_out_percent:g}; add text "
            "or lower it"
        )
    return kept


ReaderFactory = Callable[[int], DocumentReader[Any]]
"""Seed -> a reader at the beginning; what all readers of a source share is loaded once."""


def open_source(source: TextSource, *, held_out_percent: float) -> ReaderFactory:
    """Readers of a source's training documents: texts, or for `tokens` their tokens.

    Raises:
        DataError: a source that is missing, damaged or empty.
        NetworkError: a source that needs a network that is not there.
    """
    name = source_name(source)
    if isinstance(source, HubSource):
        return lambda _: StreamReader(lambda: open_hub_stream(source), source.text_column, held_out_percent, name)
    if isinstance(source, FactsSource):
        return lambda seed: FiniteReader(lambda epoch: biographies(seed, epoch), seed)
    if isinstance(source, TokensSource):
        tokens = open_tokens(source, held_out_percent=held_out_percent)
        return lambda seed: FiniteReader[Tokens](lambda _: tokens, seed)
    if isinstance(source, LocalSource) and source.stream:
        LocalStream(source)  # so that a missing file is found at the start, not in a thread
        return lambda _: StreamReader(lambda: LocalStream(source), source.text_column, held_out_percent, name)
    documents = training_part(load_documents(source), held_out_percent, name)
    return lambda seed: FiniteReader(lambda _: documents, seed)


def is_streamed(source: TextSource) -> bool:
    """Whether a source is read in its own order, so that only a buffer of it can be shuffled."""
    return isinstance(source, HubSource) or (isinstance(source, LocalSource) and source.stream)


def source_name(source: TextSource) -> str:
    """What messages call a source."""
    if isinstance(source, HubSource):
        return f"hub dataset {source.path}"
    if isinstance(source, LocalSource | TokensSource):
        return f"data source path={source.path}"
    return "generated facts" if isinstance(source, FactsSource) else f"packaged corpus {source.name}"


def source_labels(sources: Sequence[TextSource]) -> list[str]:
    """A short name of each source, for weights and metrics; their numbers tell apart those that share one."""
    names = [_label(source) for source in sources]
    if len(set(names)) == len(names):
        return names
    return [f"{name}-{number}" for number, name in enumerate(names, start=1)]


def _label(source: TextSource) -> str:
    if isinstance(source, HubSource):
        return source.path.rpartition("/")[2] + (f"-{source.name}" if source.name else "")
    if isinstance(source, LocalSource | TokensSource):
        path = Path(source.path)
        return path.stem.strip("*.") or path.parent.name.strip("*.") or "text"
    return "facts" if isinstance(source, FactsSource) else source.name


def source_fingerprint(source: TextSource) -> str:
    """Identity of a source's contents."""
    if isinstance(source, HubSource):
        commit = hub_revision(source.path, source.revision)
        return f"{source.path}/{source.name}/{source.split}/{source.text_column}@{commit}"
    if isinstance(source, LocalSource):
        return local_fingerprint(source)
    if isinstance(source, TokensSource):
        return tokens_fingerprint(source)
    return facts_fingerprint() if isinstance(source, FactsSource) else corpus_fingerprint(source.name)


def _is_training(text: str, held_out_percent: float) -> bool:
    share = held_out_percent / 100
    return split_by_hash(text, validation=share, test=share) == "train"
