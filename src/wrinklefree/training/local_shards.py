"""The optimizer's side of sharding: this rank's rows of each parameter as ordinary tensors.

Element-wise optimizers (AdamW, bitsandbytes' 8-bit one) then need to know nothing of sharding, and no `DTensor` is
dispatched in the update. On one process a parameter is its own local part, and nothing here costs anything.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from wrinklefree.models.shards import Rows, is_sharded, rows_here
from wrinklefree.utils.distributed import world_size


def local_parameter(parameter: Tensor) -> Tensor:
    """This rank's rows of a sharded parameter as a parameter of their own (the same one each time), else itself.

    It shares the rows' memory: who updates it updates the model. `hand_gradients_over` gives it its gradient.
    """
    if not is_sharded(parameter):
        return parameter
    owner: Any = parameter
    local = getattr(owner, "local_parameter", None)
    if local is None:
        rows = rows_here(parameter)
        local = nn.Parameter(rows.local, requires_grad=parameter.requires_grad)
        cast("Any", local).first_row, cast("Any", local).whole_shape = rows.start, rows.shape
        owner.local_parameter = local
    return cast("Tensor", local)


def is_part(parameter: Tensor) -> bool:
    """Whether other processes hold the other rows of a local parameter (which may be none, or all, on this one)."""
    return hasattr(parameter, "whole_shape") and world_size() > 1


def rows_of_local(parameter: Tensor) -> Rows:
    """Where the rows of a local parameter stand in the whole one."""
    local: Any = parameter
    if not hasattr(local, "whole_shape"):
        return Rows(parameter.detach(), 0, tuple(parameter.shape))
    return Rows(parameter.detach(), local.first_row, local.whole_shape)


def hand_gradients_over(parameters: Iterable[Tensor]) -> None:
    """Let the local parameters have the shards of the gradients."""
    for parameter in parameters:
        if is_sharded(parameter):
            local, held = local_parameter(parameter), rows_here(parameter).local
            assert local.data_ptr() == held.data_ptr(), "the shard moved after the optimizer was built"
            local.grad = None if parameter.grad is None else rows_here(parameter.grad).local


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale gradients so that their norm over all parameters and ranks is at most `max_norm`; returns the norm before.

    A norm that is not finite makes all gradients so: the caller skips the update.
    """
    if not any(is_sharded(parameter) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    locals_ = [rows_here(parameter.grad).local for parameter in parameters if parameter.grad is not None]
    filled = [gradient for gradient in locals_ if gradient.numel()]
    # Squares are summed in float64: the result then does not depend on how the rows are cut.
    device = torch.device("cpu")
    norms = [torch.linalg.vector_norm(gradient).double().square().to(device) for gradient in filled]
    square = torch.stack(norms).sum() if norms else torch.zeros((), dtype=torch.float64)
    torch.distributed.all_reduce(square)
    norm = square.sqrt()
    factor = float((max_norm / (norm + 1e-6)).clamp(max=1.0))
    if filled:
        for gradient in filled:
            gradient.mul_(factor)
    return norm.float()
