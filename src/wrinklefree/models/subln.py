"""Root-mean-square norms: the decoder's own, and SubLN, the norm that BitDistill adds in front of projections.

A SubLN of gain 1 destroys a pretrained function and no fixed gain keeps it, since a norm divides each token by its own
size. So SubLN has a strength that may rise from 0 (the identity) to 1 (the norm) during training.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """gain * x / rms(x) over the last dimension, in float32, returned in the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size]."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Size and epsilon, for printing."""
        return f"{self.weight.numel()}, eps={self.eps}"


class SubLN(RMSNorm):
    """RMSNorm before a projection (arXiv:2510.13998, eq. 4-5), mixed in by a strength s that is ours.

    y = (1 - s) x + s * gain * x / rms(x). At s = 0 the input itself is returned, at s = 1 the plain norm.
    """

    strength: Tensor

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        # On the CPU even when built on the meta device: no checkpoint would fill it.
        self.register_buffer("strength", torch.tensor(1.0, device="cpu"), persistent=False)
        self.strength_value = 1.0
        self.is_identity = False
        self.is_norm = True

    def set_strength(self, value: float) -> None:
        """Set s."""
        self.strength.fill_(value)
        self.strength_value = value
        self.is_identity = value == 0.0
        self.is_norm = value == 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size]."""
        if self.is_identity:
            return x
        if self.is_norm:
            return super().forward(x)
        values = x.float()
        normalised = functional.rms_norm(values, self.weight.shape, self.weight.float(), self.eps)
        return torch.lerp(values, normalised, self.strength).to(x.dtype)


def subln_or_identity(present: bool, size: int, eps: float) -> nn.Module:
    """A SubLN where the placement wants one; elsewhere a module without parameters that does nothing."""
    return SubLN(size, eps) if present else nn.Identity()


def set_subln_strength(model: nn.Module, value: float) -> None:
    """Set s of every SubLN: 0 is the identity, 1 the norm."""
    for module in model.modules():
        if isinstance(module, SubLN):
            module.set_strength(value)


def subln_strength_of(model: nn.Module) -> float:
    """Strength of the model's SubLNs; 1 where there are none, as there is nothing left to raise. Reads no tensor."""
    for module in model.modules():
        if isinstance(module, SubLN):
            return module.strength_value
    return 1.0
