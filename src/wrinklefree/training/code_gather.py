"""Ternary weights travel as 2-bit codes: a sixteenth of the bytes of float32 masters, an eighth of bfloat16.

In the forward pass a BitLinear reads the codes of its weight and one scale, so nothing else need be gathered. After
each update every rank sums |W| over its rows, one all-reduce for all layers makes scales of the sums, and each rank
rounds its rows and packs the codes, once a step. FSDP asks a shard's tensor what to send (`fsdp_pre_all_gather`) and
what to make of what arrived (`fsdp_post_all_gather`); here that is the packed codes, and codes in the compute dtype.
The gradient with respect to the gathered codes is the one with respect to the weight: the rounding's is the identity.

The scale is the sum in float64 over the ranks, divided by the number of weights: the mean of |W| correctly rounded.
One process sums in float32, so the two can differ in the last bit.

Full precision is gathered instead while lambda is below 1, and for weights whose rows do not divide evenly over the
ranks, which FSDP pads to a size that packed rows cannot have.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from wrinklefree.models.bitlinear import BitLinear
from wrinklefree.models.llama import CausalLM
from wrinklefree.quantization.packing import pack_codes, unpack_codes
from wrinklefree.quantization.weight_quant import MIN_WEIGHT_SCALE, round_to_codes


@dataclass
class _CodedWeight:
    """One BitLinear's weight: its shard, and what of it is sent."""

    layer: BitLinear
    parameter: Any
    """FSDP's record of the parameter."""
    compute_dtype: torch.dtype
    packed: Tensor
    """uint8 [rows here, ceil(columns / 4)]; refreshed with each update."""
    scale: Tensor
    """float32, 0-dimensional; the layer's `gathered_scale` while codes are gathered."""

    @property
    def master(self) -> Tensor:
        """float32 [rows here, columns]."""
        return cast("Tensor", self.parameter.sharded_param._local_tensor)

    def start(self) -> None:
        """Let FSDP gather codes from now on."""
        master: Any = self.master
        master.fsdp_pre_all_gather = MethodType(self._pre_all_gather, master)
        master.fsdp_post_all_gather = MethodType(self._post_all_gather, master)
        master.fsdp_should_release_all_gather_outputs_after_post_all_gather = lambda: True
        self.layer.gathered_scale = self.scale
        self._forget_gathered()

    def stop(self) -> None:
        """Let FSDP gather the masters again."""
        master: Any = self.master
        del master.fsdp_pre_all_gather, master.fsdp_post_all_gather
        del master.fsdp_should_release_all_gather_outputs_after_post_all_gather
        self.layer.gathered_scale = None
        self._forget_gathered()

    def _forget_gathered(self) -> None:
        """FSDP makes its buffers for one kind of content; let it make them anew."""
        self.parameter._init_extensions()
        self.parameter.all_gather_outputs = []
        if hasattr(self.parameter, "_unsharded_param"):
            del self.parameter._unsharded_param

    def _pre_all_gather(
        self, master: Tensor, mesh: DeviceMesh, size: torch.Size, stride: Any, module: nn.Module, policy: Any
    ) -> tuple[tuple[Tensor], None]:
        return (self.packed,), None

    def _post_all_gather(
        self, master: Tensor, gathered: tuple[Tensor], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor]] | None:
        codes = unpack_codes(gathered[0], self.layer.in_features)
        if out is None:
            values = codes.to(self.compute_dtype)
            return values, (values,)
        # The same values as before the storage was freed: what autograd saved stays valid.
        unchanged: Any = cast("Any", torch.autograd)._unsafe_preserve_version_counter(out)
        with torch.no_grad(), unchanged:
            out.copy_(codes)
        return None


class CodeGather:
    """The ternary weights of a sharded model that travel as codes."""

    def __init__(self, model: CausalLM, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
        """Find them; nothing changes before `update`."""
        self._model = model
        self._group = mesh.get_group()
        self._active = False
        self._weights: list[_CodedWeight] = []
        for block in model.blocks:
            state: Any = cast("Any", fully_shard).state(block)
            for group in state._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    layer = parameter._module_info.module
                    is_weight = parameter._module_info.param_name == "weight"
                    if isinstance(layer, BitLinear) and is_weight and layer.out_features % mesh.size() == 0:
                        nothing = torch.empty(0)
                        self._weights.append(_CodedWeight(layer, parameter, compute_dtype, nothing, nothing))

    @property
    def layers(self) -> int:
        """How many weights can be gathered as codes."""
        return len(self._weights)

    @torch.no_grad()
    def update(self) -> None:
        """Call before the first forward pass and after whatever changes masters or lambda; every rank at once.

        All parameters must be sharded at that moment (`fsdp_wrapper.reshard`).
        """
        if not self._weights:
            return
        ready = all(weight.layer.fully_quantized for weight in self._weights)
        if ready:
            self._encode()
        if ready != self._active:
            for weight in self._weights:
                weight.start() if ready else weight.stop()
            self._active = ready

    def _encode(self) -> None:
        sums = torch.stack([weight.master.abs().sum(dtype=torch.float64) for weight in self._weights])
        torch.distributed.all_reduce(sums, group=self._group)
        for weight, total in zip(self._weights, sums.unbind(), strict=True):
            mean = total / (weight.layer.out_features * weight.layer.in_features)
            scale = mean.to(torch.promote_types(torch.float32, weight.master.dtype)).clamp(min=MIN_WEIGHT_SCALE)
            weight.packed = pack_codes(round_to_codes(weight.master, scale))
            weight.scale = scale
            if self._active:
                weight.layer.gathered_scale = scale
