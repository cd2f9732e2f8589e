"""Plain numbers as bytes: bit for bit what llama.cpp's own package writes."""

import gguf
import numpy as np
import pytest

from wrinklefree.quantization.number_types import NUMBER_TYPES, encode_values
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.gguf_blocks import FORMATS_BY_NAME, decode_tensor


def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 96)) * rng.choice([1e-6, 1e-3, 1, 100], (300, 1))
    rows[3] = 0
    # Exact halves, which round away from zero.
    rows[4, :32] = np.arange(32) - 15.5
    rows[4, 0] = 127
    return rows.astype(np.float32)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0"])
def test_bytes_equal_those_of_the_gguf_package(name: str) -> None:
    expected = gguf.quantize(values(), getattr(gguf.GGMLQuantizationType, name)).view(np.uint8)
    np.testing.assert_array_equal(encode_values(values(), name), expected.reshape(-1))


@pytest.mark.parametrize(("name", "relative"), [("F32", 0.0), ("F16", 2.0**-11), ("BF16", 2.0**-8)])
def test_round_trip_is_within_the_precision(name: str, relative: float) -> None:
    rows = values()
    read = decode_tensor(FORMATS_BY_NAME[name], encode_values(rows, name), rows.shape)
    # fp16 has no full precision below 2^-14.
    assert (np.abs(read - rows) <= relative * np.maximum(np.abs(rows), 2.0**-14)).all()


def test_pieces_of_a_large_tensor_are_joined() -> None:
    rows = np.arange(3 * 2**20, dtype=np.float32).reshape(3, -1)
    read = decode_tensor(FORMATS_BY_NAME["F32"], encode_values(rows, "F32"), rows.shape)
    np.testing.assert_array_equal(read, rows)


def test_bfloat16_ties_go_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001], dtype=np.uint32)
    assert encode_values(bits.view(np.float32), "BF16").view("<u2").tolist() == [0x3F80, 0x3F82, 0x3F81]


@pytest.mark.parametrize("name", list(NUMBER_TYPES))
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    rows = values()
    rows[7, 5] = bad
    with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
        encode_values(rows, name)


def test_values_beyond_a_type_name_the_wider_one() -> None:
    rows = np.full((1, 32), 65519.0, dtype=np.float32)
    assert encode_values(rows, "F16").view("<f2").max() == 65504
    with pytest.raises(CheckpointError, match="holds 65520, and fp16 ends at 65504; use BF16 or F32"):
        encode_values(rows + 1, "F16")
    with pytest.raises(CheckpointError, match="and fp16 ends at 65504"):
        encode_values(rows * 200, "Q8_0")
    with pytest.raises(CheckpointError, match="which BF16 rounds to infinity; use F32"):
        encode_values(np.full(1, 3.4e38, dtype=np.float32), "BF16")


def test_rows_that_are_no_blocks_are_refused() -> None:
    with pytest.raises(CheckpointError, match="Q8_0 stores rows in blocks of 32 weights, and 48 columns"):
        encode_values(np.zeros((2, 48), dtype=np.float32), "Q8_0")
    with pytest.raises(ValueError, match="values are float64"):
        encode_values(np.zeros((2, 32)), "F32")  # pyright: ignore[reportArgumentType]
