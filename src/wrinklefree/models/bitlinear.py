"""`BitLinear`: a linear layer whose weight is ternary and whose input is integer in the forward pass.

Two paths compute the same function. The reference path composes straight-through estimators and mixes full precision
with quantized values by lambda; it serves the warm-up. At lambda = 1 one autograd function multiplies integer codes in
the compute dtype (codes up to +-128 are exact in bfloat16) and keeps int8 codes for the backward pass.

Weight codes are computed once per weight version and reused by accumulation, recomputation, evaluation and generation.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from wrinklefree.models.config import BitNetSpec
from wrinklefree.quantization.activation_quant import ActivationCodes, quantize_activation
from wrinklefree.quantization.ste import integer_activation, ternary_weight
from wrinklefree.quantization.weight_quant import ternarize


class _IntegerMatmul(torch.autograd.Function):
    """y = (x_codes @ w_codes^T) * x_scale * w_scale + bias, with the identity as gradient of both roundings.

    `x` and `weight` are inputs only so that their gradients have somewhere to go; the forward pass reads the codes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_codes: Tensor,
        x_scale: Tensor | None,
        w_codes: Tensor,
        w_scale: Tensor,
        overwrite: bool,
    ) -> Tensor:
        """`x_scale` is None where activations are not quantized; then `x_codes` is the input itself."""
        output = functional.linear(x_codes.to(w_codes.dtype), w_codes)
        scale = w_scale if x_scale is None else x_scale * w_scale
        output = output.mul_(scale) if overwrite else output * scale
        if bias is not None:
            output.add_(bias)
        ctx.save_for_backward(x_codes, x_scale, w_codes, w_scale)
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients as if the dequantized weight and input had been multiplied."""
        x_codes, x_scale, w_codes, w_scale = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad = grad_outputs[0].to(w_codes.dtype)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ w_codes).to(x_dtype).mul_(w_scale)
        if ctx.needs_input_grad[1]:
            scaled = grad if x_scale is None else (grad * x_scale).to(w_codes.dtype)
            inputs = x_codes.to(w_codes.dtype)
            grad_weight = (scaled.flatten(0, -2).T @ inputs.flatten(0, -2)).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


class _OptimizerSteps:
    """Optimizer steps taken in this process.

    Some optimizers write parameters through a pointer, which leaves a tensor's version as it was; a step of any of them
    therefore makes all cached codes old.
    """

    count = 0


def _count_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
    _OptimizerSteps.count += 1


register_optimizer_step_post_hook(_count_step)


@dataclass(frozen=True)
class _WeightCodes:
    """Codes of one version of a weight, in the compute dtype."""

    source: Tensor
    """Shares the weight's storage, so that the allocator cannot hand its address to another weight."""
    version: int
    optimizer_steps: int
    codes: Tensor
    scale: Tensor

    def belongs_to(self, weight: Tensor, dtype: torch.dtype) -> bool:
        return (
            self.version == weight._version
            and self.optimizer_steps == _OptimizerSteps.count
            and self.codes.dtype == dtype
            and self.source.device == weight.device
            and self.source.data_ptr() == weight.data_ptr()
        )


class BitLinear(nn.Linear):
    """`nn.Linear` whose weight is ternary and whose input is int8 in the forward pass.

    The stored weight stays full precision; gradients pass straight through (arXiv:2402.17764). Lambda (0: plain linear
    layer, 1: fully quantized) acts on weight and input alike; set it with `set_quantization`.
    """

    quantization_lambda: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation_bits: Literal[4, 8] | None = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation_bits: Literal[4, 8] | None = activation_bits
        # A tensor, so that a changing value is no new constant for torch.compile; on the CPU even when the module is
        # built on the meta device, because no checkpoint would fill it.
        self.register_buffer("quantization_lambda", torch.tensor(1.0, device="cpu"), persistent=False)
        self.lambda_value = 1.0
        self.fully_quantized = True
        self.keeps_codes = True
        """Keep codes between forward passes. Not where weights are sharded: all codes together are a whole model."""
        self.overwrites_products = True
        """Scale a product in place. Not where somebody keeps the product, as selective checkpointing does."""
        self.gathered_scale: Tensor | None = None
        """Set where `weight` is gathered from shards as codes: it then holds -1, 0 and 1, and this is their scale."""
        self._weight_codes: _WeightCodes | None = None

    def set_quantization(self, value: float) -> None:
        """Set lambda and forget cached codes."""
        self.quantization_lambda.fill_(value)
        self.lambda_value = value
        self.fully_quantized = value == 1.0
        self._weight_codes = None

    def encode_input(self, x: Tensor) -> ActivationCodes | None:
        """Codes of the input as `forward` computes them; None where it does not use codes."""
        if self.fully_quantized and self.activation_bits is not None:
            return quantize_activation(x, self.activation_bits)
        return None

    def weight_codes(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Ternary codes of the current weight in the compute dtype, and their scale; cached per weight version.

        Writes that PyTorch does not count, `weight.data.copy_(...)`, are seen after the next optimizer step or
        `set_quantization` only; use `torch.no_grad()` and `weight.copy_(...)`.
        """
        if self.gathered_scale is not None:
            return self.weight.detach().to(dtype), self.gathered_scale
        if torch.compiler.is_compiling() or not self.keeps_codes:
            ternary = ternarize(self.weight)
            return ternary.codes.to(dtype), ternary.scale
        cached = self._weight_codes
        if cached is None or not cached.belongs_to(self.weight, dtype):
            # Codes first needed in an evaluation must also serve the training steps after it.
            with torch.inference_mode(False):
                source = self.weight.detach()
                ternary = ternarize(source)
                cached = _WeightCodes(
                    source, source._version, _OptimizerSteps.count, ternary.codes.to(dtype), ternary.scale
                )
            self._weight_codes = cached
        return cached.codes, cached.scale

    def forward(self, input: Tensor, codes: ActivationCodes | None = None) -> Tensor:
        """`input @ W.T + bias` on quantized values, [..., in_features] to [..., out_features], in the compute dtype.

        Args:
            input: Activations.
            codes: What `encode_input(input)` returned, where several layers share one input.
        """
        if not self.fully_quantized:
            return self.reference_forward(input)
        device_type = input.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.weight.dtype
        w_codes, w_scale = self.weight_codes(dtype)
        codes = self.encode_input(input) if codes is None else codes
        if codes is None:
            x_codes, x_scale = input.detach().to(dtype), None
        else:
            x_codes, x_scale = codes.codes, codes.scale
        output: Any = _IntegerMatmul.apply(
            input, self.weight, self.bias, x_codes, x_scale, w_codes, w_scale, self.overwrites_products
        )
        return output

    def reference_forward(self, input: Tensor) -> Tensor:
        """The same function as a composition of straight-through estimators, at any lambda; caches nothing."""
        if self.gathered_scale is not None:
            raise RuntimeError("the weight was gathered as codes, and lambda below 1 needs full precision")
        weight = ternary_weight(self.weight, self.quantization_lambda)
        x = input
        if self.activation_bits is not None:
            x = integer_activation(input, self.activation_bits, self.quantization_lambda)
        weight = weight.to(self.weight.dtype)
        return functional.linear(x.to(weight.dtype), weight, self.bias)


def make_linear(in_features: int, out_features: int, bias: bool, bitnet: BitNetSpec | None) -> nn.Linear:
    """A BitLinear as the spec says, or a plain linear layer where there is none."""
    if bitnet is None:
        return nn.Linear(in_features, out_features, bias)
    return BitLinear(in_features, out_features, bias, bitnet.activation_bits)


def project(x: Tensor, layers: tuple[nn.Linear, ...]) -> tuple[Tensor, ...]:
    """Outputs of layers that read the same input; BitLinears share one set of input codes."""
    first = layers[0]
    codes = first.encode_input(x) if isinstance(first, BitLinear) else None
    if codes is None:
        return tuple(layer(x) for layer in layers)
    return tuple(layer(x, codes) for layer in layers)


def set_quantization(model: nn.Module, value: float) -> None:
    """Set lambda of every BitLinear: 0 is the full-precision function, 1 the ternary one."""
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.set_quantization(value)


def quantization_of(model: nn.Module) -> float:
    """Lambda of the model's BitLinears; 0 where there are none. Reads no tensor."""
    for module in model.modules():
        if isinstance(module, BitLinear):
            return module.lambda_value
    return 0.0
