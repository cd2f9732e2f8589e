"""Integer activation codes."""

import pytest
import torch

from wrinklefree.quantization.activation_quant import quantize_activation


def test_hand_computed_codes_and_scale() -> None:
    quantized = quantize_activation(torch.tensor([[127.0, -63.4, 0.5, 1.5], [0.0, 2.0, -4.0, 1.0]]))
    assert quantized.codes.tolist() == [[127, -63, 0, 2], [0, 64, -127, 32]]
    assert quantized.scale.tolist() == [[1.0], [pytest.approx(4 / 127)]]
    assert quantized.codes.dtype == torch.int8


def test_four_bits() -> None:
    quantized = quantize_activation(torch.tensor([7.0, -7.0, 3.4, -0.6]), bits=4)
    assert quantized.codes.tolist() == [7, -7, 3, -1]
    assert quantized.scale.item() == 1.0


def test_tokens_are_independent() -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    together = quantize_activation(x)
    alone = quantize_activation(x[1, 2])
    assert torch.equal(together.codes[1, 2], alone.codes)
    assert together.scale.shape == (3, 5, 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_error_is_at_most_half_a_step(bits: int) -> None:
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    quantized = quantize_activation(x, bits)
    assert ((quantized.dequantize() - x).abs() <= quantized.scale * 0.5001).all()


def test_zero_and_non_finite_tokens() -> None:
    assert quantize_activation(torch.zeros(4)).dequantize().tolist() == [0.0] * 4
    assert not quantize_activation(torch.tensor([1.0, torch.nan])).dequantize().isfinite().any()


def test_codes_do_not_depend_on_a_power_of_two_factor() -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(quantize_activation(x).codes, quantize_activation(x * 64).codes)
