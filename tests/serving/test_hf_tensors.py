"""Tensors as Hugging Face files store them: codes survive, whatever the type."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wrinklefree.quantization.weight_quant import ternarize
from wrinklefree.serving.hf_tensors import checked_ternary, pack_row_blocks, round_keeping_codes, unpack_row_blocks
from wrinklefree.utils.errors import CheckpointError


def gathered_weight(rows: int, spread: float, seed: int) -> torch.Tensor:
    """[rows, 64] whose half gathers around half of the scale, as weights do in training."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 64, generator=generator)
    sign, noise = weight[:, ::2].sign(), 1 + spread * torch.randn(rows, 32, generator=generator)
    for _ in range(40):
        weight[:, ::2] = sign * noise * 0.5 * weight.abs().mean()
    return weight


@given(
    rows=st.integers(1, 19), columns=st.integers(1, 9), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_packing_is_undone_by_unpacking(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_row_blocks(codes)
    assert packed.shape == (-(-rows // 4), columns)
    assert torch.equal(unpack_row_blocks(packed, rows), codes)
    filled = unpack_row_blocks(packed, 4 * packed.shape[0])
    assert not filled[rows:].any()


def test_the_layout_is_row_blocks_from_the_lowest_bits() -> None:
    codes = torch.tensor([[1], [0], [-1], [1], [0], [0], [1], [-1]], dtype=torch.int8)
    # Byte 0 holds rows 0, 2, 4, 6; byte 1 holds rows 1, 3, 5, 7; each code plus one, two bits, the first lowest.
    assert pack_row_blocks(codes).tolist() == [[0b10_01_00_10], [0b00_01_10_01]]


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(2, 24),
    exponent=st.integers(-4, 2),
    spread=st.sampled_from([0.0, 1e-6, 1e-3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_codes_survive_rounding_next_to_the_thresholds(
    seed: int, rows: int, exponent: int, spread: float, dtype: torch.dtype
) -> None:
    weight = gathered_weight(rows, spread, seed)
    weight *= 10.0**exponent
    rounded = round_keeping_codes("w", weight, dtype)
    assert rounded.dtype == dtype
    wanted = ternarize(weight)
    kept = ternarize(rounded)
    assert torch.equal(kept.codes, wanted.codes)
    # The other formula in use, another order of summation, and another device's rounding of the mean.
    for scale in (kept.scale * (1 + 1e-6), kept.scale * (1 - 1e-6)):
        other = (rounded.float() * (1.0 / scale)).round().clamp(-1, 1)
        assert torch.equal(other.to(torch.int8), wanted.codes)
    step = torch.finfo(dtype).eps
    assert float((rounded.float() - weight).abs().max() / weight.abs().max()) <= 2 * step + 2**-18
    assert float(kept.scale / wanted.scale) == pytest.approx(1.0, abs=4 * step + 2**-18)


def test_plain_rounding_would_move_codes() -> None:
    weight = gathered_weight(64, 1e-3, seed=0)
    moved = ternarize(weight.bfloat16()).codes != ternarize(weight).codes
    assert int(moved.sum()) > 10
    assert torch.equal(ternarize(round_keeping_codes("w", weight, torch.bfloat16)).codes, ternarize(weight).codes)


@pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.full((4, 4), 1e-9), torch.full((4, 4), -3.0)])
def test_degenerate_weights_keep_their_codes(weight: torch.Tensor) -> None:
    rounded = round_keeping_codes("w", weight, torch.bfloat16)
    assert torch.equal(ternarize(rounded).codes, ternarize(weight).codes)


def test_the_weight_is_not_changed() -> None:
    weight = torch.tensor([[0.5, 1.0], [1.0, 1.5]])
    before = weight.clone()
    round_keeping_codes("w", weight, torch.float32)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(CheckpointError, match="layer.w holds values that are not finite"):
        checked_ternary("layer.w", torch.tensor([[1.0, value]]))
