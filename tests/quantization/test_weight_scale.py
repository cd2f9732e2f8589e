"""Other scales: hand-computed values, and the learned scale's gradient against finite differences."""

import math

import pytest
import torch

from wrinklefree.quantization.weight_quant import ternarize
from wrinklefree.quantization.weight_scale import weight_scale, with_learned_scale


def test_the_median_is_not_moved_by_a_large_weight() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.9], [-1000.0, 0.1, 1.4, -1.6]])
    assert weight_scale(weight, "median") == pytest.approx(1.4)  # the lower of 1.4 and 1.6
    ternary = ternarize(weight, weight_scale(weight, "median"))
    assert ternary.codes.tolist() == [[1, -1, 1, 1], [-1, 0, 1, -1]]
    assert ternarize(weight).codes.tolist() == [[0, 0, 0, 0], [-1, 0, 0, 0]]


def test_a_learned_scale_is_a_multiple_of_the_mean() -> None:
    weight = torch.tensor([[0.5, -1.5], [1.0, -1.0]])
    assert weight_scale(weight, "learned", torch.ones(1)) == ternarize(weight).scale == 1.0
    assert weight_scale(weight, "learned", torch.tensor([2.5])) == 2.5
    assert weight_scale(weight, "learned", torch.tensor([-3.0])) == pytest.approx(1e-5)


def test_the_thresholds_are_those_of_balanced_levels() -> None:
    """SEQ with a range a = 1.5 scale: thresholds at a / 3, levels at 2a / 3."""
    weight = torch.linspace(-2, 2, 401)[:, None]
    gain = torch.tensor([1.3])
    scale = weight_scale(weight, "learned", gain)
    a = 1.5 * float(scale)
    levels = torch.where(weight.abs() > a / 3, weight.sign() * 2 * a / 3, 0.0)
    torch.testing.assert_close(ternarize(weight, scale).dequantize(), levels)


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_the_gradient_of_the_gain_is_lsqs(strength: float) -> None:
    weight = torch.tensor([[0.3, -0.6], [0.9, -4.0]], requires_grad=True)
    gain = torch.tensor([0.8], requires_grad=True)
    mean = 1.45
    scale = weight_scale(weight, "learned", gain)
    codes = ternarize(weight, scale).codes
    assert codes.tolist() == [[0, -1], [1, -1]]  # scale 1.16, thresholds at 0.58
    arriving = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    (with_learned_scale(weight, gain, codes, scale, strength) * arriving).sum().backward()
    assert weight.grad is not None
    assert gain.grad is not None
    assert torch.equal(weight.grad, arriving)
    slopes = [0 - 0.3 / 1.16, -1 + 0.6 / 1.16, 1 - 0.9 / 1.16, -1.0]
    wanted = sum(s * g for s, g in zip(slopes, [1.0, 2.0, 3.0, 5.0], strict=True)) * mean / math.sqrt(4)
    assert gain.grad.item() == pytest.approx(strength * wanted, rel=1e-5)
    assert gain.grad.shape == (1,)


def test_descent_on_the_gain_lowers_the_rounding_error() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def rounded(gain: torch.Tensor) -> torch.Tensor:
        return ternarize(weight, weight_scale(weight, "learned", gain)).dequantize()

    gain = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([gain], lr=5e-3)
    for _ in range(200):
        ternary = ternarize(weight, weight_scale(weight, "learned", gain))
        moved = with_learned_scale(weight, gain, ternary.codes, ternary.scale)
        optimizer.zero_grad()
        moved.backward(2 * (ternary.dequantize() - weight) / 64)
        optimizer.step()
    errors = [float((rounded(g) - weight).square().mean()) for g in (gain.detach(), torch.ones(1))]
    assert errors[0] < 0.85 * errors[1]
