"""Which process this is, and decisions that all processes share.

No rank ever decides alone: two ranks that look at a folder a moment apart may see different things, and a run in
which one rank skips while the others train hangs.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import torch.distributed

from wrinklefree.utils.errors import WrinkleFreeError

Decision = TypeVar("Decision")


def _initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """This process's number; before the process group exists, the launcher's word for it."""
    return torch.distributed.get_rank() if _initialised() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together; before the process group exists, the launcher's word for it."""
    return torch.distributed.get_world_size() if _initialised() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes files and speaks to the user."""
    return rank() == 0


def decide_on_rank_zero(decide: Callable[[], Decision]) -> Decision:
    """Call `decide` on rank 0 only and return its result on every rank.

    When it raises, every rank raises: rank 0 its own error, the others the same if it is one of ours (so that all end
    with one exit code), else a `RuntimeError` that quotes it.
    """
    if world_size() == 1:
        return decide()
    if not _initialised():
        raise RuntimeError(f"WORLD_SIZE is {world_size()}, but the process group is not initialised yet")
    outcome: list[tuple[Decision | None, BaseException | None]] = [(None, None)]
    if not is_main():
        torch.distributed.broadcast_object_list(outcome, src=0)
        result, error = outcome[0]
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]  # rank 0 sent either an error or a Decision
    try:
        decision = decide()
    except BaseException as error:
        told = error if isinstance(error, WrinkleFreeError) else RuntimeError(f"rank 0 failed: {error!r}")
        torch.distributed.broadcast_object_list([(None, told)], src=0)
        raise
    torch.distributed.broadcast_object_list([(decision, None)], src=0)
    return decision
