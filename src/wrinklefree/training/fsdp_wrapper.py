"""Sharded training: parameters, gradients and optimizer state cut over the ranks (FSDP2, one group a block).

`shard` cuts a model; afterwards each parameter is a `DTensor` of which this rank holds some rows, gathered whole around
the forward and backward pass of its block. What differs from the usual:

- Gradients are *sums* over ranks, never means: every loss term is a sum divided by a count of the whole step already
  (see `distillation.objective`).
- Masters and the reduction of gradients are float32. Matrices of full-precision blocks are gathered in the compute
  dtype, which is what autocast would round them to; norm gains and biases, the embedding and the head in float32, as
  one process uses them. Ternary weights are gathered as codes where that is possible (`code_gather`), else in float32.
- The embedding, the head and the final norm form the outermost group, which stays gathered from the forward pass to
  the end of the backward pass, because losses read the head in chunks after the model has returned.

The optimizer sees none of this: it updates this rank's rows as ordinary tensors (`local_shards`).
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from wrinklefree.models.bitlinear import BitLinear
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import ModelOutput
from wrinklefree.training.code_gather import CodeGather
from wrinklefree.training.config import DistributedConfig
from wrinklefree.training.device import Compute
from wrinklefree.utils.distributed import world_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sharding:
    """How a model is cut."""

    mesh: DeviceMesh
    compute_dtype: torch.dtype
    reshard_after_forward: bool = True
    """Give a block's gathered weights back between forward and backward pass, and gather them twice."""
    prefetch_blocks: int = 0
    """Blocks gathered ahead of the one that computes; 0 leaves it to FSDP (the next one, in the backward pass)."""
    offload: bool = False
    """Keep shards, their gradients and the optimizer's state on the CPU, and update there."""
    gather_codes: bool = True
    """Gather ternary weights as 2-bit codes where lambda is 1 and the rows divide evenly."""


def sharding_for(config: DistributedConfig, compute: Compute) -> Sharding:
    """What the `distributed` group asks for, over all processes of the group."""
    return Sharding(
        mesh=init_device_mesh(compute.device.type, (world_size(),), mesh_dim_names=("shard",)),
        compute_dtype=compute.dtype,
        reshard_after_forward=config.reshard_after_forward,
        prefetch_blocks=config.prefetch_blocks if config.prefetch else 0,
        offload=config.optimizer_offload,
        gather_codes=config.gather == "auto",
    )


def shard(model: CausalLM, sharding: Sharding) -> CodeGather | None:
    """Cut `model` in place, each block a group; returns who keeps gathered ternary codes up to date, if anybody must.

    A model on the meta device stays there: give it memory with `materialise`, then fill `rows_here` of each parameter.
    """
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if sharding.offload else OffloadPolicy()
    options: dict[str, Any] = {"mesh": sharding.mesh, "offload_policy": offload}
    ternary = {id(module.weight) for module in model.modules() if isinstance(module, BitLinear)}
    lowered = sharding.compute_dtype if sharding.compute_dtype.itemsize < model.head_weight.dtype.itemsize else None

    def gathered_dtype(parameter: nn.Parameter) -> torch.dtype | None:
        return parameter.dtype if parameter.ndim < 2 or id(parameter) in ternary else None

    reduced = torch.promote_types(torch.float32, model.head_weight.dtype)
    outer = MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)
    inner = replace(outer, param_dtype=lowered, param_dtype_override_fn=gathered_dtype)
    for block in model.blocks:
        fully_shard(block, mp_policy=inner, reshard_after_forward=sharding.reshard_after_forward, **options)
    # FSDP hooks every tensor of an output that has a gradient. The head's weight is one, but lives on: hooks on it
    # would pile up. So it is taken out of the output before FSDP looks, and put back afterwards.
    model.register_forward_hook(_hide_head)
    fully_shard(model, mp_policy=outer, reshard_after_forward=False, **options)
    model.register_forward_hook(_show_head)
    # Attention states leave a block as views; nobody writes into them, which is what FSDP warns about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for group in _groups(model):
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)
    _prefetch(cast("Sequence[FSDPModule]", model.blocks), sharding.prefetch_blocks)
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.keeps_codes = False
    if not ternary or not sharding.gather_codes or sharding.mesh.size() == 1:
        return None
    if sharding.offload and sharding.mesh.device_type != "cpu":
        logger.info("ternary weights are gathered in float32: their masters lie on the CPU (optimizer_offload)")
        return None
    return CodeGather(model, sharding.mesh, sharding.compute_dtype)


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give a sharded model on the meta device memory for its shards, without values."""
    # Buffers were never on the meta device, and `to_empty` would take their values.
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])


def reshard(model: nn.Module) -> None:
    """Put every parameter back to its shard: after a forward pass without a backward pass some are gathered still."""
    for group in _groups(model):
        group.reshard()


def _groups(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _prefetch(blocks: Sequence[FSDPModule], ahead: int) -> None:
    if ahead == 0:
        return
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(list(blocks[index + 1 : index + 1 + ahead]))
        block.set_modules_to_backward_prefetch(list(reversed(blocks[max(0, index - ahead) : index])))


def _hide_head(model: nn.Module, inputs: tuple[Any, ...], output: ModelOutput) -> ModelOutput:
    return replace(output, head_weight=output.head_weight.detach())


def _show_head(model: nn.Module, inputs: tuple[Any, ...], output: ModelOutput) -> ModelOutput:
    return replace(output, head_weight=cast("CausalLM", model).head_weight)
