"""Integer activations: one scale a token, symmetric codes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wrinklefree.quantization import cpu_kernels
from wrinklefree.quantization.pieces import pays, pieces, scratch_like

MIN_ACTIVATION_RANGE = 1e-5
"""Floor of a token's largest magnitude, so that an all-zero token divides by something."""


@dataclass(frozen=True)
class ActivationCodes:
    """Activations as `codes * scale`."""

    codes: Tensor
    """int8 [..., D]."""
    scale: Tensor
    """Multiplies codes to activations; float32 [..., 1], one number a token."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`codes * scale`, multiplied in float32."""
        if cpu_kernels.takes(self.codes, dtype):
            return cpu_kernels.decode_activation(self.codes, self.scale, dtype)
        return (self.codes.to(torch.float32) * self.scale).to(dtype)


def quantize_activation(x: Tensor, bits: int = 8) -> ActivationCodes:
    """Round each token to signed integers by its largest magnitude, in float32 (arXiv:2510.13998, eq. 3).

    With q = 2^(bits - 1) - 1 and g = max(max |x|, 1e-5): codes = clip(round(x * q / g), -q - 1, q), scale = g / q. The
    result carries no gradient. A token with a NaN or an infinity has a scale of NaN or infinity.
    """
    largest_code = 2 ** (bits - 1) - 1
    with torch.no_grad():
        if cpu_kernels.takes(x, x.dtype):
            return ActivationCodes(*cpu_kernels.encode_activation(x, bits))
        if pays(x):
            return _quantize_by_pieces(x, largest_code)
        values = x.to(torch.float32)
        magnitude = values.abs().amax(dim=-1, keepdim=True).clamp(min=MIN_ACTIVATION_RANGE)
        codes = (values * largest_code).div_(magnitude).round_().clamp_(-largest_code - 1, largest_code).to(torch.int8)
    return ActivationCodes(codes, magnitude / largest_code)


def _quantize_by_pieces(x: Tensor, largest_code: int) -> ActivationCodes:
    """The same operations in the same order."""
    codes = torch.empty(x.shape, dtype=torch.int8)
    magnitude = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    first, second = scratch_like(x), scratch_like(x)
    for part, part_codes, part_magnitude in pieces(x, codes, magnitude):
        values = first[: len(part)].copy_(part)
        torch.amax(torch.abs(values, out=second[: len(part)]), dim=-1, keepdim=True, out=part_magnitude)
        part_magnitude.clamp_(min=MIN_ACTIVATION_RANGE)
        values.mul_(largest_code).div_(part_magnitude).round_().clamp_(-largest_code - 1, largest_code)
        part_codes.copy_(values)
    return ActivationCodes(codes, magnitude / largest_code)
