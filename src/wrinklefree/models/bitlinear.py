"""`BitLinear`: a linear layer whose weight is ternary and whose input is integer in the forward pass.

Two paths compute the same function. The reference path composes straight-through estimators and mixes full precision
with quantized values by lambda; it serves the warm-up. At lambda = 1 one autograd function multiplies integer codes in
the compute dtype (codes up to +-128 are exact in bfloat16) or in bytes, and keeps int8 codes for the backward pass, which
multiplies exactly, or gradients rounded to a byte (`set_products`; `byte_products` has the arithmetic). On a CPU the
forward product is made by our own kernels, from two bits a weight, where that is faster.

Weight codes are computed once per weight version and reused by accumulation, recomputation, evaluation and generation.

Two options change what a layer computes, both off by default: another scale (`quantization.weight_scale`), and the
dead-zone bias (Tequila, arXiv:2509.23809): output channel j also gets share * sum of W_ji over the i whose code is 0. A
weight between the thresholds then has a gradient of its own and is not only pushed by the rounding's identity.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from wrinklefree.models.byte_products import (
    TernaryWeight,
    grad_input,
    grad_weight,
    multiplies_tiles,
    output_product,
)
from wrinklefree.models.config import BitNetSpec
from wrinklefree.quantization import cpu_kernels
from wrinklefree.quantization.activation_quant import ActivationCodes, quantize_activation
from wrinklefree.quantization.options import BackwardProducts, ForwardProducts, WeightScale
from wrinklefree.quantization.ste import integer_activation, ternary_weight
from wrinklefree.quantization.weight_quant import Ternary, ternarize
from wrinklefree.quantization.weight_scale import weight_scale, with_learned_scale

GAIN = "scale_gain"
"""Name of the parameter that a learned scale has."""


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
        w_values: Tensor,
        w_scale: Tensor,
        dtype: torch.dtype,
        overwrite: bool,
        forward_products: ForwardProducts,
        backward_products: BackwardProducts,
    ) -> Tensor:
        """`x_scale` is None where activations are not quantized; then `x_codes` is the input itself."""
        shape = (weight.shape[0], weight.shape[1])
        ternary = TernaryWeight(w_values, w_scale, shape, dtype)
        output = output_product(x_codes, x_scale, ternary, kind=forward_products, overwrite=overwrite)
        if bias is not None:
            output.add_(bias)
        ctx.save_for_backward(x_codes, x_scale, w_values, w_scale)
        ctx.shape, ctx.dtype = shape, dtype
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.backward_products = backward_products
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients as if the dequantized weight and input had been multiplied."""
        x_codes, x_scale, w_values, w_scale = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        kind: BackwardProducts = ctx.backward_products
        grad = grad_outputs[0].to(ctx.dtype)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = grad_input(grad, TernaryWeight(w_values, w_scale, ctx.shape, ctx.dtype), dtype=x_dtype, kind=kind)
        if ctx.needs_input_grad[1]:
            of_weight = grad_weight(grad, x_codes, x_scale, dtype=weight_dtype, kind=kind)
        if ctx.needs_input_grad[2]:
            of_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(bias_dtype)
        return of_x, of_weight, of_bias, None, None, None, None, None, None, None, None


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
class _CachedCodes:
    """Codes of one version of a weight."""

    source: Tensor
    """Shares the weight's storage, so that the allocator cannot hand its address to another weight."""
    version: int
    optimizer_steps: int
    gain_version: int
    weight: TernaryWeight

    def belongs_to(self, weight: Tensor, dtype: torch.dtype, gain_version: int, *, packed: bool) -> bool:
        return (
            self.version == weight._version
            and self.gain_version == gain_version
            and self.optimizer_steps == _OptimizerSteps.count
            and self.weight.dtype == dtype
            and self.weight.packed == packed
            and self.source.device == weight.device
            and self.source.data_ptr() == weight.data_ptr()
        )


class BitLinear(nn.Linear):
    """`nn.Linear` whose weight is ternary and whose input is int8 in the forward pass.

    The stored weight stays full precision; gradients pass straight through (arXiv:2402.17764). Lambda (0: plain linear
    layer, 1: fully quantized) acts on weight and input alike; set it with `set_quantization`.
    """

    quantization_lambda: Tensor
    scale_gain: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation_bits: Literal[4, 8] | None = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        scale_rule: WeightScale = "absmean",
        dead_zone_bias: float = 0.0,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation_bits: Literal[4, 8] | None = activation_bits
        self.scale_rule: WeightScale = scale_rule
        self.dead_zone_bias = dead_zone_bias
        learned = nn.Parameter(torch.ones(1, device=device, dtype=dtype)) if scale_rule == "learned" else None
        self.register_parameter(GAIN, learned)
        # A tensor, so that a changing value is no new constant for torch.compile; on the CPU even when the module is
        # built on the meta device, because no checkpoint would fill it.
        self.register_buffer("quantization_lambda", torch.tensor(1.0, device="cpu"), persistent=False)
        self.lambda_value = 1.0
        self.fully_quantized = True
        self.keeps_codes = True
        """Keep codes between forward passes. Not where weights are sharded: all codes together are a whole model."""
        self.overwrites_products = True
        """Scale a product in place. Not where somebody keeps the product, as selective checkpointing does."""
        self.forward_products: ForwardProducts = "auto"
        """In what the forward pass multiplies codes at lambda = 1."""
        self.backward_products: BackwardProducts = "exact"
        """In what the backward pass multiplies at lambda = 1; the reference path, below 1, is always exact."""
        self.gathered_scale: Tensor | None = None
        """Set where `weight` is gathered from shards as codes: it then holds -1, 0 and 1, and this is their scale."""
        self._weight_codes: _CachedCodes | None = None
        self._codes_for_graph: TernaryWeight | None = None

    def set_quantization(self, value: float) -> None:
        """Set lambda and forget cached codes."""
        self.quantization_lambda.fill_(value)
        self.lambda_value = value
        self.fully_quantized = value == 1.0
        self._weight_codes = self._codes_for_graph = None

    def prepare_codes(self) -> None:
        """Bring the codes up to date for a compiled graph that runs next, which cannot ask for the weight's version.

        Without this, a graph rounds the weight itself, in every forward pass.
        """
        if self.fully_quantized and self.keeps_codes and self.gathered_scale is None:
            self._codes_for_graph = self.ternary_weight(self._compute_dtype(self.weight.device.type))
        else:
            self._codes_for_graph = None

    def _compute_dtype(self, device_type: str) -> torch.dtype:
        """What products are made in: autocast's type where it is on."""
        autocast = torch.is_autocast_enabled(device_type)
        return torch.get_autocast_dtype(device_type) if autocast else self.weight.dtype

    def encode_input(self, x: Tensor) -> ActivationCodes | None:
        """Codes of the input as `forward` computes them; None where it does not use codes."""
        if self.fully_quantized and self.activation_bits is not None:
            return quantize_activation(x, self.activation_bits)
        return None

    def weight_codes(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Ternary codes of the current weight in the compute dtype, and their scale; as old as `ternary_weight`'s."""
        weight = self.ternary_weight(dtype)
        return weight.codes(), weight.scale

    def ternary_weight(self, dtype: torch.dtype) -> TernaryWeight:
        """The current weight as products in the compute dtype read it; cached per weight version.

        Writes that PyTorch does not count, `weight.data.copy_(...)`, are seen after the next optimizer step or
        `set_quantization` only; use `torch.no_grad()` and `weight.copy_(...)`.
        """
        if self.gathered_scale is not None:
            return self._for_products(self.weight.detach(), self.gathered_scale, dtype)
        if torch.compiler.is_compiling() and self._codes_for_graph is not None:
            return self._codes_for_graph
        if torch.compiler.is_compiling() or not self.keeps_codes:
            return self._for_products(*self._codes_and_scale(), dtype)
        cached = self._weight_codes
        gain_version = 0 if self.scale_gain is None else self.scale_gain._version
        packed = self._multiplies_tiles(dtype)
        if cached is None or not cached.belongs_to(self.weight, dtype, gain_version, packed=packed):
            # Codes first needed in an evaluation must also serve the training steps after it.
            with torch.inference_mode(False):
                source = self.weight.detach()
                weight = self._for_products(*self._codes_and_scale(), dtype)
                cached = _CachedCodes(source, source._version, _OptimizerSteps.count, gain_version, weight)
            self._weight_codes = cached
        return cached.weight

    def _codes_and_scale(self) -> tuple[Tensor, Tensor]:
        ternary = self.ternary()
        return ternary.codes, ternary.scale

    def _for_products(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> TernaryWeight:
        packed = self._multiplies_tiles(dtype)
        values = cpu_kernels.pack_ternary(codes.to(torch.int8)) if packed else codes.to(dtype)
        return TernaryWeight(values, scale, (self.out_features, self.in_features), dtype)

    def _multiplies_tiles(self, dtype: torch.dtype) -> bool:
        return (
            self.weight.device.type == "cpu"
            and self.activation_bits is not None
            and multiplies_tiles(self.forward_products, dtype, self.in_features)
        )

    def ternary(self) -> Ternary:
        """Codes and scale of the current weight, without a gradient."""
        return ternarize(self.weight.detach(), self._scale())

    def folded_bias(self, codes: Tensor | None = None) -> Tensor | None:
        """The bias with the dead-zone bias in it, which carries a gradient to weights of code 0; None without either.

        Args:
            codes: The weight's, where they are known.
        """
        if self.dead_zone_bias == 0:
            return self.bias
        codes = self.ternary().codes if codes is None else codes
        dead = (self.weight.float() * (codes == 0)).sum(1) * self.dead_zone_bias
        return dead if self.bias is None else dead + self.bias

    def _scale(self) -> Tensor | None:
        """The scale where a rule other than the default makes it."""
        return None if self.scale_rule == "absmean" else weight_scale(self.weight, self.scale_rule, self.scale_gain)

    def _trained_weight(self, codes: Tensor, scale: Tensor, strength: float) -> Tensor:
        """The weight as the products' gradient finds it: it passes on the learned scale's."""
        if self.scale_gain is None:
            return self.weight
        return with_learned_scale(self.weight, self.scale_gain, codes, scale, strength)

    def forward(self, input: Tensor, codes: ActivationCodes | None = None) -> Tensor:
        """`input @ W.T + bias` on quantized values, [..., in_features] to [..., out_features], in the compute dtype.

        Args:
            input: Activations.
            codes: What `encode_input(input)` returned, where several layers share one input.
        """
        if not self.fully_quantized:
            return self.reference_forward(input)
        dtype = self._compute_dtype(input.device.type)
        ternary = self.ternary_weight(dtype)
        codes = self.encode_input(input) if codes is None else codes
        if codes is None:
            x_codes, x_scale = input.detach().to(dtype), None
        else:
            x_codes, x_scale = codes.codes, codes.scale
        weight, bias = self.weight, self.bias
        if self.scale_gain is not None or self.dead_zone_bias > 0:
            w_codes = ternary.codes()
            weight, bias = self._trained_weight(w_codes, ternary.scale, 1.0), self.folded_bias(w_codes)
        output: Any = _IntegerMatmul.apply(
            input, weight, bias, x_codes, x_scale, ternary.values, ternary.scale, dtype,
            self.overwrites_products, self.forward_products, self.backward_products,
        )  # fmt: skip
        return output

    def reference_forward(self, input: Tensor) -> Tensor:
        """The same function as a composition of straight-through estimators, at any lambda; caches nothing."""
        if self.gathered_scale is not None:
            raise RuntimeError("the weight was gathered as codes, and lambda below 1 needs full precision")
        bias, scale, weight = self.bias, self._scale(), self.weight
        if scale is not None or self.dead_zone_bias > 0:
            # The dead zone's part grows with lambda, as the rounding does.
            ternary = ternarize(self.weight.detach(), scale)
            weight = self._trained_weight(ternary.codes, ternary.scale, self.lambda_value)
            bias = self._mixed_bias(ternary.codes)
        weight = ternary_weight(weight, self.quantization_lambda, scale)
        x = input
        if self.activation_bits is not None:
            x = integer_activation(input, self.activation_bits, self.quantization_lambda)
        weight = weight.to(self.weight.dtype)
        return functional.linear(x.to(weight.dtype), weight, bias)

    def _mixed_bias(self, codes: Tensor) -> Tensor | None:
        folded = self.folded_bias(codes)
        if folded is None or folded is self.bias:
            return self.bias
        plain = torch.zeros_like(folded) if self.bias is None else self.bias
        return (plain + self.quantization_lambda.to(folded.device) * (folded - plain)).to(self.weight.dtype)


def make_linear(in_features: int, out_features: int, bias: bool, bitnet: BitNetSpec | None) -> nn.Linear:
    """A BitLinear as the spec says, or a plain linear layer where there is none."""
    if bitnet is None:
        return nn.Linear(in_features, out_features, bias)
    return BitLinear(
        in_features, out_features, bias, bitnet.activation_bits,
        scale_rule=bitnet.weight_scale, dead_zone_bias=bitnet.dead_zone_bias,
    )  # fmt: skip


def project(x: Tensor, layers: tuple[nn.Linear, ...]) -> tuple[Tensor, ...]:
    """Outputs of layers that read the same input; BitLinears share one set of input codes."""
    first = layers[0]
    codes = first.encode_input(x) if isinstance(first, BitLinear) else None
    if codes is None:
        return tuple(layer(x) for layer in layers)
    return tuple(layer(x, codes) for layer in layers)


def prepare_codes(model: nn.Module) -> None:
    """Bring the codes of every BitLinear up to date for a compiled graph that runs next."""
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.prepare_codes()


def set_quantization(model: nn.Module, value: float) -> None:
    """Set lambda of every BitLinear: 0 is the full-precision function, 1 the ternary one."""
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.set_quantization(value)


def set_products(model: nn.Module, forward: ForwardProducts, backward: BackwardProducts) -> None:
    """Set in what every BitLinear multiplies at lambda = 1; nothing else changes."""
    for module in model.modules():
        if isinstance(module, BitLinear):
            module.forward_products, module.backward_products = forward, backward


def quantization_of(model: nn.Module) -> float:
    """Lambda of the model's BitLinears; 0 where there are none. Reads no tensor."""
    for module in model.modules():
        if isinstance(module, BitLinear):
            return module.lambda_value
    return 0.0
