"""Straight-through estimators: values at both ends, and the identity gradient."""

import pytest
import torch

from wrinklefree.quantization.activation_quant import quantize_activation
from wrinklefree.quantization.ste import integer_activation, straight_through, ternary_weight
from wrinklefree.quantization.weight_quant import ternarize


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_gradient_is_the_identity_at_every_strength(strength: float) -> None:
    value = torch.tensor([0.1, -3.0, 40.0], requires_grad=True)
    slope = torch.tensor([1.0, 2.0, -5.0])
    (straight_through(value, value.round(), strength) * slope).sum().backward()
    assert value.grad is not None
    assert torch.equal(value.grad, slope)


def test_strength_mixes_linearly() -> None:
    value, quantized = torch.tensor([0.25]), torch.tensor([1.0])
    assert straight_through(value, quantized, 0.0).item() == 0.25
    assert straight_through(value, quantized, 0.5).item() == 0.625
    assert straight_through(value, quantized, 1.0).item() == 1.0


def test_weight_and_activation_reach_their_codes() -> None:
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ternary_weight(values), ternarize(values).dequantize())
    torch.testing.assert_close(integer_activation(values, 8), quantize_activation(values).dequantize())
    assert torch.equal(ternary_weight(values, 0.0), values)
    assert torch.equal(integer_activation(values, 4, 0.0), values)
