"""Alignment of hidden states, layer by layer, before any task: the loss of stage 1.9.

The stage is ours; the closest published loss is OneBit's squared distance of L2-normalised states (arXiv:2402.11295).
Each layer's distance is averaged over the positions that are not padding, and the layers are weighted.

    mse_normalized   sum over the hidden size of (s/|s| - t/|t|)^2 = 2 (1 - cos): a mean would shrink it D times
    cosine           1 - cos
    mse              mean over the hidden size of (s - t)^2: follows the few huge channels of a pretrained model
    kl               KL(teacher || student) of the logit lens: both states through the teacher's final norm and head
    inner_product    (<s, t> / <t, t> - 1)^2: the student's length along the teacher's state; blind to the rest, so
                     a choice for comparison. (Minimising -<s, t> itself has no lower bound.)

The mean cosine over layers and positions is reported with every choice, because losses of different kinds do not
compare and a small one can hide a poor match.

Shapes: N positions, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from wrinklefree.distillation.head_losses import SoftTargets, head_losses
from wrinklefree.distillation.weighted_sum import TermValues, reciprocal, require_teacher
from wrinklefree.models.records import Batch, ModelOutput, Wants
from wrinklefree.utils.errors import ConfigError

HIDDEN_STATES = "hidden_states"
"""Name of the term."""
MEAN_COSINE = "mean_cosine"
"""Name of the diagnostic that is reported with it, at weight 0."""

LossType = Literal["mse_normalized", "cosine", "mse", "kl", "inner_product"]
LayerWeights = Literal["progressive", "uniform", "exponential"] | tuple[float, ...] | None


def layer_weights(choice: LayerWeights, num_layers: int, *, normalize: bool) -> tuple[float, ...]:
    """One weight a layer, first to last: l, 2^l (l from 1), 1, or the given numbers; `normalize` makes the sum 1.

    Raises:
        ConfigError: Given numbers that are negative, all zero, or not one a layer.
    """
    match choice:
        case "progressive":
            weights = tuple(float(layer) for layer in range(1, num_layers + 1))
        case "exponential":
            weights = tuple(2.0**layer for layer in range(1, num_layers + 1))
        case "uniform" | None:
            weights = (1.0,) * num_layers
        case tuple():
            weights = choice
    if len(weights) != num_layers:
        raise ConfigError(
            f"layerwise.layer_weights holds {len(weights)} numbers, but the model has {num_layers} layers: "
            "give one number a layer, or progressive, uniform or exponential"
        )
    if min(weights) < 0 or sum(weights) == 0:
        raise ConfigError(
            f"layerwise.layer_weights={list(weights)}: weights must not be negative and one must be positive"
        )
    return tuple(weight / sum(weights) for weight in weights) if normalize else weights


class LayerwiseDistillation:
    """Weighted distance between the block outputs of student and teacher, which have the same shape."""

    names: tuple[str, ...] = (HIDDEN_STATES, MEAN_COSINE)
    smallest_value: float = 0.0

    def __init__(self, *, loss_type: LossType, weights: tuple[float, ...], temperature: float = 1.0) -> None:
        """Keep one weight a layer (a layer of weight 0 is only measured); `temperature` is of the logit lens."""
        self.loss_type: LossType = loss_type
        self.layer_weights = weights
        self.temperature = temperature
        self.student_wants: Wants = Wants(hidden_layers=tuple(range(len(weights))))
        self.teacher_wants: Wants | None = self.student_wants

    def counts(self, batch: Batch) -> dict[str, float]:
        """Positions that are not padding."""
        positions = float((batch.document_ids != 0).sum())
        return {HIDDEN_STATES: positions, MEAN_COSINE: positions}

    def __call__(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        batch: Batch,
        counts: Mapping[str, float],
        weights: Mapping[str, float],
    ) -> TermValues:
        """Distance of the micro-batch over the global count, and the mean cosine."""
        teacher = require_teacher(teacher, HIDDEN_STATES)
        share = reciprocal(counts[HIDDEN_STATES])
        counted_N = (batch.document_ids != 0).flatten()
        device = counted_N.device
        value = torch.zeros((), dtype=torch.float32, device=device)
        cosine = torch.zeros((), dtype=torch.float32, device=device)
        for layer, layer_weight in enumerate(self.layer_weights):
            student_ND = student.hidden_states[layer].flatten(0, 1)
            teacher_ND = teacher.hidden_states[layer].detach().flatten(0, 1)
            with torch.no_grad():
                cosine += (functional.cosine_similarity(student_ND.float(), teacher_ND.float()) * counted_N).sum()
            if layer_weight > 0:
                value = value + layer_weight * self._distance(student_ND, teacher_ND, counted_N, teacher)
        value = value * share
        mean_cosine = cosine * (share / len(self.layer_weights))
        return TermValues(weights[HIDDEN_STATES] * value, {HIDDEN_STATES: value.detach(), MEAN_COSINE: mean_cosine})

    def _distance(self, student_ND: Tensor, teacher_ND: Tensor, counted_N: Tensor, teacher: ModelOutput) -> Tensor:
        """Sum over counted positions of one layer's distance."""
        if self.loss_type == "kl":
            return self._logit_lens(student_ND, teacher_ND, counted_N, teacher)
        distance: Tensor = _MaskedDistance.apply(student_ND, teacher_ND, counted_N, _DISTANCES[self.loss_type])
        return distance

    def _logit_lens(self, student_ND: Tensor, teacher_ND: Tensor, counted_N: Tensor, teacher: ModelOutput) -> Tensor:
        with torch.no_grad():
            teacher_input_ND = teacher.final_norm(teacher_ND)
        soft = SoftTargets(teacher_input_ND, teacher.head_weight, counted_N, self.temperature, t_squared=False)
        head_VD = teacher.head_weight.detach()
        return head_losses(teacher.final_norm(student_ND), head_VD, None, soft=soft, divergence_factor=1.0).total


class _MaskedDistance(torch.autograd.Function):
    """Sum of a distance over the counted positions, recomputed in the backward pass.

    Float32 copies of every layer's states, kept for the gradient, would outweigh the model's own activations. (What
    `torch.utils.checkpoint` does, without the seconds that its first use spends importing a compiler.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_ND: Tensor,
        teacher_ND: Tensor,
        counted_N: Tensor,
        distance: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(student_ND, teacher_ND, counted_N)
        ctx.distance = distance
        return _masked_sum(distance, student_ND, teacher_ND, counted_N)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the parameter name
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, Tensor, Tensor] = ctx.saved_tensors
        student_ND, teacher_ND, counted_N = saved
        with torch.enable_grad():
            student_ND = student_ND.detach().requires_grad_()
            value = _masked_sum(ctx.distance, student_ND, teacher_ND, counted_N)
        gradient: Tensor = torch.autograd.grad(value, student_ND, grad_outputs[0])[0]
        return gradient, None, None, None


def _masked_sum(
    distance: Callable[[Tensor, Tensor], Tensor], student_ND: Tensor, teacher_ND: Tensor, counted_N: Tensor
) -> Tensor:
    values_N = distance(student_ND.float(), teacher_ND.float())
    return torch.where(counted_N, values_N, 0.0).sum()


def _mse_normalized(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    difference = functional.normalize(student_ND, dim=-1) - functional.normalize(teacher_ND, dim=-1)
    return difference.square().sum(-1)


def _cosine(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    return 1.0 - functional.cosine_similarity(student_ND, teacher_ND, dim=-1)


def _mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    return (student_ND - teacher_ND).square().mean(-1)


def _inner_product(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    own = teacher_ND.square().sum(-1).clamp(min=1e-12)
    return ((student_ND * teacher_ND).sum(-1) / own - 1.0).square()


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse_normalized": _mse_normalized,
    "cosine": _cosine,
    "mse": _mse,
    "inner_product": _inner_product,
}
