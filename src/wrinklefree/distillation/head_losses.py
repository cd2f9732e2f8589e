"""Cross-entropy and logit KL in one chunked pass over the output head, with closed-form gradients.

A vocabulary of 152k words makes logits the largest tensor of a step, and distillation would hold several copies of
them. Here a block of rows is multiplied by the head, both losses and their gradient with respect to the logits are
taken in float32, the gradient is folded into those of the hidden states and of the head, and the block is dropped.

The gradients are made in the forward pass, so each loss's factor must be known there; in exchange nothing is computed
twice and nothing of size [rows, V] outlives its block. On a CPU a large vocabulary is cut into blocks as well
(`vocabulary_blocks`).

Rows: only rows that some loss needs reach the head. Picking them needs their number on the host. A batch knows its
targets before it is moved (`Batch.num_targets`), so nothing waits for the device; where the number is unknown and
counting would stall the device, all rows are kept and masked.

Shapes: N rows, D hidden size, V vocabulary, C rows of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from wrinklefree.distillation.vocabulary_blocks import Student, TeacherSide, blocked_losses
from wrinklefree.models.records import IGNORE

CHUNK_BYTES = {"cpu": 8 * 2**20}
"""Bytes of one float32 block of logits by device type; on a CPU a block should stay in the cache."""
DEFAULT_CHUNK_BYTES = 256 * 2**20
"""For every other device: accelerators need larger blocks to be busy."""
FEWEST_ROWS_A_CHUNK = 256
"""On a CPU, where the byte budget allows fewer rows than this (above 8192 words), blocks of the vocabulary are used."""


ReadRows = Callable[[slice], Tensor]
"""Rows of a chunk -> the teacher's log-probabilities at the temperature, float32 [C, V], for the caller to consume."""


class Targets(Protocol):
    """What the logit KL compares the student with; nothing of it gets a gradient."""

    @property
    def rows(self) -> Tensor:
        """[N]: rows that the KL counts, boolean, or how much it counts them."""
        ...

    @property
    def temperature(self) -> float:
        """Divides the logits of both."""
        ...

    @property
    def t_squared(self) -> bool:
        """Multiply the KL by temperature squared."""
        ...

    def reader(self, dtype: torch.dtype) -> ReadRows:
        """Reads a chunk; products use `dtype`. Called under `no_grad`, without autocast."""
        ...


@dataclass(frozen=True)
class SoftTargets:
    """A teacher that ran beside the student: its logits are made a chunk at a time."""

    hidden: Tensor
    """Teacher's final hidden states [N, D]; D may differ from the student's."""
    head: Tensor
    """Teacher's head [V, D]."""
    rows: Tensor
    temperature: float
    t_squared: bool

    def reader(self, dtype: torch.dtype) -> ReadRows:
        """See `Targets`."""
        hidden, weight = self.hidden.detach(), self.head.detach().to(dtype)

        def read(part: slice) -> Tensor:
            logits = (hidden[part].to(dtype) @ weight.T).float()
            return functional.log_softmax(logits.div_(self.temperature), dim=-1)

        return read


@dataclass(frozen=True)
class HeadLosses:
    """Sums over rows."""

    total: Tensor
    """cross_entropy_factor * cross_entropy + divergence_factor * divergence; the only differentiable value."""
    cross_entropy: Tensor
    divergence: Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that matrix products of `tensor` use: autocast's where it is on."""
    device_type = tensor.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype


def rows_a_chunk(device_type: str, vocabulary: int) -> int:
    """Rows of logits that fit the byte budget of one block, at least 16."""
    return max(16, CHUNK_BYTES.get(device_type, DEFAULT_CHUNK_BYTES) // (4 * vocabulary))


def select_rows(mask_N: Tensor, known_count: int | None) -> Tensor | None:
    """Indices of the true rows, or None to keep every row (their number is unknown and asking would stall)."""
    if mask_N.device.type == "cpu":
        return mask_N.nonzero().squeeze(1)
    if known_count is None:
        return None
    return torch.nonzero_static(mask_N, size=known_count).squeeze(1)


def head_losses(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor | None,
    *,
    soft: Targets | None = None,
    cross_entropy_factor: float = 0.0,
    divergence_factor: float = 0.0,
    chunk_rows: int | None = None,
) -> HeadLosses:
    """Cross-entropy of `labels_N` and KL(teacher || student) of `soft`, each a sum over its rows, in float32.

    Gradients reach `hidden_ND` and `head_VD`, never the teacher. With s the student's logits and t the teacher's,
    d CE / ds = softmax(s) - onehot and d KL / ds = (softmax(s / T) - softmax(t / T)) / T, times T^2 if `t_squared`.
    Products use the compute dtype (autocast's where it is on), softmaxes float32.

    Args:
        hidden_ND: Student's final hidden states of the chosen rows.
        head_VD: Student's head.
        labels_N: Targets; rows at `IGNORE` contribute nothing. None: no cross-entropy.
        soft: Teacher's side of the KL; None: no KL.
        cross_entropy_factor: Factor of the cross-entropy sum in `total`.
        divergence_factor: Factor of the KL sum in `total`.
        chunk_rows: Rows of a block; None takes the device's byte budget.
    """
    spec = _Spec(
        dtype=compute_dtype(hidden_ND),
        rows=chunk_rows or rows_a_chunk(hidden_ND.device.type, head_VD.shape[0]),
        cross_entropy_factor=cross_entropy_factor,
        divergence_factor=divergence_factor,
        temperature=soft.temperature if soft else 1.0,
        t_squared=soft.t_squared if soft else False,
        gradients=torch.is_grad_enabled(),
        by_vocabulary=(
            hidden_ND.device.type == "cpu"
            and chunk_rows is None
            and rows_a_chunk("cpu", head_VD.shape[0]) < FEWEST_ROWS_A_CHUNK
            and (soft is None or isinstance(soft, SoftTargets))
        ),
    )
    total, cross_entropy, divergence = _HeadLosses.apply(hidden_ND, head_VD, labels_N, soft, spec)
    return HeadLosses(total, cross_entropy.detach(), divergence.detach())


@dataclass(frozen=True)
class _Spec:
    dtype: torch.dtype
    rows: int
    cross_entropy_factor: float
    divergence_factor: float
    temperature: float
    t_squared: bool
    gradients: bool
    by_vocabulary: bool = False


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor | None,
        soft: Targets | None,
        spec: _Spec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden_needs, head_needs = (spec.gradients and needs for needs in ctx.needs_input_grad[:2])
        if spec.by_vocabulary:
            return _HeadLosses._forward_by_vocabulary(ctx, hidden, head, labels, soft, spec)
        grad_hidden = torch.zeros_like(hidden) if hidden_needs else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if head_needs else None
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head.to(spec.dtype)
            read = None if soft is None else soft.reader(spec.dtype)
            for start in range(0, hidden.shape[0], spec.rows):
                part = slice(start, start + spec.rows)
                states = hidden[part].to(spec.dtype)
                logits = (states @ weight.T).float()
                gradient: Tensor | None = None
                if labels is not None:
                    value, gradient = _cross_entropy_chunk(logits, labels[part], spec)
                    sums[0] += value
                if soft is not None and read is not None:
                    value, soft_gradient = _divergence_chunk(logits, read(part), soft.rows[part], spec)
                    sums[1] += value
                    gradient = soft_gradient if gradient is None else gradient.add_(soft_gradient)
                if gradient is None or not (hidden_needs or head_needs):
                    continue
                gradient = gradient.to(spec.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = (gradient @ weight).to(hidden.dtype)
                if grad_head is not None:
                    grad_head += gradient.T @ states
        return _finish(ctx, sums, (grad_hidden, None if grad_head is None else grad_head.to(head.dtype)), spec)

    @staticmethod
    def _forward_by_vocabulary(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor | None, soft: Targets | None, spec: _Spec
    ) -> tuple[Tensor, Tensor, Tensor]:
        teacher = None
        if isinstance(soft, SoftTargets):
            scale = soft.temperature**2 if soft.t_squared else 1.0
            teacher = TeacherSide(
                soft.hidden.detach(), soft.head.detach(), soft.rows, soft.temperature, scale, spec.divergence_factor
            )
        hidden_needs, head_needs = (spec.gradients and needs for needs in ctx.needs_input_grad[:2])
        with torch.autocast(hidden.device.type, enabled=False):
            losses = blocked_losses(
                Student(hidden, head, labels, spec.cross_entropy_factor),
                teacher,
                spec.dtype,
                hidden_needs=hidden_needs,
                head_needs=head_needs,
            )
        sums = torch.stack([losses.cross_entropy, losses.divergence])
        return _finish(ctx, sums, (losses.grad_hidden, losses.grad_head), spec)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the parameter name
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.gradients
        # Scaled in place and given away: a copy of the head's gradient would be the step's second largest tensor.
        ctx.gradients = None
        scaled = tuple(g if g is None else g.mul_(grad_outputs[0].to(g.dtype)) for g in (grad_hidden, grad_head))
        return (*scaled, None, None, None)


def _finish(
    ctx: Any, sums: Tensor, gradients: tuple[Tensor | None, Tensor | None], spec: _Spec
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the gradients for the backward pass; the total, and both sums apart."""
    ctx.gradients = gradients
    total = spec.cross_entropy_factor * sums[0] + spec.divergence_factor * sums[1]
    cross_entropy, divergence = sums.unbind()
    cross_entropy, divergence = cross_entropy.clone(), divergence.clone()
    ctx.mark_non_differentiable(cross_entropy, divergence)
    return total, cross_entropy, divergence


def _cross_entropy_chunk(logits_CV: Tensor, labels_C: Tensor, spec: _Spec) -> tuple[Tensor, Tensor]:
    """Sum of the targets' negative log-likelihoods, and factor * (softmax - onehot)."""
    is_target = labels_C != IGNORE
    index = labels_C.clamp(min=0).unsqueeze(1)
    log_probabilities = functional.log_softmax(logits_CV, dim=-1)
    value = -(log_probabilities.gather(1, index).squeeze(1) * is_target).sum()
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
    return value, gradient.mul_((is_target * spec.cross_entropy_factor).unsqueeze(1))


def _divergence_chunk(logits_CV: Tensor, log_teacher_CV: Tensor, rows_C: Tensor, spec: _Spec) -> tuple[Tensor, Tensor]:
    """Sum of KL(teacher || student) over the rows, and its gradient times the factor. Consumes both inputs."""
    temperature = spec.temperature
    scale = temperature**2 if spec.t_squared else 1.0
    log_student = functional.log_softmax(logits_CV.div_(temperature), dim=-1)
    teacher = log_teacher_CV.exp()
    value = (log_teacher_CV.sub_(log_student).mul_(teacher).sum(-1) * rows_C).sum() * scale
    row_factor = rows_C * (spec.divergence_factor * scale / temperature)
    return value, log_student.exp_().sub_(teacher).mul_(row_factor.unsqueeze(1))
