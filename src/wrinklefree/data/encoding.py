"""Texts to the tokens of documents, ahead of training: in this process, or in several of their own.

A batch of texts is cut into chunks, which worker processes tokenize side by side; results come back in the order of the
texts. What the stream holds is therefore a function of the texts alone, whatever the number of workers and their speed,
and a resume needs to know nothing about them. Workers are given texts and hand back one array a chunk: little to pickle.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from wrinklefree.data.tokens import Tokenizer, Tokens, encode_documents
from wrinklefree.utils.errors import DataError

CHUNK = 64
"""Documents that a worker takes at a time: a block has many chunks, and a chunk many more tokens than it costs to send."""

Encode = Callable[[Sequence[str]], list[Tokens]]
"""Texts -> start token, text, end token of each."""


class DocumentEncoder:
    """An `Encode` with `num_workers` processes; none with 0. They start with the first texts and end with this process."""

    def __init__(self, tokenizer: Tokenizer, num_workers: int = 0) -> None:
        self._tokenizer, self._num_workers = tokenizer, num_workers
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        """Documents of the texts, in their order; several threads may call at once.

        Raises:
            DataError: a worker was killed.
        """
        if self._num_workers == 0:
            return encode_documents(texts, self._tokenizer)
        chunks = [texts[first : first + CHUNK] for first in range(0, len(texts), CHUNK)]
        try:
            encoded = list(self._workers().map(_encode_chunk, chunks))
        except BrokenProcessPool as error:
            raise DataError(
                f"one of {self._num_workers} data workers was killed, perhaps for memory; lower data.num_workers "
                "(0 tokenizes in the training process)"
            ) from error
        return [document for tokens, ends in encoded for document in np.split(tokens, ends[:-1])]

    def close(self) -> None:
        """End the workers; the next call starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _workers(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                # A fork would copy the locks of other threads and the state of a GPU.
                self._pool = ProcessPoolExecutor(
                    self._num_workers,
                    mp_context=multiprocessing.get_context("spawn"),
                    initializer=_begin_worker,
                    initargs=(self._tokenizer,),
                )
            return self._pool


def already_encoded(documents: Sequence[Tokens]) -> list[Tokens]:
    """What stands in the place of an encoder where a source holds tokens."""
    return list(documents)


_worker_tokenizer: Tokenizer | None = None


def _begin_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    # Ctrl-C goes to every process of the terminal; the training process decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One process a worker is the parallelism that was asked for.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave when the training process is gone, however it went: nobody else would end a worker that waits for work."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_chunk(texts: Sequence[str]) -> tuple[Tokens, list[int]]:
    """All documents end to end, and where each ends."""
    assert _worker_tokenizer is not None
    documents = encode_documents(texts, _worker_tokenizer)
    return np.concatenate(documents), np.cumsum([len(document) for document in documents]).tolist()
