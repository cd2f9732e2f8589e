"""The products of a ternary layer in bytes: Y = X W^T forward, and the two of the backward pass.

Forward, codes of X and W are integers already: int8 products give the sums exactly, where a product in bfloat16 rounds each
sum before the scales multiply it. In float32 both are equal bit for bit. Which is faster is the device's affair.

Backward, with the gradient G of Y, and codes that multiply with scales to X (a scale a token) and W (one scale):

    dX = G W            = (G @ w_codes) * w_scale
    dW = G^T X          = G^T @ (x_codes * x_scale) = (G * x_scale)^T @ x_codes

`exact` writes X out, rounded once to the compute dtype. But one factor of each product is integer codes already: `int8` and
`fp8` round the other one to a byte, with one scale a row of the product's left factor, which can therefore be taken out of
the sum: a token of G in dX, an output channel of G * x_scale in dW. The forward pass, biases and stored gradients stay as
they are.

int8   sums are exact integers; what is lost is G's rounding. dX is SwitchBack's (arXiv:2304.13013), which keeps dW in 16
       bits, as its sum runs over all tokens and an output channel's largest token decides the step of all of them. Here dW
       is rounded too: read the measured errors before use.
fp8    G in e5m2; codes in e4m3, where -1, 0, 1 and 4-bit activations are exact, but 8-bit ones above 16 are not (four
       significant bits: up to 1/17 off, 2.7% together). e5m2 costs 5.2% of a normal gradient. With a scale a row, e4m3 would
       cost 2.6%; e5m2 keeps values down to 2^-32 of a row's largest instead of 2^-18. Which one trains better is not known.

A scale belongs to the rows of one micro-batch on one process. So with these options accumulation and sharding are no longer
exact: other cuts of the same batch round dW otherwise, by as much as the errors below.

Measured errors: docs/training_performance.md, `benchmark/gradient_errors.py`.

Devices differ in what they accept; `fits` takes the rules of the strictest, CUDA, everywhere, so that one configuration
computes one function on every device. What does not fit is multiplied exactly. Both factors lie with the summed dimension
innermost, the one layout that every GPU's int8 and float8 products take; that transposes two matrices of bytes.

On a CPU, products with the weight's codes (Y and dX) are made by our own kernels from two bits a weight
(`quantization/cpu_kernels.py`), which is also how the weight is kept between the passes. dW has no ternary factor: where
the CPU has int8 instructions it takes `torch._int_mm`, which is else a plain loop, 50 times slower than float32, in which
sums of up to 1024 products of codes are exact as well. float8 is emulated on every CPU: values are rounded, products are
float32. So on a CPU the two options of the backward pass show errors more than they save time.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from wrinklefree.quantization import cpu_kernels
from wrinklefree.quantization.activation_quant import ActivationCodes
from wrinklefree.quantization.gradient_quant import gradient_to_float8, gradient_to_int8
from wrinklefree.quantization.options import BackwardProducts, ForwardProducts
from wrinklefree.quantization.pieces import rows_for_product, scaled_rows

FEWEST_INT8_ROWS = 17
"""`torch._int_mm` on CUDA wants more than 16 rows of its left factor."""
LONGEST_INT8_SUM = (2**31 - 1) // (127 * 128)
"""Products of a gradient's int8 and a code that surely fit into an int32 sum."""
EXACT_IN_FLOAT32 = 1024
"""The same for integers that float32 holds, 2^24, as a power of two."""
MULTIPLES = {"int8": 8, "fp8": 16}
"""Of what CUDA wants the summed dimension and the columns to be a multiple."""

_capabilities = torch.cpu.get_capabilities()
CPU_MULTIPLIES_INT8 = any(bool(_capabilities.get(name)) for name in ("avx512_vnni", "amx_int8"))
"""Whether `torch._int_mm` is faster than float32 on this CPU."""


def fits(kind: BackwardProducts, rows: int, summed: int, columns: int) -> bool:
    """Whether a product [rows, summed] x [summed, columns] can be made in `kind`; never for `exact`."""
    if kind == "exact":
        return False
    multiple = MULTIPLES[kind]
    if min(rows, summed, columns) < 1 or summed % multiple or columns % multiple:
        return False
    return kind == "fp8" or (rows >= FEWEST_INT8_ROWS and summed <= LONGEST_INT8_SUM)


@torch.compiler.assume_constant_result
def multiplies_tiles(kind: ForwardProducts, dtype: torch.dtype, summed: int) -> bool:
    """Whether a CPU's forward product reads the weight in two bits."""
    if kind == "float" or summed > cpu_kernels.WIDEST:
        return False
    return (
        cpu_kernels.multiplies_faster(dtype)
        if kind == "auto"
        else dtype in cpu_kernels.TYPES and cpu_kernels.has_kernels()
    )


class TernaryWeight(NamedTuple):
    """A weight as products read it."""

    values: Tensor
    """-1, 0 and 1 in the compute dtype, [out_features, in_features]; or packed in tiles (`cpu_kernels.pack_ternary`)."""
    scale: Tensor
    """float32, 0-dimensional."""
    shape: tuple[int, int]
    dtype: torch.dtype
    """The compute dtype."""

    @property
    def packed(self) -> bool:
        """Whether `values` are tiles."""
        return self.values.dtype == torch.uint8

    def codes(self) -> Tensor:
        """-1, 0 and 1 in the compute dtype, [out_features, in_features]."""
        return cpu_kernels.unpack_ternary(self.values, self.shape, None, self.dtype) if self.packed else self.values


def output_product(
    x_codes: Tensor, x_scale: Tensor | None, weight: TernaryWeight, *, kind: ForwardProducts, overwrite: bool
) -> Tensor:
    """Output without bias, [..., out_features], in the compute dtype.

    Args:
        x_codes: int8 [..., in_features]; the input itself where it is not quantized.
        x_scale: float32 [..., 1]; None where the input is not quantized: then the product is made in the compute dtype.
        weight: Packed where `multiplies_tiles`.
        kind: How to multiply, where it fits.
        overwrite: Scale a product where it lies.
    """
    if x_scale is None:
        product = functional.linear(x_codes.to(weight.dtype), weight.codes())
        return product.mul_(weight.scale) if overwrite else product * weight.scale
    tokens, (columns, summed) = x_codes.numel() // x_codes.shape[-1], weight.shape
    whole = kind == "int8" and fits("int8", tokens, summed, columns)
    if weight.packed and (whole or kind == "auto"):
        return cpu_kernels.ternary_product(x_codes, x_scale, weight.values, weight.scale, columns, weight.dtype)
    codes = weight.codes()
    if whole:
        sums = integer_product(x_codes.reshape(tokens, summed), codes.to(torch.int8)).to(torch.float32)
        return (
            sums.mul_(x_scale.reshape(tokens, 1) * weight.scale).to(codes.dtype).reshape(*x_codes.shape[:-1], columns)
        )
    product = functional.linear(x_codes.to(codes.dtype), codes)
    return scaled_rows(product, x_scale * weight.scale, out=product if overwrite else None)


def grad_input(grad: Tensor, weight: TernaryWeight, *, dtype: torch.dtype, kind: BackwardProducts = "exact") -> Tensor:
    """Gradient of the input, [..., in_features], in `dtype`.

    Args:
        grad: [..., out_features], in the compute dtype.
        weight: Codes or tiles.
        dtype: The input's.
        kind: How to multiply, where it fits.
    """
    tokens = grad.numel() // grad.shape[-1]
    if not fits(kind, tokens, *weight.shape):
        if weight.packed and grad.dtype == torch.float32:
            return (grad @ cpu_kernels.unpack_ternary(weight.values, weight.shape, weight.scale, grad.dtype)).to(dtype)
        # In bfloat16 the scale would be rounded, for all weights alike.
        return (grad @ weight.codes()).to(dtype).mul_(weight.scale)
    transposed = weight.codes().T
    if kind == "int8" and grad.device.type == "cpu" and multiplies_tiles("int8", torch.float32, grad.shape[-1]):
        rounded = gradient_to_int8(grad.reshape(tokens, -1))
        tiles = cpu_kernels.pack_ternary(transposed.to(torch.int8))
        product = cpu_kernels.ternary_product(
            rounded.values, rounded.scale, tiles, weight.scale, weight.shape[1], torch.float32
        )
        return product.to(dtype).reshape(*grad.shape[:-1], -1)
    product, scale = _rounded_product(grad.reshape(tokens, -1), transposed, kind)
    return product.mul_(scale * weight.scale).to(dtype).reshape(*grad.shape[:-1], -1)


def grad_weight(
    grad: Tensor, x_codes: Tensor, x_scale: Tensor | None, *, dtype: torch.dtype, kind: BackwardProducts = "exact"
) -> Tensor:
    """Gradient of the weight, [out_features, in_features], in `dtype`.

    Args:
        grad: [..., out_features], in the compute dtype.
        x_codes: int8 [..., in_features]; the input itself where it is not quantized.
        x_scale: float32 [..., 1]; None where the input is not quantized: then the product is exact, whatever `kind` is.
        dtype: The weight's.
        kind: How to multiply, where it fits.
    """
    tokens = grad.numel() // grad.shape[-1]
    if x_scale is None or not fits(kind, grad.shape[-1], tokens, x_codes.shape[-1]):
        inputs = x_codes.to(grad.dtype) if x_scale is None else ActivationCodes(x_codes, x_scale).dequantize(grad.dtype)
        return (rows_for_product(grad.flatten(0, -2)) @ inputs.flatten(0, -2)).to(dtype)
    # float32: in the compute dtype the scaled gradient would be rounded twice.
    scaled = (grad.to(torch.float32) * x_scale).reshape(tokens, -1)
    product, scale = _rounded_product(scaled.T, x_codes.reshape(tokens, -1).T, kind)
    return product.mul_(scale).to(dtype)


def _rounded_product(left: Tensor, codes: Tensor, kind: BackwardProducts) -> tuple[Tensor, Tensor]:
    """float32 [M, N] and its scale [M, 1]: `left` [M, K], rounded by rows, times the codes [N, K], transposed."""
    if kind == "int8":
        rounded = gradient_to_int8(left)
        integers = integer_product(rounded.values.contiguous(), codes.to(torch.int8).contiguous())
        return integers.to(torch.float32), rounded.scale
    rounded = gradient_to_float8(left)
    return float8_product(rounded.values.contiguous(), codes.to(torch.float8_e4m3fn).contiguous()), rounded.scale


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T` of int8 [M, K] and [N, K] as int32 [M, N], exactly; K at most `LONGEST_INT8_SUM`."""
    if left.device.type != "cpu" or CPU_MULTIPLIES_INT8:
        return torch._int_mm(left, right.T)  # pyright: ignore[reportPrivateImportUsage]
    pairs = zip(left.split(EXACT_IN_FLOAT32, 1), right.split(EXACT_IN_FLOAT32, 1), strict=True)
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32)
    for mine, theirs in pairs:
        total += _float32_product(mine, theirs).to(torch.int32)
    return total


def float8_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T` of float8 [M, K] and [N, K] as float32 [M, N]; emulated in float32 but on CUDA."""
    if left.device.type != "cuda":
        return _float32_product(left, right)
    one = torch.ones((), dtype=torch.float32, device=left.device)
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        left, right.T, scale_a=one, scale_b=one, out_dtype=torch.float32
    )


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    # A backward pass may run inside autocast, which would round the sums.
    with torch.autocast(left.device.type, enabled=False):
        return left.to(torch.float32) @ right.to(torch.float32).T
