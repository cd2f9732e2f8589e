"""Ternary linear layers of others, and plain ones, in our decoder: everything but the projections stays the same.

    linear       nn.Linear: what a full-precision step costs
    naive        straight-through estimators out of tensor operations, each micro-batch anew; the published formula of
                 onebitllms, whose kernels need a GPU
    autobitlinear  transformers' layer with `online_quant=True`; compiles its two rounding functions
    torchao      torchao's `bitnet_training` (int8 products); it stores weights in bfloat16 here, so it casts none

The peers are what a registry serves; one that is not installed is left out and said so.
"""

import copy
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn
from torch.nn import functional

from wrinklefree.models.bitlinear import BitLinear
from wrinklefree.models.llama import CausalLM


class NaiveBitLinear(nn.Linear):
    """Rounding by tensor operations under autograd, then an ordinary product."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        weight_scale = 1.0 / self.weight.abs().mean().clamp(min=1e-5)
        weight = (self.weight * weight_scale).round().clamp(-1, 1) / weight_scale
        weight = self.weight + (weight - self.weight).detach()
        scale = 127.0 / input.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        rounded = (input * scale).round().clamp(-128, 127) / scale
        rounded = input + (rounded - input).detach()
        return functional.linear(rounded, weight, self.bias)


def sharing_copy(model: CausalLM) -> CausalLM:
    """A copy whose parameters are the model's own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def replace_projections(model: CausalLM, make: Callable[[BitLinear], nn.Linear]) -> CausalLM:
    """The model with every BitLinear replaced by what `make` gives for it; parameters are shared."""
    changed = sharing_copy(model)
    for parent in list(changed.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BitLinear):
                layer = make(child)
                layer.weight, layer.bias = child.weight, child.bias
                setattr(parent, name, layer)
    return changed


def plain(model: CausalLM) -> CausalLM:
    """Full precision, SubLN and all."""
    return replace_projections(
        model, lambda old: nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
    )


def naive(model: CausalLM) -> CausalLM:
    """Straight-through estimators out of tensor operations."""
    return replace_projections(
        model, lambda old: NaiveBitLinear(old.in_features, old.out_features, old.bias is not None, device="meta")
    )


def autobitlinear(model: CausalLM) -> CausalLM:
    """Transformers' layer."""
    layer = import_module("transformers.integrations.bitnet").AutoBitLinear
    return replace_projections(
        model,
        lambda old: layer(
            old.in_features, old.out_features, old.bias is not None, device=torch.device("meta"), online_quant=True
        ),
    )


def torchao(model: CausalLM) -> CausalLM:
    """Torchao's layer, in bfloat16; a model of its own."""
    training = import_module("torchao.prototype.quantized_training")
    quantize = import_module("torchao.quantization").quantize_
    changed = copy.deepcopy(plain(model))
    changed.model.layers.to(torch.bfloat16)
    quantize(changed.model.layers, training.bitnet_training())
    return changed


def installed(package: str) -> str | None:
    """Its version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


PEERS: Mapping[str, tuple[Callable[[CausalLM], CausalLM], str]] = {
    "nn.Linear": (plain, "torch"),
    "naive STE": (naive, "torch"),
    "AutoBitLinear": (autobitlinear, "transformers"),
    "torchao": (torchao, "torchao"),
}
"""Name -> how it is made, and the package that it needs."""
