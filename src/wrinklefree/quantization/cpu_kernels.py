"""The C kernels as operators of PyTorch: weights and activations to codes and back, weights to two bits, the ternary product.

`torch.ops.wrinklefree.*` run on CPU tensors; shapes and types are known without running them, so a compiled graph goes on
around them. What they compute is, bit for bit, what the readable functions that call them compute: integer sums are exact,
and roundings and scales are float32 in the same order.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from wrinklefree.native.library import BF16, F32, chosen_isa, is_available
from wrinklefree.native.pack import COLUMNS, ROWS, padded
from wrinklefree.native.runner import run_kernel
from wrinklefree.utils.errors import EngineError

TYPES = {torch.float32: F32, torch.bfloat16: BF16}
"""Of activations and products."""
WIDEST = 131072
"""Columns whose sums, at most 127 each, float32 holds exactly; also what the kernels' own sums hold (csrc/kernels.h)."""


@cache
def has_kernels() -> bool:
    """Whether the library is there, with instructions that are faster than float32 products."""
    return is_available() and chosen_isa() != b"plain"


@cache
def multiplies_faster(dtype: torch.dtype) -> bool:
    """Whether a CPU makes products of ternary weights faster here than in `dtype`.

    A multiply instruction takes four to eight times as many bytes as float32 numbers. Where the CPU multiplies bfloat16 in
    tiles (AMX), its bytes gain little and were not measured.
    """
    if dtype not in TYPES or not has_kernels():
        return False
    return dtype == torch.float32 or not torch.cpu.get_capabilities().get("amx_bf16", False)


def takes(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether activations or codes `x` can be handed to C, for floats in `dtype`; in a compiled graph the compiler fuses."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and dtype in TYPES
        and x.numel() > 0
        and has_kernels()
    )


def encode_activation(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`quantize_activation`: codes int8 [..., D] and scales float32 [..., 1] of float32 or bfloat16 [..., D]."""
    codes: tuple[Tensor, Tensor] = torch.ops.wrinklefree.encode_activation(x, bits)
    return codes


def decode_activation(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes * scale of int8 [..., D] and float32 [..., 1], rounded once to `dtype`, float32 or bfloat16."""
    values: Tensor = torch.ops.wrinklefree.decode_activation(codes, scale, dtype)
    return values


def ternarize(weight: Tensor, scale: Tensor) -> Tensor:
    """`round_to_codes`: int8 of a float32 weight and a scale of one element."""
    codes: Tensor = torch.ops.wrinklefree.ternarize(weight, scale)
    return codes


def pack_ternary(codes: Tensor) -> Tensor:
    """int8 codes -1, 0 and 1 [out, in] as tiles, uint8 [blocks of 64 rows, groups of 4 columns, 64]."""
    tiles: Tensor = torch.ops.wrinklefree.pack_ternary(codes)
    return tiles


def unpack_ternary(tiles: Tensor, shape: tuple[int, int], scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes, times a scale of one element where there is one, [out, in] of `shape`, in float32 or bfloat16."""
    weight: Tensor = torch.ops.wrinklefree.unpack_ternary(tiles, *shape, scale, dtype)
    return weight


def ternary_product(
    codes: Tensor, scale: Tensor, tiles: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype
) -> Tensor:
    """(codes @ weight codes^T) * (scale * weight_scale), [..., out_features] in `dtype`, float32 or bfloat16.

    Args:
        codes: int8 [..., in_features], in_features at most `WIDEST`.
        scale: float32 [..., 1].
        tiles: `pack_ternary` of the weight's codes.
        weight_scale: float32, 0-dimensional.
        out_features: Rows of the weight.
        dtype: Of the result, rounded once.
    """
    product: Tensor = torch.ops.wrinklefree.ternary_product(codes, scale, tiles, weight_scale, out_features, dtype)
    return product


_library: Any = torch.library
_operators: Any = _library.Library("wrinklefree", "DEF")
_operators.define("encode_activation(Tensor x, int bits) -> (Tensor, Tensor)")
_operators.define("decode_activation(Tensor codes, Tensor scale, ScalarType dtype) -> Tensor")
_operators.define("ternarize(Tensor weight, Tensor scale) -> Tensor")
_operators.define("unpack_ternary(Tensor tiles, int rows, int columns, Tensor? scale, ScalarType dtype) -> Tensor")
_operators.define("pack_ternary(Tensor codes) -> Tensor")
_operators.define(
    "ternary_product(Tensor codes, Tensor scale, Tensor tiles, Tensor weight_scale, int out_features, ScalarType dtype)"
    " -> Tensor"
)


def _empty_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _empty_values(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _empty_weight_codes(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.int8)


def _empty_weight(tiles: Tensor, rows: int, columns: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return tiles.new_empty((rows, columns), dtype=dtype)


def _empty_tiles(codes: Tensor) -> Tensor:
    rows, columns = codes.shape
    return codes.new_empty((padded(rows) // ROWS, padded(columns, COLUMNS) // COLUMNS, ROWS), dtype=torch.uint8)


def _empty_product(
    codes: Tensor, scale: Tensor, tiles: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], out_features), dtype=dtype)


def _encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    x, width = x.contiguous(), x.shape[-1]
    codes, scale = _empty_codes(x, bits)
    _call("wf_encode", scale.numel(), width, TYPES[x.dtype], x, 2 ** (bits - 1) - 1, codes, scale)
    return codes, scale


def _decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    codes, scale = codes.contiguous(), scale.contiguous()
    values = _empty_values(codes, scale, dtype)
    _call("wf_decode", scale.numel(), codes.shape[-1], codes, scale, TYPES[dtype], values)
    return values


def _pack(codes: Tensor) -> Tensor:
    codes, tiles = codes.contiguous(), _empty_tiles(codes)
    _call("wf_pack", *codes.shape, codes, tiles)
    return tiles


def _ternarize(weight: Tensor, scale: Tensor) -> Tensor:
    weight = weight.contiguous()
    codes = _empty_weight_codes(weight, scale)
    _call("wf_ternarize", weight.numel(), weight, ctypes.c_float(scale.item()), codes)
    return codes


def _unpack(tiles: Tensor, rows: int, columns: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight = _empty_weight(tiles, rows, columns, scale, dtype)
    _check_tiles(tiles, rows, columns)
    _call(
        "wf_unpack", rows, columns, tiles, ctypes.c_float(1.0 if scale is None else scale.item()), TYPES[dtype], weight
    )
    return weight


def _multiply(
    codes: Tensor, scale: Tensor, tiles: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype
) -> Tensor:
    codes, scale = codes.contiguous(), scale.contiguous()
    product = _empty_product(codes, scale, tiles, weight_scale, out_features, dtype)
    tokens, width = scale.numel(), codes.shape[-1]
    _check_tiles(tiles, out_features, width)
    if tokens > 0:
        _call(
            "wf_multiply", tiles, ctypes.c_float(weight_scale.item()), out_features, width, tokens, codes, scale,
            TYPES[dtype], product,
        )  # fmt: skip
    return product


def _check_tiles(tiles: Tensor, rows: int, columns: int) -> None:
    if tiles.shape != (padded(rows) // ROWS, padded(columns, COLUMNS) // COLUMNS, ROWS) or not tiles.is_contiguous():
        raise EngineError(f"tiles of shape {tuple(tiles.shape)} are not a weight of {rows} x {columns}")


def _call(name: str, *arguments: Tensor | int | ctypes.c_float) -> None:
    run_kernel(name, *(one.data_ptr() if isinstance(one, Tensor) else one for one in arguments))


for _name, _run, _fake in (
    ("encode_activation", _encode, _empty_codes),
    ("decode_activation", _decode, _empty_values),
    ("ternarize", _ternarize, _empty_weight_codes),
    ("pack_ternary", _pack, _empty_tiles),
    ("unpack_ternary", _unpack, _empty_weight),
    ("ternary_product", _multiply, _empty_product),
):
    _operators.impl(_name, _run, "CPU")
    _library.register_fake(f"wrinklefree::{_name}", _fake, lib=_operators)
