"""Muon (Jordan et al. 2024; scaled as in arXiv:2502.16982): momentum whose every matrix is made nearly orthogonal.

For a matrix W [m, n] with gradient G:

    M <- momentum * M + (1 - momentum) * G
    U  = (1 - momentum) * G + momentum * M                          (Nesterov)
    O  = Newton-Schulz(U): five steps towards the nearest orthogonal matrix
    W <- W - lr * weight_decay * W - lr * 0.2 sqrt(max(m, n)) * O   (the RMS of a typical AdamW step)

On one process this is `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` bit for bit (tested); torch's own does not know
shards. Orthogonality is a property of the whole matrix, so each rank collects the rows of every w-th matrix, makes that
one orthogonal, and hands the rows back: two exchanges for w matrices, each matrix computed once, one held at a time. The
rows travel in the dtype of the iteration, which is what it would round them to.

The iteration runs in bfloat16 as usual; a run on a device that does not multiply bfloat16 takes float32 (on one AVX2 core
in a thirtieth of the time). A relative change of 1e-6 in its input moves its result by 1e-2, so two sharded runs drift apart
faster than their gradients do; `iteration_dtype=torch.float32` shows that this is all the difference.
"""

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
import torch.distributed
from torch import Tensor
from torch.optim import Optimizer

from wrinklefree.models.shards import Rows, row_range
from wrinklefree.training.local_shards import is_part, rows_of_local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic: steep at zero rather than exact at one (Jordan et al.)."""
ITERATIONS = 5
EPSILON = 1e-7


class ShardedMuon(Optimizer):
    """Muon over matrices of which each process holds some rows (or all)."""

    def __init__(
        self,
        params: list[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        iteration_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Take groups of matrices; `weight_decay` is decoupled, as AdamW's."""
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._iteration_dtype = iteration_dtype

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every matrix that has a gradient; with shards, every rank at once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            world = torch.distributed.get_world_size() if any(is_part(p) for p in parameters) else 1
            for first in range(0, len(parameters), world):
                some = parameters[first : first + world]
                directions = self._orthogonalised([self._direction(p, group["momentum"]) for p in some], some)
                for parameter, direction in zip(some, directions, strict=True):
                    rows, columns = rows_of_local(parameter).shape
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)
        return loss

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """The Nesterov momentum of this rank's rows."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)

    def _orthogonalised(self, directions: Sequence[Tensor], parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """This rank's rows of each matrix made orthogonal; matrix i is the work of rank i."""
        if not any(is_part(parameter) for parameter in parameters):
            return [newton_schulz(direction, self._iteration_dtype) for direction in directions]
        rows = [rows_of_local(parameter) for parameter in parameters]
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        here = [direction.numel() for direction in directions] + [0] * (world - len(directions))
        there = [0] * world
        if rank < len(directions):
            there = [_elements(rows[rank], number, world) for number in range(world)]
        sent = torch.cat([direction.to(self._iteration_dtype).flatten() for direction in directions])
        mine = sent.new_empty(sum(there))
        torch.distributed.all_to_all_single(mine, sent, there, here)
        if rank < len(directions):
            mine = newton_schulz(mine.view(rows[rank].shape), self._iteration_dtype).flatten()
        torch.distributed.all_to_all_single(sent, mine.contiguous(), here, there)
        return [
            part.view_as(direction)
            for part, direction in zip(sent.split(here[: len(directions)]), directions, strict=True)
        ]


def newton_schulz(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The matrix with all singular values moved near 1, computed and returned in `dtype`."""
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype=dtype, copy=True)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    # Frobenius bounds the spectral norm.
    x.div_(x.norm().clamp(min=EPSILON))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _elements(rows: Rows, rank: int, world: int) -> int:
    """How many elements of a matrix a rank holds."""
    start, end = row_range(rows.shape[0], rank, world)
    return (end - start) * rows.shape[1]
