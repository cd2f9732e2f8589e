"""Gradients in one byte a value, with one scale a row: int8, or the float8 type with five bits of exponent.

int8 divides a row into 254 equal steps between its largest magnitude and the negative of it, so what is below half a step
becomes 0. float8 keeps two bits of mantissa over a range of 2^32, so every value has a relative error of up to 1/9. For a
row of normal variables int8's error is the smaller one by far; for a row whose largest value stands alone it is not.

Rounding is to the nearest, ties to even, and repeats bit for bit. One value's error has no mean of zero, but the rounding
is odd, so signs cancel, and ties drift nowhere. What is left is the projection of the rounded on the true gradient: 1 within
a thousandth in int8; 0.3% short in e5m2, whose steps are coarse where values get rarer (a test holds both). Stochastic
rounding would make each value's mean exact, for twice the error's variance and a generator whose state a resumed run would
need; it was left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_GRADIENT_RANGE = 1e-30
"""Floor of a row's largest magnitude, so that a row of zeros divides by something; real gradients lie far above it."""
LARGEST_INT8 = 127
LARGEST_E5M2 = torch.finfo(torch.float8_e5m2).max


@dataclass(frozen=True)
class RoundedGradient:
    """A gradient as `values * scale`."""

    values: Tensor
    """int8 or float8_e5m2 [..., D]."""
    scale: Tensor
    """Multiplies values to gradients; float32 [..., 1], one number a row."""

    def dequantize(self) -> Tensor:
        """`values * scale`, multiplied in float32."""
        return self.values.to(torch.float32) * self.scale


def gradient_to_int8(gradient: Tensor) -> RoundedGradient:
    """Round each row to -127 .. 127 by its largest magnitude, in float32 (as SwitchBack does, arXiv:2304.13013).

    With g = max(max |row|, 1e-30): values = round(row * 127 / g), scale = g / 127. A row with a NaN or an infinity has a
    scale of NaN or infinity, so it is not lost in the integers.
    """
    values = gradient.to(torch.float32)
    largest = values.abs().amax(dim=-1, keepdim=True).clamp(min=MIN_GRADIENT_RANGE)
    codes = (values * LARGEST_INT8).div_(largest).round_().clamp_(-LARGEST_INT8, LARGEST_INT8).to(torch.int8)
    return RoundedGradient(codes, largest / LARGEST_INT8)


def gradient_to_float8(gradient: Tensor) -> RoundedGradient:
    """Round each row to float8 e5m2 with its largest magnitude at the type's, 57344.

    A row with a NaN or an infinity has a scale of NaN or infinity.
    """
    values = gradient.to(torch.float32)
    scale = values.abs().amax(dim=-1, keepdim=True).clamp(min=MIN_GRADIENT_RANGE) / LARGEST_E5M2
    return RoundedGradient((values / scale).to(torch.float8_e5m2), scale)
