"""Decoders of block formats against ggml's own code, against the `gguf` package, and I2_S against a plain loop."""

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wrinklefree.utils.gguf_blocks import (
    FORMATS_BY_ID,
    FORMATS_BY_NAME,
    TYPE_IDS,
    BlockError,
    decode_tensor,
    decode_ternary,
)

# Last byte of each fp16 number in a block: its exponent's upper bits, cleared so that random scales are finite.
SCALE_BYTES = {
    "Q4_0": (1,), "Q4_1": (1, 3), "Q8_0": (1,), "Q6_K": (209,), "TQ1_0": (53,), "TQ2_0": (65,), "Q2_0": (1,),
    "F16": (1,), "BF16": (),
}  # fmt: skip
KNOWN_TO_GGUF = [name for name in SCALE_BYTES if name != "Q2_0"]

GgmlDecode = Callable[[str, np.ndarray, int], np.ndarray]


class _TypeTraits(ctypes.Structure):
    """First fields of ggml_type_traits (ggml.h)."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        pytest.skip("needs xllamacpp: its wheel holds ggml")
    library = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_cpu_init()
    return library


def random_blocks(name: str, count: int, seed: int = 0) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 256, (count, FORMATS_BY_NAME[name].bytes), dtype=np.uint8)
    for at in SCALE_BYTES[name]:
        blocks[:, at] &= 0xBF
    return blocks


@pytest.mark.parametrize("name", [name for name in SCALE_BYTES if name not in {"F16", "BF16"}])
def test_random_bytes_decode_as_ggml_decodes_them(name: str, ggml: ctypes.CDLL) -> None:
    blocks = random_blocks(name, 50)
    count = 50 * FORMATS_BY_NAME[name].weights
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    to_float = function(ggml.ggml_get_type_traits(TYPE_IDS[name]).contents.to_float)
    expected = np.empty(count, dtype=np.float32)
    to_float(blocks.ctypes.data, expected.ctypes.data, count)
    np.testing.assert_array_equal(decode_tensor(FORMATS_BY_NAME[name], blocks.reshape(-1), (count,)), expected)


@pytest.mark.parametrize("name", KNOWN_TO_GGUF)
def test_random_bytes_decode_as_the_gguf_package_decodes_them(name: str) -> None:
    blocks = random_blocks(name, 64)
    expected = gguf.dequantize(blocks, getattr(gguf.GGMLQuantizationType, name))
    actual = decode_tensor(FORMATS_BY_NAME[name], blocks.reshape(-1), (64, FORMATS_BY_NAME[name].weights))
    np.testing.assert_array_equal(actual, expected)


def test_the_table_agrees_with_ggml_on_names_and_sizes(ggml: ctypes.CDLL) -> None:
    for number, block in FORMATS_BY_ID.items():
        traits = ggml.ggml_get_type_traits(number).contents
        if block.name == "I2_S":
            # BitNet.cpp's number 36 is one that llama.cpp has given up.
            assert b"REMOVED" in traits.type_name
            continue
        assert (traits.type_name.decode().upper(), traits.blck_size, traits.type_size) == (
            block.name.upper(),
            block.weights,
            block.bytes,
        )


def test_large_tensors_decode_in_pieces_like_small_ones() -> None:
    block = FORMATS_BY_NAME["TQ2_0"]
    blocks = random_blocks("TQ2_0", (1 << 20) // 256 + 3)
    whole = decode_tensor(block, blocks.reshape(-1), (len(blocks), 256))
    for at in (0, 4095, 4096, len(blocks) - 1):
        np.testing.assert_array_equal(whole[at], decode_tensor(block, blocks[at], (256,)))


def test_a_scale_that_is_not_finite_gives_values_that_are_not() -> None:
    blocks = random_blocks("TQ2_0", 1)
    blocks[0, 64:] = (0x00, 0x7C)
    values = decode_tensor(FORMATS_BY_NAME["TQ2_0"], blocks.reshape(-1), (256,))
    assert not np.isfinite(values).any()


def i2_s_by_a_loop(codes: np.ndarray, scale: float, block: int) -> np.ndarray:
    """The format as BitNet.cpp's quantize_i2_s describes it: one weight at a time into zeroed bytes."""
    flat = codes.reshape(-1)
    data = np.zeros(flat.size // 4 + 32, dtype=np.uint8)
    quarter = block // 4
    for index, code in enumerate(flat.tolist()):
        start, within = divmod(index, block)
        data[start * quarter + within % quarter] |= (code + 1) << (6 - 2 * (within // quarter))
    data[flat.size // 4 :][:4] = np.frombuffer(np.float32(scale).tobytes(), dtype=np.uint8)
    return data


@pytest.mark.parametrize(("layout", "block"), [("x86", 128), ("arm", 64)])
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_i2_s_is_read_in_both_layouts(layout: str, block: int, rows: int, blocks: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-1, 2, (rows, blocks * block), dtype=np.int8)
    data = i2_s_by_a_loop(codes, 0.3, block)
    read, scale = decode_ternary(FORMATS_BY_NAME["I2_S"], data, codes.shape, layout)
    np.testing.assert_array_equal(read, codes)
    assert scale == np.float32(0.3)
    values = decode_tensor(FORMATS_BY_NAME["I2_S"], data, codes.shape, layout)
    np.testing.assert_array_equal(values, codes * np.float32(0.3))


def test_i2_s_layouts_are_not_interchangeable() -> None:
    codes = np.random.default_rng(1).integers(-1, 2, (2, 128), dtype=np.int8)
    data = i2_s_by_a_loop(codes, 1.0, 128)
    assert not np.array_equal(decode_ternary(FORMATS_BY_NAME["I2_S"], data, codes.shape, "arm")[0], codes)


@pytest.mark.parametrize(
    ("layout", "columns", "byte", "problem"),
    [
        (None, 128, 0, "byte order None is not one of x86, arm"),
        ("mips", 128, 0, "byte order 'mips' is not one of x86, arm"),
        ("x86", 64, 0, "rows of 64 weights are no whole blocks of 128, as the x86 layout has"),
        ("x86", 128, 0xFF, "it holds the codes -1 to 2, ternary is -1 to 1"),
    ],
)
def test_i2_s_that_is_not_what_it_says_is_refused(layout: str | None, columns: int, byte: int, problem: str) -> None:
    data = np.zeros(columns // 4 + 32, dtype=np.uint8)
    data[0] = byte
    with pytest.raises(BlockError, match=problem):
        decode_tensor(FORMATS_BY_NAME["I2_S"], data, (1, columns), layout)


def tq2_0(scale_bytes: tuple[int, int], digit: int, count: int = 1) -> np.ndarray:
    block = np.full((count, 66), digit * 0b01010101, dtype=np.uint8)
    block[:, 64:] = scale_bytes
    return block


def test_ternary_gives_codes_and_scale_exactly() -> None:
    codes, scale = decode_ternary(FORMATS_BY_NAME["TQ2_0"], tq2_0((0x00, 0x38), 2, 3).reshape(-1), (3, 256))
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes, np.ones((3, 256)))
    assert scale == np.float32(0.5)
    assert scale.dtype == np.float32


def test_ternary_refuses_blocks_of_different_scale() -> None:
    blocks = tq2_0((0x00, 0x38), 1, 5)
    blocks[3, 64] = 1
    with pytest.raises(BlockError, match=r"block 3 has the scale 0\.500488\d*, block 0 has 0\.5"):
        decode_ternary(FORMATS_BY_NAME["TQ2_0"], blocks.reshape(-1), (5, 256))


def test_ternary_refuses_a_code_beyond_one() -> None:
    with pytest.raises(BlockError, match="it holds the codes 2 to 2"):
        decode_ternary(FORMATS_BY_NAME["TQ2_0"], tq2_0((0x00, 0x38), 3).reshape(-1), (256,))
    with pytest.raises(BlockError, match="it holds the codes -8 to -8"):
        decode_ternary(FORMATS_BY_NAME["Q4_0"], np.array([0, 0x38, *[0] * 16], dtype=np.uint8), (32,))


@pytest.mark.parametrize(
    ("scale_bytes", "shown"), [((0x00, 0xB8), "-0.5"), ((0x00, 0x7C), "inf"), ((0x01, 0x7C), "nan")]
)
def test_ternary_refuses_scales_that_none_is(scale_bytes: tuple[int, int], shown: str) -> None:
    with pytest.raises(BlockError, match=f"its scale is {shown}, expected a positive number"):
        decode_ternary(FORMATS_BY_NAME["TQ2_0"], tq2_0(scale_bytes, 1, 2).reshape(-1), (512,))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_numbers_are_ternary_when_their_magnitudes_agree(name: str) -> None:
    values = np.array([[0.375, -0.375, 0.0, -0.0], [0.0, 0.375, 0.375, -0.375]], dtype=np.float32)
    raw = {"F32": values, "F16": values.astype("<f2"), "BF16": (values.view(np.uint32) >> 16).astype("<u2")}[name]
    codes, scale = decode_ternary(FORMATS_BY_NAME[name], raw.view(np.uint8).reshape(-1), values.shape)
    np.testing.assert_array_equal(codes, [[1, -1, 0, 0], [0, 1, 1, -1]])
    assert scale == np.float32(0.375)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([0.5, 0.25, -0.5], r"it holds 0\.25, where 0 and ±0\.5 would be ternary"),
        ([0.5, float("nan")], "its scale is nan"),
        ([0.5, float("-inf")], "its scale is inf"),
    ],
)
def test_plain_numbers_that_are_not_ternary_are_refused(values: list[float], problem: str) -> None:
    data = np.array(values, dtype="<f4").view(np.uint8)
    with pytest.raises(BlockError, match=problem):
        decode_ternary(FORMATS_BY_NAME["F32"], data, (len(values),))
