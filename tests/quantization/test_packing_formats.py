"""Encoders of ternary formats: exact bytes where a format can be spelt out, and round trips through the decoders."""

import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wrinklefree.quantization.packing import TERNARY_FORMATS, pack_codes, unpack_codes
from wrinklefree.quantization.weight_quant import ternarize
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.gguf_blocks import FORMATS_BY_NAME, BlockError, decode_tensor

FORMATS = list(TERNARY_FORMATS.values())
NAMES = [entry.name for entry in FORMATS]
HALF = [entry for entry in FORMATS if not entry.name.startswith("I2_S")]


def random_codes(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (rows, columns), dtype=np.int8)


def test_the_table_states_blocks_and_types() -> None:
    assert {entry.name: (entry.gguf_type, entry.block_size, entry.block_bytes, entry.layout) for entry in FORMATS} == {
        "TQ1_0": ("TQ1_0", 256, 54, None),
        "TQ2_0": ("TQ2_0", 256, 66, None),
        "Q2_0": ("Q2_0", 64, 18, None),
        "Q4_0": ("Q4_0", 32, 18, None),
        "I2_S_X86": ("I2_S", 128, 32, "x86"),
        "I2_S_ARM": ("I2_S", 64, 16, "arm"),
    }


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=st.integers(0, 999), scale=st.floats(1e-4, 60000))
def test_every_format_returns_codes_and_scale(name: str, rows: int, blocks: int, seed: int, scale: float) -> None:
    entry = TERNARY_FORMATS[name]
    codes = random_codes(rows, blocks * entry.block_size, seed)
    data = entry.pack(codes, scale)
    assert data.dtype == np.uint8
    assert data.shape == (FORMATS_BY_NAME[entry.gguf_type].nbytes(codes.shape),)
    read, stored = entry.unpack(data, *codes.shape)
    np.testing.assert_array_equal(read, codes)
    expected = np.float32(scale) if name.startswith("I2_S") else np.float32(np.float16(scale))
    assert stored == expected == entry.stored_scale(scale)
    values = decode_tensor(FORMATS_BY_NAME[entry.gguf_type], data, codes.shape, entry.layout)
    np.testing.assert_array_equal(values, codes * expected)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_bytes_equal_those_of_the_gguf_package(name: str) -> None:
    """Which derives d from each block's largest weight; here it is the same, as every block holds a weight of 1."""
    codes = random_codes(7, 512, 3)
    expected = gguf.quantize(codes * np.float32(0.25), getattr(gguf.GGMLQuantizationType, name))
    np.testing.assert_array_equal(TERNARY_FORMATS[name].pack(codes, 0.25), expected.reshape(-1))


def test_q2_0_puts_neighbours_into_a_byte() -> None:
    codes = np.zeros((1, 64), dtype=np.int8)
    codes[0, :5] = [1, -1, 0, 1, -1]
    data = TERNARY_FORMATS["Q2_0"].pack(codes, 0.5)
    # fp16 0.5, then digits 2, 0, 1, 2 from the lowest bits, then 0, 1, 1, 1, then zeros (digit 1).
    assert data.tolist() == [0x00, 0x38, 0b10_01_00_10, 0b01_01_01_00, *[0b01010101] * 14]


def test_q4_0_stores_seven_eight_nine() -> None:
    codes = np.zeros((1, 32), dtype=np.int8)
    codes[0, [0, 16]] = [1, -1]
    assert TERNARY_FORMATS["Q4_0"].pack(codes, 0.5).tolist() == [0x00, 0x38, 0x79, *[0x88] * 15]


@pytest.mark.parametrize(("name", "quarter"), [("I2_S_X86", 32), ("I2_S_ARM", 16)])
def test_i2_s_spreads_quarters_of_a_block_over_a_byte(name: str, quarter: int) -> None:
    codes = np.zeros((1, 4 * quarter), dtype=np.int8)
    codes[0, [0, quarter, 3 * quarter]] = [1, -1, 1]
    data = TERNARY_FORMATS[name].pack(codes, 0.1)
    assert data[:quarter].tolist() == [0b10_00_01_10, *[0b01010101] * (quarter - 1)]
    assert data[quarter:].tobytes() == np.float32(0.1).tobytes() + bytes(28)


@pytest.mark.parametrize("entry", HALF, ids=lambda entry: entry.name)
def test_blocks_of_zeros_carry_the_scale(entry) -> None:
    codes = np.zeros((2, 2 * entry.block_size), dtype=np.int8)
    codes[0, 0] = 1
    read, scale = entry.unpack(entry.pack(codes, 0.02), *codes.shape)
    assert scale == np.float32(np.float16(0.02))
    np.testing.assert_array_equal(read, codes)


def test_packed_ternarized_weights_decode_to_what_training_computes() -> None:
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(5)) * 0.03
    ternary = ternarize(weight)
    entry = TERNARY_FORMATS["I2_S_X86"]
    codes, scale = entry.unpack(entry.pack(ternary.codes.numpy(), float(ternary.scale)), 6, 256)
    assert torch.equal(torch.from_numpy(codes * scale), ternary.dequantize())


@pytest.mark.parametrize("entry", HALF, ids=lambda entry: entry.name)
@pytest.mark.parametrize("scale", [1e-5, 6.1e-5, 65520.0])
def test_scales_outside_fp16_name_the_alternative(entry, scale: float) -> None:
    codes = np.zeros((1, entry.block_size), dtype=np.int8)
    with pytest.raises(CheckpointError, match=rf"the scale {scale:.6g} .* outside fp16's range .* use I2_S or F32"):
        entry.pack(codes, scale)


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -0.5])
def test_scales_that_none_is_are_refused(entry, scale: float) -> None:
    with pytest.raises(CheckpointError, match=f"has the scale {scale}; it must be positive and finite"):
        entry.pack(np.zeros((1, entry.block_size), dtype=np.int8), scale)


def test_i2_s_keeps_a_scale_that_fp16_cannot() -> None:
    entry = TERNARY_FORMATS["I2_S_X86"]
    assert entry.unpack(entry.pack(random_codes(1, 128), 1e-5), 1, 128)[1] == np.float32(1e-5)


def test_columns_that_are_no_blocks_name_the_ways_out() -> None:
    with pytest.raises(
        CheckpointError, match=r"TQ2_0 stores rows in blocks of 256 .* 576 columns .* Q2_0 \(blocks of 64\)"
    ):
        TERNARY_FORMATS["TQ2_0"].pack(random_codes(4, 576), 0.1)
    assert len(TERNARY_FORMATS["Q2_0"].pack(random_codes(4, 576), 0.1)) == 4 * 9 * 18


@pytest.mark.parametrize("codes", [np.full((1, 256), 2, np.int8), np.zeros((1, 256), np.int16), np.zeros(256, np.int8)])
def test_codes_that_are_none_are_a_defect(codes: np.ndarray) -> None:
    with pytest.raises(ValueError, match="codes are"):
        TERNARY_FORMATS["TQ2_0"].pack(codes, 0.1)


def test_bytes_of_another_size_are_refused() -> None:
    with pytest.raises(BlockError, match="66 bytes, but 2x256 TQ2_0 takes 132"):
        TERNARY_FORMATS["TQ2_0"].unpack(np.zeros(66, dtype=np.uint8), 2, 256)


@pytest.mark.parametrize("name", NAMES)
def test_temporaries_stay_small_whatever_the_tensor(name: str) -> None:
    codes = np.zeros((1 << 14, 2048), dtype=np.int8)
    tracemalloc.start()
    try:
        data = TERNARY_FORMATS[name].pack(codes, 0.1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - data.nbytes < 64 * 2**20


@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=2),
    columns=st.integers(1, 13),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_packed_codes_return_whatever_the_row_length(shape: list[int], columns: int, seed: int) -> None:
    codes = torch.randint(-1, 2, (*shape, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_codes(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, -(-columns // 4))
    assert torch.equal(unpack_codes(packed, columns), codes)


def test_packed_codes_have_the_first_neighbour_lowest_and_zeros_behind() -> None:
    codes = torch.tensor([[1, -1, 0, 1, -1]], dtype=torch.int8)
    assert pack_codes(codes).tolist() == [[0b10_01_00_10, 0b01_01_01_00]]


def test_packed_codes_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.uint8 \[2, 3\] does not hold rows of 13 codes"):
        unpack_codes(torch.zeros(2, 3, dtype=torch.uint8), 13)
