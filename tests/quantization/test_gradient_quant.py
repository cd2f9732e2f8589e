"""Gradients in a byte: hand-computed values, against numpy bit for bit, error bounds, and what is not finite stays so."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from wrinklefree.quantization.gradient_quant import RoundedGradient, gradient_to_float8, gradient_to_int8


def random_gradient(rows: int = 64, columns: int = 512, spread: float = 3.0) -> torch.Tensor:
    """As small as real gradients are, with rows whose sizes spread over so many powers of ten in both directions."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-spread, spread, rows)[:, None] * 1e-6
    return torch.randn(rows, columns, generator=generator) * sizes


def projection(rounded: RoundedGradient, exact: torch.Tensor) -> float:
    mine, theirs = rounded.dequantize().double(), exact.double()
    return float((mine * theirs).sum() / theirs.square().sum())


def test_int8_by_hand() -> None:
    rounded = gradient_to_int8(torch.tensor([[127.0, -0.5, 0.5, 1.5, 2.5, -127.0], [0.0] * 6]))
    assert rounded.values.tolist() == [[127, 0, 0, 2, 2, -127], [0] * 6], "ties go to the even neighbour"
    assert rounded.scale[0].item() == 1.0
    assert rounded.dequantize()[1].tolist() == [0.0] * 6


def test_float8_by_hand() -> None:
    # Two bits of mantissa: 1, 1.25, 1.5, 1.75 and their halves; 1.125 lies between 1 and 1.25 and goes to the even 1.
    rounded = gradient_to_float8(torch.tensor([[57344.0, 1.0, 1.125, 1.375, 1.2, -0.9]]))
    assert rounded.scale.tolist() == [[1.0]]
    assert rounded.values.float().tolist() == [[57344.0, 1.0, 1.0, 1.5, 1.25, -0.875]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_equals_numpy_bit_for_bit(dtype: torch.dtype) -> None:
    gradient = random_gradient().to(dtype)
    values = gradient.float().numpy()
    largest = np.maximum(np.abs(values).max(axis=1, keepdims=True), np.float32(1e-30))
    codes = np.rint(values * np.float32(127) / largest).astype(np.int8)
    rounded = gradient_to_int8(gradient)
    assert np.array_equal(rounded.values.numpy(), codes)
    assert np.array_equal(rounded.scale.numpy(), largest / np.float32(127))


def test_errors_are_within_half_a_step_and_not_zero() -> None:
    gradient = random_gradient()
    error = (gradient_to_int8(gradient).dequantize() - gradient).abs()
    half = gradient.abs().amax(1, keepdim=True) / 254
    assert (error <= half * (1 + 1e-5)).all()
    assert error.max() > 0.99 * half.min()
    relative = ((gradient_to_float8(gradient).dequantize() - gradient) / gradient).abs()
    assert float(relative.max()) <= 1 / 9 * (1 + 1e-5)
    assert float(relative.max()) > 0.11


def test_rounding_adds_noise_and_hardly_moves_the_mean() -> None:
    gradient = random_gradient(spread=0.0)
    assert abs(projection(gradient_to_int8(gradient), gradient) - 1) < 1e-3
    assert 0 < 1 - projection(gradient_to_float8(gradient), gradient) < 5e-3
    mirrored = gradient_to_int8(-gradient)
    assert torch.equal(mirrored.values, -gradient_to_int8(gradient).values)


def test_stochastic_rounding_would_double_the_variance() -> None:
    """The reason that it was left out."""
    gradient = random_gradient(spread=0.0)
    nearest = gradient_to_int8(gradient)
    steps = gradient / nearest.scale
    noise = torch.rand(steps.shape, generator=torch.Generator().manual_seed(1))
    stochastic = (steps + noise).floor() * nearest.scale
    ratio = (stochastic - gradient).square().sum() / (nearest.dequantize() - gradient).square().sum()
    assert 1.9 < float(ratio) < 2.1


@pytest.mark.parametrize("round_gradient", [gradient_to_int8, gradient_to_float8])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(round_gradient: Callable[[torch.Tensor], RoundedGradient], bad: float) -> None:
    gradient = random_gradient(2, 8)
    gradient[0, 3] = bad
    rounded = round_gradient(gradient)
    assert not rounded.scale[0].isfinite().any()
    assert rounded.dequantize()[1].isfinite().all()


@pytest.mark.parametrize("round_gradient", [gradient_to_int8, gradient_to_float8])
def test_gradients_as_small_as_float32_holds(round_gradient: Callable[[torch.Tensor], RoundedGradient]) -> None:
    rounded = round_gradient(torch.tensor([[1e-38, -1e-38, 0.0], [1e-29, -5e-30, 0.0]]))
    assert rounded.dequantize().isfinite().all()
    torch.testing.assert_close(rounded.dequantize()[1], torch.tensor([1e-29, -5e-30, 0.0]), rtol=0.01, atol=0)
