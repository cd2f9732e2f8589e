"""Pieces of rows: the same bits as the whole tensor at once."""

import pytest
import torch
from torch import Tensor

from wrinklefree.quantization import pieces
from wrinklefree.quantization.activation_quant import ActivationCodes, quantize_activation
from wrinklefree.quantization.pieces import WIDE, pays, rows_for_product, scaled_rows
from wrinklefree.quantization.weight_quant import Ternary, ternarize


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (values * 10 ** torch.linspace(-3, 3, shape[-1])).to(dtype)


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 2**40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_activation_codes_have_the_same_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bits: int) -> None:
    x = random(3, 130, 577, dtype=dtype)  # a ragged last piece, rows of several batch rows in one
    x[1, 7] = 0
    x[2, 5, 3] = float("inf")
    assert pays(x)
    cut: ActivationCodes = quantize_activation(x, bits)
    at_once(monkeypatch)
    assert not pays(x)
    one = quantize_activation(x, bits)
    finite = one.scale.isfinite().expand_as(one.codes)
    assert torch.equal(cut.codes[finite], one.codes[finite])
    assert torch.equal(cut.scale, one.scale)
    assert cut.scale[2, 5].isinf()
    assert cut.codes.shape == x.shape


def test_strided_activations_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(577, 300).T
    cut = quantize_activation(x)
    at_once(monkeypatch)
    assert torch.equal(cut.codes, quantize_activation(x).codes)


def test_weight_codes_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(331, 601, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().mean()
    weight[0, :3] = torch.tensor([0.5, 1.5, -0.5]) * scale  # near ties
    cut: Ternary = ternarize(weight)
    at_once(monkeypatch)
    one = ternarize(weight)
    assert torch.equal(cut.codes, one.codes)
    assert torch.equal(cut.scale, one.scale)


@pytest.mark.parametrize("in_place", [True, False])
def test_scaled_rows_round_once_from_float32(in_place: bool) -> None:
    values = random(5, 70, 600, dtype=torch.bfloat16)
    scale = torch.rand(5, 70, 1, generator=torch.Generator().manual_seed(1))
    expected = (values.float() * scale).to(torch.bfloat16)
    assert pays(values)
    got = scaled_rows(values, scale, out=values if in_place else None)
    assert torch.equal(got, expected)
    assert (got is values) == in_place


def test_what_cannot_be_cut_is_scaled_at_once() -> None:
    values = random(600, 400, dtype=torch.bfloat16).T  # writing through a flattened copy would be lost
    scale = torch.rand(400, 1, generator=torch.Generator().manual_seed(1))
    expected = (values.float() * scale).to(torch.bfloat16)
    assert torch.equal(scaled_rows(values, scale, out=values), expected)
    assert torch.equal(values, expected)
    small = random(3, 4)
    assert torch.equal(scaled_rows(small, scale[:3]), small * scale[:3])


def test_small_tensors_and_subclasses_are_not_cut() -> None:
    assert not pays(random(4, 8))
    assert not pays(torch.empty(2**20))
    assert not pays(torch.empty(2**10, 2**10, device="meta"))
    assert pays(torch.nn.Parameter(torch.empty(2**10, 2**10)))


@pytest.mark.parametrize("shape", [(WIDE + 3, WIDE), (WIDE, WIDE - 1)])
def test_transposed_rows_are_a_copy_for_wide_matrices_only(shape: tuple[int, int]) -> None:
    values = random(*shape, dtype=torch.bfloat16)
    transposed = rows_for_product(values)
    assert torch.equal(transposed, values.T)
    assert transposed.is_contiguous() == (min(shape) >= WIDE)
