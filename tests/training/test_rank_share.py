"""Every row of a step on exactly one rank, in order; a position that any number of ranks continues."""

from typing import Any

import pytest
import torch

from wrinklefree.models.records import Batch
from wrinklefree.training.rank_share import RankShare
from wrinklefree.utils.errors import ConfigError


class Numbered:
    """Rows that hold their number."""

    batches_per_epoch = 7
    padding_share = 0.25

    def __init__(self, rows: int) -> None:
        self.rows, self.served = rows, 0

    @property
    def tokens_per_batch(self) -> int:
        return self.rows * 2

    def next_batch(self) -> Batch:
        ids = torch.arange(self.served, self.served + self.rows)[:, None].expand(-1, 2)
        self.served += self.rows
        return Batch(ids, ids, ids, ids)

    def state_dict(self) -> dict[str, Any]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.served = state["served"]


def share(rows: int, accumulation: int, rank: int, world: int) -> RankShare:
    return RankShare(Numbered(rows), accumulation_steps=accumulation, rows=rows, rank=rank, world_size=world)


def numbers(share: RankShare) -> list[list[int]]:
    """Rows of each micro-batch of a step."""
    return [share.next_batch().input_ids[:, 0].tolist() for _ in range(share.micro_batches)]


@pytest.mark.parametrize(
    ("rows", "accumulation", "world", "micro_batches"),
    [(8, 1, 2, 1), (8, 1, 3, 1), (4, 4, 2, 2), (4, 4, 8, 1), (1, 8, 4, 2), (2, 5, 3, 2), (6, 2, 1, 2)],
)
def test_a_step_is_dealt_out_whole(rows: int, accumulation: int, world: int, micro_batches: int) -> None:
    shares = [share(rows, accumulation, rank, world) for rank in range(world)]
    for step in range(2):
        dealt = [numbers(one) for one in shares]
        assert all(len(parts) == micro_batches for parts in dealt)
        assert all(1 <= len(part) <= rows for parts in dealt for part in parts)
        total = rows * accumulation
        everything = [row for parts in dealt for part in parts for row in part]
        assert everything == list(range(step * total, (step + 1) * total))


def test_the_position_is_that_of_the_whole_stream_and_serves_other_numbers_of_ranks() -> None:
    first = share(4, 2, 1, 2)
    numbers(first)
    state = first.state_dict()
    assert state == {"served": 8}
    others = [share(4, 2, rank, 4) for rank in range(4)]
    for other in others:
        other.load_state_dict(state)
    assert [numbers(other) for other in others] == [[[8, 9]], [[10, 11]], [[12, 13]], [[14, 15]]]
    assert (first.tokens_per_batch, first.batches_per_epoch, first.padding_share) == (8, 7, 0.25)


def test_a_step_half_read_has_no_position() -> None:
    one = share(2, 4, 0, 2)
    one.next_batch()
    with pytest.raises(RuntimeError, match="a step half read"):
        one.state_dict()


def test_fewer_rows_than_processes_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"a step has 3 rows \(training.batch_size=3 x .*=1\) and there are 4 processes"
    ):
        share(3, 1, 0, 4)


def test_rows_that_some_rank_could_not_spread_over_its_micro_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 rows a step cannot be spread over 3 processes in 3 micro-batches each"):
        share(1, 8, 0, 3)
