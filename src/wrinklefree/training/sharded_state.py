"""What a checkpoint holds of model and optimizer when each process has only its rows, and how it comes back.

Model and optimizer are saved under the names that one process uses, as stretches of whole tensors: a run begun on two
processes goes on with one or with four. State that cannot be cut elsewhere (8-bit blocks straddle the borders of rows) is
kept for each rank and comes back for the same number of processes only.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wrinklefree.models.shards import Rows, is_sharded, rows_here
from wrinklefree.training.local_shards import rows_of_local
from wrinklefree.utils.checkpoint import Checkpoint
from wrinklefree.utils.distributed import rank, world_size
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.sharded_checkpoint import Part
from wrinklefree.utils.training_state import pack_optimizer_state, unpack_optimizer_state

_STATE_NAME = re.compile(r"optimizer/state/(\d+)/(\w+)")
_ELEMENTWISE = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
"""State of a parameter's shape."""


def is_cut(model: nn.Module) -> bool:
    """Whether this process holds a part of the model only."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def model_parts(model: nn.Module) -> dict[str, Part]:
    """This rank's rows of every parameter, under the parameter's name."""
    return {name: _row_part(rows_here(parameter)) for name, parameter in model.named_parameters()}


def load_model_parts(model: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    """Fill this rank's rows from tensors named `prefix` + parameter name.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape.
    """
    tensors = checkpoint.tensors
    parameters = {f"{prefix}{name}": rows_here(parameter) for name, parameter in model.named_parameters()}
    saved = {name for name in tensors if name.startswith(prefix)}
    wrong = sorted(saved ^ parameters.keys()) or [n for n, rows in parameters.items() if tensors.shape(n) != rows.shape]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: {len(wrong)} tensors differ (first: {wrong[0]})"
        )
    with torch.no_grad():
        for name, rows in parameters.items():
            rows.local.copy_(tensors.part(name, 0, rows.start, rows.stop))


def optimizer_parts(optimizer: Optimizer) -> tuple[dict[str, Tensor | Part], dict[str, Any]]:
    """This rank's part of the optimizer's state, and the JSON-able rest, which is the same on every rank."""
    tensors, state = pack_optimizer_state(optimizer)
    cuts = _Cuts(optimizer)
    parts: dict[str, Tensor | Part] = {}
    for name, tensor in tensors.items():
        if cuts.is_private(name):
            parts[_private_name(name)] = Part(tensor, 0, 0, tuple(tensor.shape))
            continue
        cut = cuts.find(name)
        parts[name] = tensor if cut is None else cut.part(tensor)
    return parts, state


def load_optimizer_parts(optimizer: Optimizer, checkpoint: Checkpoint, prefix: str, state: Mapping[str, Any]) -> None:
    """Load what `optimizer_parts` gave, on any number of processes; names in the checkpoint begin with `prefix`.

    Raises:
        CheckpointError: the state is of another optimizer, or is kept by rank and there are other ranks now.
    """
    unpack_optimizer_state(optimizer, _StatesHere(checkpoint, prefix, _Cuts(optimizer)), state)


class _Cut:
    """The stretch of a state tensor that belongs to this rank."""

    def __init__(self, dim: int, rows: Rows) -> None:
        self.dim, self.rows = dim, rows

    def part(self, tensor: Tensor) -> Part:
        shape = list(tensor.shape)
        shape[self.dim] = self.rows.shape[0]
        return Part(tensor, self.dim, self.rows.start, tuple(shape))


class _Cuts:
    """Which state tensors of an optimizer are cut, and where."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._parameters = [
            (rows_of_local(parameter), group) for group in optimizer.param_groups for parameter in group["params"]
        ]
        # Influence wraps the optimizer that holds the state.
        self._in_blocks = type(getattr(optimizer, "base", optimizer)).__name__ == "AdamW8bit"

    def is_private(self, name: str) -> bool:
        """Whether the tensor makes sense on this rank of this many only."""
        return self._in_blocks and world_size() > 1 and name.startswith("optimizer/state/")

    def find(self, name: str) -> _Cut | None:
        """None: the tensor is whole on every rank."""
        match = _STATE_NAME.fullmatch(name)
        if match is None or match[2] not in _ELEMENTWISE:
            return None
        rows, group = self._parameters[int(match[1])]
        if "scaling" in group:
            # APOLLO's sketches: their columns are the rows of a tall matrix; of a wide one every rank has them all.
            return _Cut(1, rows) if rows.shape[0] > rows.shape[1] else None
        return _Cut(0, rows)


class _StatesHere(Mapping[str, Tensor]):
    """The optimizer tensors of a checkpoint as this rank needs them, under the names that `pack` gave."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, cuts: _Cuts) -> None:
        self._checkpoint, self._prefix, self._cuts = checkpoint, prefix, cuts

    def __getitem__(self, name: str) -> Tensor:
        tensors = self._checkpoint.tensors
        if self._cuts.is_private(name):
            private = f"{self._prefix}{_private_name(name)}"
            if private not in tensors:
                raise self._written_by_others()
            return tensors[private]
        full = f"{self._prefix}{name}"
        if full not in tensors:
            if any(other.startswith(f"{full}@") for other in tensors):
                raise self._written_by_others()
            raise KeyError(name)
        cut = self._cuts.find(name)
        return tensors[full] if cut is None else tensors.part(full, cut.dim, cut.rows.start, cut.rows.stop)

    def _written_by_others(self) -> CheckpointError:
        return CheckpointError(
            f"{self._checkpoint.path} was not written by {world_size()} processes, and the state of 8-bit AdamW can be read "
            "by as many as wrote it only: use that number, or start afresh with skip_recovery=true"
        )

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        full, tensors = f"{self._prefix}{name}", self._checkpoint.tensors
        return self._cuts.is_private(name) or full in tensors or any(n.startswith(f"{full}@") for n in tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(name.removeprefix(self._prefix) for name in self._checkpoint.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)


def _private_name(name: str) -> str:
    return f"{name}@{rank()}of{world_size()}"


def _row_part(rows: Rows) -> Part:
    return Part(rows.local, 0, rows.start, rows.shape)
