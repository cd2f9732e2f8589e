"""Chains of element-wise operations on pieces of rows that stay in a core's cache.

On a CPU each operation of a chain reads and writes memory once for a large tensor, and an operation on two types is not
vectorised. Taken piece by piece through float32 scratch the same arithmetic, bit for bit, takes a third to a half of the
time (measured on the shapes of a 135M model: docs/training_performance.md). On a GPU, for small tensors, for
subclasses, and inside a compiled graph, where fusing is the compiler's work, nothing is cut.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

PIECE_ELEMENTS = 2**16
"""256 KiB of float32: two scratch pieces and what they are made of fit a second-level cache."""

WIDE = 1024
"""From this many rows and columns on, a transposed copy costs less than a product of a transposed view loses."""
TRANSPOSED_ROWS = 32
"""Rows that a transposed copy writes at once: one cache line of each of its rows."""


def pays(tensor: Tensor) -> bool:
    """Whether to cut this tensor."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and tensor.dim() >= 2
        and tensor.numel() > 2 * PIECE_ELEMENTS
        and type(tensor) in (Tensor, nn.Parameter)
    )


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of tensors [..., D_i] with equal leading dimensions; the first decides how many rows.

    A tensor that is written to must be contiguous, or what is written is lost.
    """
    rows = max(1, PIECE_ELEMENTS // max(1, tensors[0].shape[-1]))
    flat = [tensor.flatten(0, -2) for tensor in tensors]
    for start in range(0, len(flat[0]), rows):
        yield tuple(tensor[start : start + rows] for tensor in flat)


def scratch_like(tensor: Tensor) -> Tensor:
    """float32 of the size of a piece of `tensor`; the last piece uses a part of it."""
    rows = max(1, PIECE_ELEMENTS // max(1, tensor.shape[-1]))
    return torch.empty(rows, tensor.shape[-1], dtype=torch.float32)


def rows_for_product(values: Tensor) -> Tensor:
    """`values.T` of [M, N], laid out as the left factor of a product should be.

    A CPU's bfloat16 product of a transposed view takes twice the time of a contiguous left factor (measured with AMX on
    the shapes of a 135M and a 1B model); writing the transposed copy costs less than that for wide matrices only.
    """
    wide = values.device.type == "cpu" and values.dtype == torch.bfloat16 and min(values.shape) >= WIDE
    if not wide or type(values) is not Tensor:
        return values.T
    if torch.compiler.is_compiling():
        return values.T.contiguous()
    transposed = values.new_empty(values.shape[1], values.shape[0])
    for start in range(0, len(values), TRANSPOSED_ROWS):
        rows = slice(start, start + TRANSPOSED_ROWS)
        transposed[:, rows].copy_(values[rows].T)
    return transposed


def scaled_rows(values: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """`values * scale`, multiplied in float32, in the values' dtype; `out` may be `values`, and must be contiguous.

    Args:
        values: [..., D] of any floating dtype.
        scale: float32 [..., 1].
        out: Where the result goes; None makes a tensor.
    """
    writable = out is None or out.is_contiguous()
    if not writable or not pays(values) or values.dtype == torch.float32 or scale.shape[:-1] != values.shape[:-1]:
        if out is values:
            return values.mul_(scale)
        result = (values * scale).to(values.dtype)
        return result if out is None else out.copy_(result)
    out = torch.empty(values.shape, dtype=values.dtype) if out is None else out
    scratch = scratch_like(values)
    for part, factor, result in pieces(values, scale, out):
        result.copy_(scratch[: len(part)].copy_(part).mul_(factor))
    return out
