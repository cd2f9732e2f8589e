"""APOLLO and APOLLO-Mini (arXiv:2412.05270, algorithm 1): AdamW's step size from a random low-rank sketch.

For a matrix W of shape [m, n] with m <= n (otherwise everything is transposed), gradient G and rank r:

    P ~ N(0, 1/r), [r, m], drawn anew every `update_projection_every` steps
    R = P G
    M, V = AdamW's moments of R, bias-corrected;  N = M / (sqrt(V) + eps)
    channel scaling (APOLLO):       s_j = |N[:, j]| / |R[:, j]|, one for each of the n channels
    tensor scaling (APOLLO-Mini):   s = |N| / |R|, with r = 1
    U = alpha * G * s, its norm limited to 1.01 times that of the previous step
    W <- W - lr * (U + weight_decay * W)

The state is 2 r n numbers instead of AdamW's 2 m n.

alpha is sqrt(m / r). A column of N holds r numbers of size about 1 and P keeps lengths on average, so G * s has columns
of length sqrt(r) where AdamW's have sqrt(m) (the same ratio as in the paper's analysis of the scaling factors). With
this alpha one learning rate means the same step length here and in AdamW; the paper tunes a constant instead.

With r >= m a projection saves nothing: R is G itself, and the method is AdamW with one step size a channel.

Where each process holds some rows of W, the sketch of a wide matrix is a sum over rows, hence one all-reduce of r n
numbers, and every process keeps all of it; of a tall one each process sketches the channels that it has. Norms over the
whole matrix are sums of squares over processes. Nothing of the size of W is exchanged.

A projection depends only on (seed, index of the parameter, number of the period). It is drawn on the CPU, so that it is
the same on every device, kept between draws, and left out of the state: a resumed run draws the same one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.optim import Optimizer

from wrinklefree.models.shards import Rows
from wrinklefree.training.local_shards import is_part, rows_of_local

GROWTH_LIMIT = 1.01
"""Largest ratio of an update's norm to the previous one's (the paper's gamma)."""


class Apollo(Optimizer):
    """APOLLO (`scaling="channel"`) or APOLLO-Mini (`scaling="tensor"`, rank 1) over matrices."""

    def __init__(
        self,
        params: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        rank: int,
        scaling: Literal["channel", "tensor"],
        update_projection_every: int,
        seed: int,
    ) -> None:
        """Take groups of 2-D parameters; `weight_decay` is decoupled, as AdamW's."""
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "scaling": scaling,
            "update_projection_every": update_projection_every,
            "seed": seed,
        }
        super().__init__(params, defaults)
        self._projections: dict[int, tuple[int, Tensor]] = {}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, index, group)
                index += 1
        return loss

    def projection_bytes(self) -> int:
        """Bytes of the projections kept between draws."""
        return sum(p.numel() * p.element_size() for _, p in self._projections.values())

    def _update(self, parameter: Tensor, gradient: Tensor, index: int, group: dict[str, Any]) -> None:
        rows = rows_of_local(parameter)
        is_wide = rows.shape[0] <= rows.shape[1]
        wide = gradient if is_wide else gradient.T
        size = min(rows.shape)  # m: of the whole matrix, of which `wide` may be some rows or some columns
        rank = min(group["rank"], size)
        cut = is_part(parameter)
        state = self.state[parameter]
        if not state:
            # On the CPU, like torch's own optimizers: reading it does not wait for the device.
            state["step"] = torch.zeros((), dtype=torch.float32)
            # A tall matrix's channels are its rows, so they are cut as it is; a wide one's are all here.
            state["exp_avg"] = wide.new_zeros(rank, wide.shape[1])
            state["exp_avg_sq"] = wide.new_zeros(rank, wide.shape[1])
            state["update_norm"] = wide.new_zeros(())
        period = int(state["step"]) // group["update_projection_every"]
        state["step"] += 1
        step = int(state["step"])

        if rank == size:
            sketch = _all_rows(wide, rows) if cut and is_wide else wide
        else:
            projection = self._projection(wide, rank, size, index, period, group["seed"])
            sketch = (projection[:, rows.start : rows.stop] if cut and is_wide else projection) @ wide
            if cut and is_wide:
                torch.distributed.all_reduce(sketch)
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(sketch, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(sketch, sketch, value=1 - beta2)
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        normalized = (state["exp_avg"] / (1 - beta1**step)).div_(denominator)

        tiny = torch.finfo(sketch.dtype).tiny  # only an all-zero gradient has this small a norm: its update is 0
        if group["scaling"] == "channel":
            norms = [torch.linalg.vector_norm(values, dim=0) for values in (normalized, sketch)]
        else:
            norms = _norms([normalized, sketch], over_processes=cut and not is_wide)
        update = wide * (norms[0] / norms[1].clamp(min=tiny) * math.sqrt(size / rank))

        [norm], previous = _norms([update], over_processes=cut), state["update_norm"]
        limit = torch.where(previous > 0, GROWTH_LIMIT * previous, norm)
        factor = (limit / norm.clamp(min=tiny)).clamp(max=1.0)
        state["update_norm"] = norm * factor
        update *= factor

        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update if is_wide else update.T, alpha=-group["lr"])

    def _projection(self, wide: Tensor, rank: int, size: int, index: int, period: int, seed: int) -> Tensor:
        kept = self._projections.get(index)
        if kept is None or kept[0] != period:
            kept = (period, draw_projection(rank, size, seed, index, period).to(wide.device, wide.dtype))
            self._projections[index] = kept
        return kept[1]


def _norms(values: Sequence[Tensor], *, over_processes: bool) -> list[Tensor]:
    """Frobenius norms; of matrices that lie in parts on all processes, where told."""
    norms = [torch.linalg.vector_norm(value) for value in values]
    if not over_processes:
        return norms
    squares = torch.stack(norms).square()
    torch.distributed.all_reduce(squares)
    return list(squares.sqrt().unbind())


def _all_rows(here: Tensor, rows: Rows) -> Tensor:
    """The whole matrix out of every process's rows."""
    whole = here.new_zeros(rows.shape)
    whole[rows.start : rows.stop] = here
    torch.distributed.all_reduce(whole)
    return whole


def draw_projection(rank: int, size: int, seed: int, index: int, period: int) -> Tensor:
    """The [rank, size] projection of one parameter in one period: independent normals of variance 1 / rank."""
    mixed = int(np.random.SeedSequence([seed, index, period]).generate_state(1, np.uint64)[0])
    return torch.randn(rank, size, generator=torch.Generator().manual_seed(mixed)) / math.sqrt(rank)
