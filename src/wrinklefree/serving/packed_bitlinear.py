"""`PackedBitLinear`: the CPU kernels as a drop-in module for anybody's net, two bits a weight, inference only.

What it computes is what `BitLinear` computes at lambda = 1: ternary codes times the input's 8-bit codes, both scales, the
bias. It takes any input that a linear layer takes; the arithmetic and the result are float32, returned in the input's dtype.
"""

import ctypes
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wrinklefree.models.bitlinear import BitLinear
from wrinklefree.native.library import LinearRecord, load_library
from wrinklefree.native.pack import COLUMNS, ROWS, pack_ternary, padded, unpack_ternary
from wrinklefree.native.runner import borrowed_runner
from wrinklefree.quantization.weight_quant import Ternary, ternarize
from wrinklefree.utils.errors import ConfigError, EngineError


class PackedBitLinear(nn.Module):
    """A linear layer whose weight is packed: `PackedBitLinear.pack(layer)` of a `BitLinear` or an `nn.Linear`."""

    tiles: Tensor
    bias: Tensor | None

    def __init__(
        self,
        ternary: Ternary,
        bias: Tensor | None = None,
        activation_bits: Literal[4, 8] | None = 8,
    ) -> None:
        """Pack codes [out_features, in_features]; `activation_bits` None stands in 15-bit codes for the input."""
        super().__init__()
        self.out_features, self.in_features = ternary.codes.shape
        self.activation_bits: Literal[4, 8] | None = activation_bits
        self.scale = float(ternary.scale)
        self.register_buffer("tiles", torch.from_numpy(pack_ternary(ternary.codes.cpu().numpy())))
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    @classmethod
    def pack(cls, layer: nn.Linear, activation_bits: Literal[4, 8] | None = 8) -> "PackedBitLinear":
        """The packed form of a layer, whose weight is ternarized; a `BitLinear` brings its own activation bits."""
        if isinstance(layer, BitLinear):
            return cls(layer.ternary(), layer.folded_bias(), layer.activation_bits)
        return cls(ternarize(layer.weight.detach()), layer.bias, activation_bits)

    @property
    def weight(self) -> Tensor:
        """The weight written out, codes times scale, float32 [out_features, in_features]."""
        codes = unpack_ternary(self.tiles.numpy(), self.out_features, self.in_features)
        return torch.from_numpy(codes).float() * self.scale

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features].

        Raises:
            ConfigError: the input is of another width or device, or a gradient is wanted.
        """
        if input.shape[-1] != self.in_features:
            raise ConfigError(f"the input has {input.shape[-1]} features, this layer takes {self.in_features}")
        if input.device.type != "cpu" or self.tiles.device.type != "cpu":
            raise ConfigError("PackedBitLinear runs on the CPU; move the layer and its input there")
        if input.requires_grad and torch.is_grad_enabled():
            raise ConfigError("PackedBitLinear has no backward pass; train with BitLinear, or open torch.no_grad()")
        rows = input.detach().reshape(-1, self.in_features).float().contiguous()
        output = torch.empty(len(rows), self.out_features)
        if len(rows):
            bias = None
            if self.bias is not None:
                bias = torch.zeros(padded(self.out_features))
                bias[: self.out_features] = self.bias
            _multiply(self, rows, bias, output)
        return output.to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation_bits={self.activation_bits}"
        )

    def get_extra_state(self) -> dict[str, Any]:
        """The scale belongs to a state dict, but not to what `half()` rounds."""
        return {"scale": self.scale}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """What `get_extra_state` gave."""
        self.scale = float(state["scale"])


def pack_bitlinears(model: nn.Module) -> int:
    """Replace every `BitLinear` inside a module by its packed form, in place; returns how many there were."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, BitLinear)
    ]
    for parent, name, child in found:
        setattr(parent, name, PackedBitLinear.pack(child))
    return len(found)


def _multiply(layer: PackedBitLinear, rows: Tensor, bias: Tensor | None, output: Tensor) -> None:
    record = LinearRecord(
        layer.tiles.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None,
        layer.scale,
        padded(layer.out_features, ROWS),
        padded(layer.in_features, COLUMNS),
    )
    code_max = 0 if layer.activation_bits is None else 2 ** (layer.activation_bits - 1) - 1
    with borrowed_runner() as runner:
        problem = load_library().wf_linear(
            runner,
            ctypes.byref(record),
            code_max,
            len(rows),
            rows.data_ptr(),
            layer.in_features,
            output.data_ptr(),
            layer.out_features,
        )
    if problem:
        raise EngineError(f"the CPU engine refused {layer}; its sizes are beyond what it computes exactly")
