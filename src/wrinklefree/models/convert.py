"""Stage 1: a full-precision model becomes a ternary one with SubLN (arXiv:2510.13998, eq. 4-5).

Weights are copied. What is new are the SubLN gains, measured on the un-quantized model so that a norm changes as little
as it can. A norm divides every token by its own RMS, which no fixed gain undoes for all tokens at once:

- `ones`: gain 1; destroys the pretrained function.
- `median`: one number a site, the median of the tokens' RMS. Robust: at down_proj a few tokens are tens of times larger.
- `per_channel`: for channel c the gain g that minimises sum_t (x_tc - g x_tc / rms_t)^2, that is
  sum_t(x_tc^2 / rms_t) / sum_t(x_tc^2 / rms_t^2).

Padding and the first position of each document are left out: the first token carries the attention sink, whose size
says nothing about the others. What no gain can do, the strength warm-up does (`BitNetSpec.subln_strength`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from wrinklefree.models.bitlinear import GAIN
from wrinklefree.models.config import BitNetSpec, Gain, Placement
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.models.weights import assemble, parameter_shapes
from wrinklefree.quantization.options import WeightScale
from wrinklefree.utils.errors import ConfigError

SITES: dict[Placement, dict[str, str]] = {
    "none": {},
    "output": {"self_attn.attn_sub_norm": "self_attn.o_proj", "mlp.ffn_sub_norm": "mlp.down_proj"},
    "per_projection": {
        f"{projection}_norm": projection
        for projection in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    },
}  # fmt: skip
"""Placement -> SubLN inside a block -> the projection whose input it normalises."""


def to_bitnet(
    model: CausalLM,
    *,
    placement: Placement,
    gain: Gain,
    activation_bits: Literal[4, 8] | None,
    strength: float,
    calibration: Sequence[Batch],
    weight_scale: WeightScale = "absmean",
    dead_zone_bias: float = 0.0,
) -> CausalLM:
    """A ternary model (still at lambda 0) with the weights of `model`, which is left as it was.

    Args:
        model: Full precision.
        placement: Where SubLN norms stand.
        gain: How their gains start.
        activation_bits: Bits of the activation codes; None leaves activations unquantized.
        strength: SubLN strength to start at: 0 keeps the function of `model` exactly, 1 is the norm.
        calibration: Text that gains other than `ones` are measured on.
        weight_scale: What multiplies codes to weights.
        dead_zone_bias: Share of the weights of code 0 that is added to the output; 0 for none.

    Raises:
        ConfigError: the model is ternary already, or there is no text to calibrate on.
    """
    if model.bitnet is not None:
        raise ConfigError(
            "stage 1 got a model that is ternary already; pass the full-precision one as training.init_from"
        )
    spec = BitNetSpec(
        placement=placement,
        gain=gain,
        activation_bits=activation_bits,
        weight_scale=weight_scale,
        dead_zone_bias=dead_zone_bias,
        subln_strength=1.0 if placement == "none" else strength,
    )
    gains = calibrate_gains(model, placement, gain, calibration)
    tensors = [*((name, parameter.detach()) for name, parameter in model.named_parameters()), *gains.items()]
    if weight_scale == "learned":
        tensors += [(name, torch.ones(1)) for name in parameter_shapes(model.architecture, spec) if name.endswith(GAIN)]
    embedding = model.model.embed_tokens.weight
    return assemble(
        model.architecture, spec, tensors, source="the model", device=embedding.device, dtype=embedding.dtype
    )


def calibrate_gains(model: CausalLM, placement: Placement, gain: Gain, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Parameter name -> gain of every SubLN that the placement asks for, float32.

    Raises:
        ConfigError: no token is left to measure on.
    """
    sites = dict(_sites(model, placement))
    if gain == "ones" or not sites:
        return {
            f"{name}.weight": torch.ones(_width(linear), device=linear.weight.device) for name, linear in sites.items()
        }
    make: Callable[[nn.Linear], _Statistic] = _MedianRms if gain == "median" else _LeastSquares
    statistics = {name: make(linear) for name, linear in sites.items()}
    seen = _Seen()
    hooks = [
        linear.register_forward_pre_hook(_observer(statistics[name], seen, model.architecture.rms_norm_eps))
        for name, linear in sites.items()
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                seen.mask = ((batch.document_ids != 0) & (batch.position_ids != 0)).to(model.head_weight.device)
                model(batch.to(model.head_weight.device))
                seen.tokens += int(seen.mask.sum())
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if seen.tokens == 0:
        raise ConfigError(f"subln.gain={gain} is measured on text and there is none; give data, or set subln.gain=ones")
    return {f"{name}.weight": statistic.gain() for name, statistic in statistics.items()}


class _Seen:
    """The batch that hooks are looking at."""

    mask: Tensor = torch.empty(0)
    tokens: int = 0


class _Statistic(Protocol):
    """What one site remembers of the tokens that pass."""

    def add(self, x: Tensor, rms: Tensor) -> None:
        """Take in tokens x [N, D] with their RMS [N, 1]."""
        ...

    def gain(self) -> Tensor:
        """The gain [D] that follows."""
        ...


class _MedianRms:
    """Keeps one number a token."""

    def __init__(self, linear: nn.Linear) -> None:
        self.width = _width(linear)
        self.values: list[Tensor] = []

    def add(self, x: Tensor, rms: Tensor) -> None:
        self.values.append(rms.flatten())

    def gain(self) -> Tensor:
        return torch.cat(self.values).quantile(0.5).expand(self.width).clone()


class _LeastSquares:
    """Keeps two sums a channel."""

    def __init__(self, linear: nn.Linear) -> None:
        self.numerator = torch.zeros(_width(linear), dtype=torch.float64, device=linear.weight.device)
        self.denominator = torch.zeros_like(self.numerator)

    def add(self, x: Tensor, rms: Tensor) -> None:
        normalised = x / rms
        self.numerator += (x * normalised).sum(0, dtype=torch.float64)
        self.denominator += normalised.square().sum(0, dtype=torch.float64)

    def gain(self) -> Tensor:
        # A channel that is always zero fits any gain; it gets what fits all channels together.
        common = self.numerator.sum() / self.denominator.sum()
        return torch.where(self.denominator > 0, self.numerator / self.denominator, common).float()


def _observer(statistic: _Statistic, seen: _Seen, eps: float) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0][seen.mask].float()
        if len(x):
            statistic.add(x, (x.square().mean(-1, keepdim=True) + eps).sqrt())

    return observe


def _sites(model: CausalLM, placement: Placement) -> Iterator[tuple[str, nn.Linear]]:
    for block_name, block in zip(model.block_names, model.blocks, strict=True):
        for norm, projection in SITES[placement].items():
            linear = block.get_submodule(projection)
            assert isinstance(linear, nn.Linear)
            yield f"{block_name}.{norm}", linear


def _width(linear: nn.Linear) -> int:
    return linear.in_features
