"""Batches made ahead of the step by a thread, and how long the step had to wait for them all the same.

The thread draws `ahead` batches and no more, so what training sees is a function of the stream alone. Whatever is asked
of the stream in between takes effect at a batch that is known in advance: new weights of a mixture hold from the
`ahead`-th batch after the one that training has just taken, however far the thread had come.
"""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from wrinklefree.data.finetune_dataset import FinetuneStream
from wrinklefree.data.streams import TextStream
from wrinklefree.models.records import Batch


@dataclass(frozen=True)
class _Drawn:
    """A batch, and the stream just after it."""

    batch: Batch
    state: dict[str, Any]
    padding_share: float


class PrefetchedStream:
    """A `BatchStream` over another one, whose batches lie ready; in pinned memory where there is a GPU."""

    def __init__(self, stream: TextStream | FinetuneStream, *, ahead: int) -> None:
        self._stream, self._ahead = stream, ahead
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ready: deque[Future[_Drawn]] = deque()
        self._taken = 0
        """Batches that training has taken, from the beginning of the run."""
        self._weights: deque[tuple[int, list[float]]] = deque()
        """Weights to come, and the batch before which they are set."""
        self._state, self._padding_share = stream.state_dict(), stream.padding_share
        self._pins = torch.cuda.is_available()
        self.seconds_waited = 0.0
        """Time that `next_batch` took, all calls together."""

    @property
    def tokens_per_batch(self) -> int:
        """See `BatchStream`."""
        return self._stream.tokens_per_batch

    @property
    def batches_per_epoch(self) -> int | None:
        """See `BatchStream`."""
        return self._stream.batches_per_epoch

    @property
    def padding_share(self) -> float:
        """See `BatchStream`."""
        return self._padding_share

    def set_weights(self, weights: Sequence[float]) -> None:
        """Mix the sources by other weights from the `ahead`-th batch after the last one taken."""
        due = self._taken + self._ahead
        self._weights = deque(entry for entry in self._weights if entry[0] != due)
        self._weights.append((due, list(weights)))

    def next_batch(self) -> Batch:
        """See `BatchStream`."""
        began = time.perf_counter()
        self._fill()
        drawn = self._ready.popleft().result()
        self._taken += 1
        self._state, self._padding_share = drawn.state, drawn.padding_share
        self._fill()
        self.seconds_waited += time.perf_counter() - began
        return drawn.batch

    def state_dict(self) -> dict[str, Any]:
        """See `BatchStream`: after the last batch that training has taken."""
        pending = [[due, weights] for due, weights in self._weights]
        return {"taken": self._taken, "weights": pending, "stream": self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BatchStream`."""
        # What the thread has drawn belongs to another place; let it finish before the stream moves.
        for drawn in self._ready:
            drawn.exception()
        self._ready.clear()
        self._stream.load_state_dict(state["stream"])
        self._taken = state["taken"]
        self._weights = deque((due, list(weights)) for due, weights in state["weights"])
        self._state, self._padding_share = state["stream"], self._stream.padding_share

    def close(self) -> None:
        """End the thread and the stream's workers."""
        self._pool.shutdown(cancel_futures=True)
        self._stream.close()

    def _fill(self) -> None:
        while len(self._ready) < self._ahead:
            number = self._taken + len(self._ready)
            due = [weights for at, weights in self._weights if at == number]
            self._ready.append(self._pool.submit(self._draw, due[0] if due else None))
        # Those that a saved state must still hold are the ones that the taken batches do not show.
        while self._weights and self._weights[0][0] < self._taken:
            self._weights.popleft()

    def _draw(self, weights: Sequence[float] | None) -> _Drawn:
        if weights is not None:
            self._stream.set_weights(weights)
        batch = self._stream.next_batch()
        if self._pins:
            batch = batch.pinned()
        # Counted here, where nobody waits for it.
        _ = batch.num_targets
        return _Drawn(batch, self._stream.state_dict(), self._stream.padding_share)
