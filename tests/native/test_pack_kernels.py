"""The integer kernels of every instruction set against numpy's int32, and activation codes against training's."""

import ctypes

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from wrinklefree.native.library import chosen_isa, isa_names, load_library
from wrinklefree.native.pack import (
    pack_bytes,
    pack_nibbles,
    pack_ternary,
    padded,
    unpack_nibbles,
    unpack_ternary,
)
from wrinklefree.quantization.activation_quant import quantize_activation
from wrinklefree.utils.errors import ConfigError

TOKENS = (1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 16, 17, 31, 32, 33, 48, 63, 127, 128)
COLUMNS = (4, 8, 60, 64, 68, 192, 256, 576, 1028, 2560)


def pointer(array: NDArray) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data


def products(isa: str, tiles: NDArray[np.uint8], codes: NDArray[np.int8], columns: int) -> NDArray[np.int32]:
    """Sums [tokens, 64] of one block of 64 rows; codes are given without padding."""
    tokens, stride = len(codes), padded(columns)
    rows = np.zeros((tokens, stride), np.int8)
    rows[:, : codes.shape[1]] = codes
    sums = np.full((tokens + 1, 64), 123456789, np.int32)
    kind = {64: 0, 256: 1, 1088: 2}[tiles.shape[-1]]
    groups = tiles.shape[-2] * (8 if kind == 2 else 1)
    result = load_library().wf_products(
        isa.encode(), kind, pointer(tiles), groups, pointer(rows), stride, tokens, pointer(sums)
    )
    assert result == 0
    assert (sums[tokens] == 123456789).all(), "wrote beyond its rows"
    return sums[:tokens]


@pytest.fixture(params=isa_names())
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


def test_plain_c_is_always_there() -> None:
    assert isa_names()[-1] == "plain"
    assert chosen_isa("plain") == b"plain"
    with pytest.raises(ConfigError, match="does not run the instruction set 'z80'; it runs .*plain"):
        chosen_isa("z80")


def test_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRINKLEFREE_ENGINE_ISA", "plain")
    assert chosen_isa() == b"plain"


@pytest.mark.parametrize(("rows", "columns"), [(64, 4), (1, 1), (65, 7), (130, 576), (1100, 30)])
def test_tiles_hold_the_codes(rows: int, columns: int) -> None:
    codes = np.random.default_rng(0).integers(-1, 2, (rows, columns), dtype=np.int8)
    tiles = pack_ternary(codes)
    assert (unpack_ternary(tiles, rows, columns) == codes).all()
    rest = unpack_ternary(tiles, padded(rows), padded(columns, 4))
    rest[:rows, :columns] = 0
    assert not rest.any()


def test_one_byte_of_a_tile() -> None:
    codes = np.full((64, 8), -1, np.int8)
    codes[3, 6], codes[19, 6], codes[35, 6], codes[51, 6] = 1, 0, -1, 1
    tiles = pack_ternary(codes)
    assert tiles.shape == (1, 2, 64)
    assert tiles[0, 1, 4 * 3 + 2] == 2 | 1 << 2 | 0 << 4 | 2 << 6
    assert np.count_nonzero(tiles) == 1


@pytest.mark.parametrize("columns", COLUMNS)
def test_ternary_products_are_exact(isa: str, columns: int) -> None:
    random = np.random.default_rng(columns)
    weight = random.integers(-1, 2, (64, columns), dtype=np.int8)
    tiles = pack_ternary(weight)
    for tokens in TOKENS:
        codes = random.integers(-127, 128, (tokens, columns), dtype=np.int8)
        expected = codes.astype(np.int32) @ (weight.astype(np.int32) + 1).T
        assert (products(isa, tiles, codes, columns) == expected).all()


@pytest.mark.parametrize("columns", COLUMNS)
def test_byte_products_are_exact(isa: str, columns: int) -> None:
    random = np.random.default_rng(columns)
    stored = random.integers(1, 256, (64, columns), dtype=np.int32)
    tiles = stored.astype(np.uint8).reshape(64, columns // 4, 4).swapaxes(0, 1).reshape(1, columns // 4, 256).copy()
    for tokens in TOKENS:
        codes = random.integers(-64, 65, (tokens, columns), dtype=np.int8)
        assert (products(isa, tiles, codes, columns) == codes.astype(np.int32) @ stored.T).all()


@pytest.mark.parametrize("columns", [32, 64, 96, 576, 2560])
def test_nibble_products_are_exact(isa: str, columns: int) -> None:
    random = np.random.default_rng(columns)
    tiles = random.integers(0, 256, (1, columns // 32, 1088), dtype=np.uint8)
    tiles[:, :, 1024:] &= 63
    weight = unpack_nibbles(tiles, np.ones(64, np.float32)).astype(np.int64)
    for tokens in TOKENS:
        codes = random.integers(-127, 128, (tokens, columns), dtype=np.int8)
        assert (products(isa, tiles, codes, columns) == codes.astype(np.int64) @ weight.T).all()


@pytest.mark.parametrize("x", [127, -127])
@pytest.mark.parametrize("nibble", [0, 15])
def test_nibble_extremes_do_not_overflow(isa: str, x: int, nibble: int) -> None:
    tiles = np.full((1, 1024, 1088), nibble * 17, np.uint8)
    tiles[:, :, 1024:] = 63
    for tokens in (1, 2, 3):
        sums = products(isa, tiles, np.full((tokens, 32768), x, np.int8), 32768)
        assert (sums == x * (nibble - 8) * 63 * 32768).all()


@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (1, 1), (65, 33), (130, 96)])
def test_nibbles_are_near_the_weight(rows: int, columns: int) -> None:
    weight = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    tiles, scales = pack_nibbles(weight)
    restored = unpack_nibbles(tiles, scales)
    assert not restored[rows:].any()
    assert not restored[:, columns:].any()
    # Every value within its step of 1/7 of its group's largest, or cut at the shortest range that is tried.
    width = padded(columns, 32)
    largest = np.zeros((rows, width), np.float32)
    largest[:, :columns] = np.abs(weight)
    largest = largest.reshape(rows, -1, 32).max(axis=2).repeat(32, axis=1)[:, :columns]
    row_step = np.abs(weight).max(axis=1, keepdims=True) / 63
    assert (np.abs(restored[:rows, :columns] - weight) <= 0.29 * largest + row_step).all()
    if columns >= 32:
        assert np.linalg.norm(restored[:rows, :columns] - weight) < 0.1 * np.linalg.norm(weight)


def test_one_byte_of_a_nibble_tile() -> None:
    weight = np.zeros((64, 64), np.float32)
    weight[35, 32 + 6], weight[51, 32 + 6] = 7, -3.5
    tiles, scales = pack_nibbles(weight)
    assert tiles.shape == (1, 2, 1088)
    tile = tiles[0, 1, 128:256]
    assert [tile[64 + 4 * 3 + 2] & 15, tile[64 + 4 * 3 + 2] >> 4] == [15, 1]
    assert (tiles[0, 0, :1024] == 0x88).all()
    assert (tiles[0, 1, 1024 + 35], scales[35]) == (63, pytest.approx(1 / 63))


@pytest.mark.parametrize("x", [127, -127])
@pytest.mark.parametrize("weight", [-1, 0, 1])
@pytest.mark.parametrize("columns", [64, 1028, 9728, 131072])
def test_extremes_do_not_overflow(isa: str, x: int, weight: int, columns: int) -> None:
    tiles = pack_ternary(np.full((64, columns), weight, np.int8))
    for tokens in (1, 2, 4, 16):
        sums = products(isa, tiles, np.full((tokens, columns), x, np.int8), columns)
        assert (sums == x * (weight + 1) * columns).all()


@pytest.mark.parametrize("x", [64, -64])
@pytest.mark.parametrize("stored", [1, 255])
def test_byte_extremes_do_not_overflow(isa: str, x: int, stored: int) -> None:
    tiles = np.full((1, 16384 // 4, 256), stored, np.uint8)
    for tokens in (1, 2, 4, 16):
        sums = products(isa, tiles, np.full((tokens, 16384), x, np.int8), 16384)
        assert (sums == x * stored * 16384).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [1, 15, 64, 576, 1001])
def test_activation_codes_are_training_s(isa: str, bits: int, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(40, width, generator=generator) * torch.logspace(-7, 6, 40)[:, None]
    x[0] = 0
    x[1, 0] = float("inf")
    x[2, -1] = float("nan")
    x[3] = torch.round(x[3] * 4) / 4 / x[3].abs().max()  # many ties
    expected = quantize_activation(x, bits)
    codes, scales = np.empty((40, padded(width)), np.int8), np.empty(40, np.float32)
    assert (
        load_library().wf_quantize(
            isa.encode(), x.data_ptr(), 40, width, padded(width), 2 ** (bits - 1) - 1, pointer(codes), pointer(scales)
        )
        == 0
    )
    assert np.array_equal(scales, expected.scale[:, 0].numpy(), equal_nan=True)
    finite = torch.isfinite(x).all(dim=1).numpy()
    assert (codes[finite, :width] == expected.codes.numpy()[finite]).all()
    assert not codes[:, width:].any()
    assert not codes[~finite].any()


@pytest.mark.parametrize(("steps", "high"), [(127 * 128, 127), (63 * 128, 63)])
def test_two_planes_hold_wide_codes(isa: str, steps: int, high: int) -> None:
    x = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    x[0, :50] = torch.linspace(0.98, 1, 50) * x[0].abs().max()  # codes next to the largest
    codes, scales = np.empty((5, 2, 128), np.int8), np.empty(5, np.float32)
    assert (
        load_library().wf_quantize(isa.encode(), x.data_ptr(), 5, 100, 128, steps, pointer(codes), pointer(scales)) == 0
    )
    value = (codes[:, 0].astype(np.int32) * 128 + codes[:, 1])[:, :100]
    assert np.abs(value).max(axis=1).tolist() == [steps] * 5
    assert np.abs(value * scales[:, None] - x.numpy()).max() <= 0.5001 * scales.max()
    assert np.abs(codes[:, 0].astype(np.int32)).max() == high
    assert np.abs(codes[:, 1].astype(np.int32)).max() <= 64


def test_bytes_round_to_the_nearest() -> None:
    weight = np.random.default_rng(0).standard_normal((70, 6)).astype(np.float32)
    tiles, scales = pack_bytes(weight)
    stored = tiles.reshape(2, 2, 64, 4).swapaxes(1, 2).reshape(128, 8)
    restored = (stored.astype(np.float32) - 128) * scales[:, None]
    assert np.abs(restored[:70, :6] - weight).max() <= 0.5001 * scales.max()
    assert not restored[70:].any()
    assert np.allclose(scales[:70] * 127, np.abs(weight).max(axis=1))


def test_wrong_sizes_are_refused(isa: str) -> None:
    buffer = np.zeros(4096, np.int8)
    library = load_library()
    for groups, stride, tokens in [(0, 64, 1), (1, 60, 1), (17, 64, 1), (1, 64, 0)]:
        assert (
            library.wf_products(
                isa.encode(), 0, pointer(buffer), groups, pointer(buffer), stride, tokens, pointer(buffer)
            )
            == 1
        )
    for kind, groups in [(2, 12), (3, 8), (-1, 8)]:  # a 4-bit group has eight tiles
        problem = library.wf_products(
            isa.encode(), kind, pointer(buffer), groups, pointer(buffer), 64, 1, pointer(buffer)
        )
        assert problem == 1
    assert library.wf_products(b"nothing", 0, pointer(buffer), 1, pointer(buffer), 64, 1, pointer(buffer)) == 1
    assert ctypes.sizeof(ctypes.c_void_p) == 8
