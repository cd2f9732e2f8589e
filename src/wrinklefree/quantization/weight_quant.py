"""Ternary weights: the only place in the repository that rounds a weight.

Training, export and serving all call `ternarize`, so their codes are equal bit for bit. Another place for epsilon, a
multiplication by the reciprocal or another rounding of ties moves codes at the thresholds; hence one function.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from wrinklefree.quantization import cpu_kernels
from wrinklefree.quantization.pieces import pays, pieces, scratch_like

MIN_WEIGHT_SCALE = 1e-5
"""Floor of the scale, so that an all-zero weight divides by something."""


@dataclass(frozen=True)
class Ternary:
    """A weight as `codes * scale`."""

    codes: Tensor
    """-1, 0 or 1, int8, in the weight's shape."""
    scale: Tensor
    """Multiplies codes to weights; float32, one number (0-dimensional)."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """`codes * scale`, multiplied in float32."""
        return (self.codes.to(torch.float32) * self.scale).to(dtype)


def ternarize(weight: Tensor, scale: Tensor | None = None) -> Ternary:
    """Round a weight to {-1, 0, 1} times its mean magnitude, in float32 (arXiv:2510.13998, eq. 1-2).

    scale = max(mean |W|, 1e-5), or the one given (see `weight_scale`); codes = clip(round(W / scale), -1, 1), ties to
    even. The result carries no gradient. A NaN or an infinity in the weight makes the scale NaN or infinite, so it is
    not lost in the integer codes.
    """
    with torch.no_grad():
        master = weight.to(torch.float32)
        if scale is None:
            scale = master.abs().mean().clamp(min=MIN_WEIGHT_SCALE)
        codes = round_to_codes(master, scale)
    return Ternary(codes, scale)


def round_to_codes(master: Tensor, scale: Tensor) -> Tensor:
    """clip(round(W / scale), -1, 1) as int8, for a part of a weight whose scale is known; ties to even."""
    if master.dtype == scale.dtype == torch.float32 and scale.numel() == 1 and cpu_kernels.takes(master, torch.float32):
        return cpu_kernels.ternarize(master, scale)
    if master.dtype != torch.float32 or scale.dtype != torch.float32 or scale.numel() != 1 or not pays(master):
        return (master / scale).round_().clamp_(-1, 1).to(torch.int8)
    codes = torch.empty(master.shape, dtype=torch.int8)
    scratch = scratch_like(master)
    for part, part_codes in pieces(master, codes):
        part_codes.copy_(torch.div(part, scale, out=scratch[: len(part)]).round_().clamp_(-1, 1))
    return codes
