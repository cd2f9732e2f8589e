"""The few things ranks tell each other. Without a process group every function returns its argument."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cheapertraining.errors import CheaperTrainingError

Group = Any
"""A `torch.distributed.ProcessGroup`; None is the default group."""


def world_size(group: Group) -> int:
    """Ranks of the group; 1 where nothing is initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def agree(description: Any, error: str | None, group: Group) -> None:
    """Every rank learns whether all are fine and describe the same thing, before any of them waits for another.

    Raises:
        CheaperTrainingError: on every rank, when one has an error or the descriptions differ.
    """
    everyone: list[Any] = [(description, error)]
    if world_size(group) > 1:
        everyone = [None] * world_size(group)
        dist.all_gather_object(everyone, (description, error), group=group)
    for rank, (_, message) in enumerate(everyone):
        if message is not None:
            raise CheaperTrainingError(message if len(everyone) == 1 else f"rank {rank}: {message}")
    for rank, (theirs, _) in enumerate(everyone):
        if theirs != everyone[0][0]:
            raise CheaperTrainingError(
                f"rank {rank} scores {theirs}, rank 0 scores {everyone[0][0]}: every rank must draw equally many batches"
            )


def gather_rows(values: Tensor, group: Group) -> Tensor:
    """[n, ...] of every rank, in the order of ranks: [world * n, ...]."""
    world = world_size(group)
    if world == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts)


def from_first_rank(value: Any, group: Group) -> Any:
    """Rank 0's object on every rank: the same bits, whatever the ranks' machines round."""
    if world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]
