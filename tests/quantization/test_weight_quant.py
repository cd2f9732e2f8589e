"""Ternary codes against hand-computed values and an exact second implementation."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wrinklefree.quantization.weight_quant import ternarize


def test_hand_computed_codes_and_scale() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.2, 0.8]])  # mean magnitude 1
    ternary = ternarize(weight)
    assert ternary.scale.item() == 1.0
    assert ternary.codes.tolist() == [[1, -1], [0, 1]]
    assert ternary.codes.dtype == torch.int8
    assert ternary.scale.dtype == torch.float32
    assert ternary.scale.shape == ()


def test_ties_round_to_even() -> None:
    weight = torch.tensor([0.5, -0.5, 1.5, -1.5])  # mean magnitude 1: quotients are +-0.5 and +-1.5
    assert ternarize(weight).codes.tolist() == [0, 0, 1, -1]


def test_zero_weight_has_the_floor_as_scale() -> None:
    ternary = ternarize(torch.zeros(3, 3))
    assert ternary.scale.item() == pytest.approx(1e-5)
    assert ternary.codes.abs().sum() == 0


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=16))
@settings(deadline=None, max_examples=60)
def test_codes_equal_rational_arithmetic(numerators: list[int]) -> None:
    mean = Fraction(sum(abs(n) for n in numerators), len(numerators))
    # Compare off the exact ties, where the division by a rounded mean may fall on either side.
    quotients = [Fraction(n) / mean if mean else Fraction(0) for n in numerators]
    codes = ternarize(torch.tensor(numerators, dtype=torch.float32)).codes.tolist()
    for code, quotient in zip(codes, quotients, strict=True):
        if abs(abs(quotient) - Fraction(1, 2)) > Fraction(1, 10**6):
            assert code == (0 if abs(quotient) < Fraction(1, 2) else (1 if quotient > 0 else -1))


def test_dequantize_multiplies_codes_by_scale() -> None:
    ternary = ternarize(torch.tensor([3.0, -3.0, 0.0]))
    assert ternary.dequantize().tolist() == [2.0, -2.0, 0.0]
    assert ternary.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_a_ternary_weight_keeps_its_codes() -> None:
    codes = torch.tensor([[1, -1, 0, 1], [0, 1, -1, 0]])
    assert ternarize(codes * 0.037).codes.tolist() == codes.tolist()


def test_non_finite_weights_are_not_lost() -> None:
    assert ternarize(torch.tensor([1.0, torch.nan])).dequantize().isnan().all()


def test_result_has_no_gradient_and_arithmetic_is_float32_under_autocast() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = ternarize(weight)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = ternarize(weight)
    assert not plain.scale.requires_grad
    assert torch.equal(plain.codes, under_autocast.codes)
    assert torch.equal(plain.scale, under_autocast.scale)
