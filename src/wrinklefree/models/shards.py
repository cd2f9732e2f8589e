"""Which part of a parameter this process holds.

Sharded parameters are cut by rows: rank r of w holds the r-th of w equal stretches of the first dimension, the last
ones shorter or empty. Alone, a process holds all rows, and nothing here knows the difference.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of a parameter that lie here."""

    local: Tensor
    """The values; shares the parameter's memory, carries no gradient. Empty where this rank got no row."""
    start: int
    """Index of the first of them."""
    shape: tuple[int, ...]
    """Of the whole parameter."""

    @property
    def stop(self) -> int:
        """Index after the last of them."""
        return self.start + (self.local.shape[0] if self.local.ndim else 0)

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the parameter."""
        return tuple(self.local.shape) == self.shape


def is_sharded(parameter: Tensor) -> bool:
    """Whether other processes hold parts of it."""
    return hasattr(parameter, "_local_tensor")


def rows_here(parameter: Tensor) -> Rows:
    """The rows of a parameter, or of its gradient, that this process holds."""
    if not is_sharded(parameter):
        return Rows(parameter.detach(), 0, tuple(parameter.shape))
    sharded: Any = parameter
    local = cast("Tensor", sharded._local_tensor).detach()
    mesh = sharded.device_mesh
    start, _ = row_range(parameter.shape[0], mesh.get_local_rank(), mesh.size())
    return Rows(local, start, tuple(parameter.shape))


def row_range(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """First row of a rank and the one after its last, cut as `torch.chunk` cuts."""
    size = -(-rows // world_size)
    return min(rank * size, rows), min((rank + 1) * size, rows)


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """All rows of a parameter, gathered from the ranks that hold them: every rank must call it."""
    if not is_sharded(parameter):
        return parameter.detach()
    sharded: Any = parameter
    return cast("Tensor", sharded.full_tensor()).detach()
