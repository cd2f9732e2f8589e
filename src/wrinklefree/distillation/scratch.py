"""Work space of the losses that go block by block."""

import math

import torch
from torch import Tensor


class Scratch:
    """Named blocks that are written again and again, so that they stay in the cache and nothing is allocated anew."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[str, Tensor] = {}

    def block(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous block of this shape, not initialised; its earlier content is lost. A name keeps its dtype."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = torch.empty(size, dtype=dtype, device=self._device)
        return flat[:size].view(shape)
