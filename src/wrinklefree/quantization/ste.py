"""Straight-through estimators: quantized values forward, identity gradient backward.

The readable path. It serves the warm-up (strength below 1) and is the oracle for the fused one in
`wrinklefree.models.bitlinear`. The gradient is not clipped outside [-1, 1].
"""

from torch import Tensor

from wrinklefree.quantization.activation_quant import quantize_activation
from wrinklefree.quantization.weight_quant import ternarize


def straight_through(value: Tensor, quantized: Tensor, strength: Tensor | float) -> Tensor:
    """`value + strength * (quantized - value)`, whose gradient with respect to `value` is the identity.

    Strength 0 returns the value, strength 1 the quantized value (up to one rounding).
    """
    return value + (strength * (quantized - value)).detach()


def ternary_weight(weight: Tensor, strength: Tensor | float = 1.0, scale: Tensor | None = None) -> Tensor:
    """The weight moved towards its ternary value by `strength`, in float32; `scale` as in `ternarize`."""
    master = weight.float()
    return straight_through(master, ternarize(weight, scale).dequantize(), strength)


def integer_activation(x: Tensor, bits: int, strength: Tensor | float = 1.0) -> Tensor:
    """The activation moved towards its integer codes by `strength`, in float32."""
    values = x.float()
    return straight_through(values, quantize_activation(x, bits).dequantize(), strength)
