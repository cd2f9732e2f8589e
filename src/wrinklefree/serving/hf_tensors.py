"""One tensor of an artifact as a Hugging Face file stores it.

Codes are what an export must not change. Packed codes keep them by construction. Master weights, from which the loading
class computes the codes again, need care: rounding a weight to bfloat16 may carry it across a threshold, and training
gathers weights there. So a weight that would change sides is moved to the next value on its own side.
"""

import torch
from torch import Tensor

from wrinklefree.quantization.weight_quant import MIN_WEIGHT_SCALE, Ternary, ternarize
from wrinklefree.utils.errors import CheckpointError

CODES_PER_BYTE = 4
_THRESHOLD = 0.5
_MARGIN = 2.0**-19
"""Relative distance from the threshold that survives another order of summation in the mean, and 1/mean for a division."""
_MAX_ROUNDS = 64
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def checked_ternary(name: str, weight: Tensor) -> Ternary:
    """Codes and scale of a weight.

    Raises:
        CheckpointError: it holds a NaN or an infinity.
    """
    ternary = ternarize(weight)
    if not bool(torch.isfinite(ternary.scale)):
        raise CheckpointError(f"{name} holds values that are not finite; export an earlier artifact")
    return ternary


def round_keeping_codes(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, such that its ternary codes are those of `weight`, on every device.

    A few values beside the thresholds move by one step of `dtype`; the scale, a mean over all, hardly notices.

    Raises:
        CheckpointError: the weight is not finite, or has too few values for any rounding to keep its codes.
    """
    wanted = checked_ternary(name, weight).codes
    rounded = weight.detach().to(dtype).contiguous().clone()
    for _ in range(_MAX_ROUNDS):
        inward, outward = _on_the_wrong_side(rounded, wanted)
        if not bool((inward | outward).any()):
            return rounded
        # Sign and magnitude: as integers, one more is one step away from zero.
        bits = rounded.view(_BITS[dtype])
        bits += outward.to(bits.dtype) - inward.to(bits.dtype)
    raise CheckpointError(
        f"{name} {list(weight.shape)} has weights too close to a threshold to keep its codes in {dtype}; "
        "export with --weights packed"
    )


def _on_the_wrong_side(values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where a value must shrink, and where it must grow, for its code to be `wanted` beyond doubt."""
    magnitude = values.float().abs()
    threshold = _THRESHOLD * magnitude.mean().clamp(min=MIN_WEIGHT_SCALE)
    is_zero = wanted == 0
    return is_zero & (magnitude > threshold * (1 - _MARGIN)), ~is_zero & (magnitude < threshold * (1 + _MARGIN))


def pack_row_blocks(codes: Tensor) -> Tensor:
    """Codes [out, in] as bytes [ceil(out / 4), in]: bits 2i of byte row j hold row i * ceil(out / 4) + j, plus 1.

    This is the layout of `transformers`; rows that fill up the last part are zeros (stored as 1).
    """
    rows = -(-codes.shape[0] // CODES_PER_BYTE)
    packed = torch.zeros((rows, *codes.shape[1:]), dtype=torch.uint8)
    for part in range(CODES_PER_BYTE):
        values = codes[part * rows : (part + 1) * rows].to(torch.uint8).add_(1)
        packed[: len(values)] |= values << (2 * part)
        packed[len(values) :] |= 1 << (2 * part)
    return packed


def unpack_row_blocks(packed: Tensor, rows: int) -> Tensor:
    """Codes int8 [rows, in] of bytes [ceil(rows / 4), in]."""
    parts = [(packed >> (2 * part)) & 3 for part in range(CODES_PER_BYTE)]
    return torch.cat(parts)[:rows].to(torch.int8) - 1
