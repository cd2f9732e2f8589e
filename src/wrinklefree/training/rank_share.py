"""One global batch for any number of processes: every rank reads the same rows and trains on its share of them.

The rows of a step, and so the run, do not depend on how many processes there are: `batch_size` times
`gradient_accumulation_steps` rows a step whoever computes them. Losses are sums over counts of the whole step, so it does
not matter either how the rows are spread. A checkpoint's data position is one for all ranks, and a run may go on with
more or fewer of them.

The price: each rank reads and packs the rows of all. Where that becomes the bottleneck, prepare the data once as token
files, which cost next to nothing to read.
"""

from dataclasses import fields
from typing import Any

import torch

from wrinklefree.data.streams import BatchStream
from wrinklefree.models.records import Batch
from wrinklefree.utils.errors import ConfigError


class RankShare:
    """This rank's part of each step of a stream that all ranks read alike; itself a `BatchStream`."""

    def __init__(self, stream: BatchStream, *, accumulation_steps: int, rows: int, rank: int, world_size: int) -> None:
        """Share out.

        Args:
            stream: Opened alike on every rank.
            accumulation_steps: Batches of the stream that make a step.
            rows: Rows of one of them.
            rank: This process.
            world_size: All processes.

        Raises:
            ConfigError: a step has fewer rows than there are processes.
        """
        total = accumulation_steps * rows
        if total < world_size:
            raise ConfigError(
                f"a step has {total} rows (training.batch_size={rows} x "
                f"training.gradient_accumulation_steps={accumulation_steps}) and there are {world_size} processes: "
                "raise one of the two, or use fewer processes"
            )
        self._stream = stream
        self._batches_a_step = accumulation_steps
        self._first, self._end = _share(total, rank, world_size)
        self._waiting: list[Batch] = []
        largest = -(-total // world_size)
        self.micro_batches = -(-largest // rows)
        """Micro-batches a step: the same on every rank, since every one gathers and reduces."""
        if total // world_size < self.micro_batches:
            raise ConfigError(
                f"{total} rows a step cannot be spread over {world_size} processes in {self.micro_batches} micro-batches "
                f"each; make training.batch_size x training.gradient_accumulation_steps a multiple of {world_size}"
            )

    @property
    def tokens_per_batch(self) -> int:
        """See `BatchStream`; of the whole stream."""
        return self._stream.tokens_per_batch

    @property
    def batches_per_epoch(self) -> int | None:
        """See `BatchStream`; of the whole stream."""
        return self._stream.batches_per_epoch

    @property
    def padding_share(self) -> float:
        """See `BatchStream`; of the whole stream."""
        return self._stream.padding_share

    def next_batch(self) -> Batch:
        """This rank's next micro-batch; the first of a step reads all rows of the step."""
        if not self._waiting:
            batches = [self._stream.next_batch() for _ in range(self._batches_a_step)]
            mine = _rows_of(batches, self._first, self._end)
            sizes = [_share(self._end - self._first, part, self.micro_batches) for part in range(self.micro_batches)]
            self._waiting = [_rows_of([mine], first, end) for first, end in sizes]
        return self._waiting.pop(0)

    def state_dict(self) -> dict[str, Any]:
        """See `BatchStream`; the same on every rank. Only between steps."""
        if self._waiting:
            raise RuntimeError("the position of a step half read cannot be saved")
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `BatchStream`; the state may be of any number of processes."""
        self._waiting = []
        self._stream.load_state_dict(state)


def _share(rows: int, part: int, parts: int) -> tuple[int, int]:
    """First row of a part and the one after its last; parts differ by one row at most."""
    return part * rows // parts, (part + 1) * rows // parts


def _rows_of(batches: list[Batch], first: int, end: int) -> Batch:
    return Batch(**{f.name: torch.cat([getattr(b, f.name) for b in batches])[first:end] for f in fields(Batch)})
