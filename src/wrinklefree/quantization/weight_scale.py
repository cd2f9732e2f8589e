"""Other scales than the mean of |W|, as options. Nothing here rounds: `ternarize` does, given a scale.

median   the median of |W| (arXiv:2407.09527, for nets of 0.1 to 48 million parameters): few large weights do not move it.
learned  gain * mean |W| with a trained number `gain`, 1 at the start. As codes are clip(round(W / scale), -1, 1), the
         scale moves the thresholds too, at scale / 2. These are the balanced levels of SEQ (arXiv:2502.02631) at three
         values: levels -2a/3, 0 and 2a/3 with thresholds at a/3, for a = 1.5 scale. The gradient is LSQ's
         (arXiv:1902.08153): each weight contributes d(codes * scale) / d scale = code - W / scale inside [-1, 1] and
         the code outside, divided by the root of the number of weights, so that clipping by norm still means
         something. The mean carries no gradient, as in the default.

A model trained with one of these computes what a plain one with other weights computes; `models.folding` makes it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from wrinklefree.quantization.options import WeightScale
from wrinklefree.quantization.weight_quant import MIN_WEIGHT_SCALE


def weight_scale(weight: Tensor, rule: WeightScale, gain: Tensor | None = None) -> Tensor:
    """The scale of a weight, float32 and 0-dimensional, without a gradient; never below 1e-5.

    Of an even number of weights the median is the lower of the two in the middle.

    Args:
        weight: Of any shape.
        rule: What it is.
        gain: One number, for `learned` only.
    """
    with torch.no_grad():
        magnitude = weight.to(torch.float32).abs()
        scale = magnitude.median() if rule == "median" else magnitude.mean()
        if gain is not None:
            scale = scale * gain.to(torch.float32).reshape(())
        return scale.clamp(min=MIN_WEIGHT_SCALE)


def with_learned_scale(weight: Tensor, gain: Tensor, codes: Tensor, scale: Tensor, strength: float = 1.0) -> Tensor:
    """`weight`, whose gradient also reaches `gain`: that of codes * scale, where the gradient of `weight` is its own.

    Args:
        weight: Full precision; the gradient that arrives here must be the one of the ternary weight.
        gain: [1], the factor inside `scale`.
        codes: -1, 0 and 1, in the weight's shape.
        scale: What `weight_scale` returned.
        strength: Lambda: how far the quantized value is mixed in.
    """
    result: Any = _LearnedScale.apply(weight, gain, codes, scale, strength)
    return result


class _LearnedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, gain: Tensor, codes: Tensor, scale: Tensor, strength: float) -> Tensor:
        ctx.save_for_backward(weight, codes, scale)
        ctx.strength, ctx.gain = strength, (gain.shape, gain.dtype)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weight, codes, scale = ctx.saved_tensors
        grad = grad_outputs[0]
        grad_gain = None
        if ctx.needs_input_grad[1]:
            ratio = weight.to(torch.float32) / scale
            slope = codes.to(torch.float32) - torch.where(ratio.abs() < 1, ratio, 0.0)
            mean = weight.to(torch.float32).abs().mean()
            value = (grad.to(torch.float32) * slope).sum() * mean / math.sqrt(weight.numel())
            shape, dtype = ctx.gain
            grad_gain = (ctx.strength * value).reshape(shape).to(dtype)
        return grad, grad_gain, None, None, None
