"""L_LD: KL between the softened next-token distributions of teacher and student (arXiv:2510.13998, eq. 8-9).

L_LD = KL(softmax(t / T) || softmax(s / T)), a mean over positions. The paper prints no T^2 and uses response positions;
its authors' code multiplies by T^2 and averages over every position that is not padding. Both are options.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from wrinklefree.distillation.head_losses import SoftTargets, Targets, head_losses, select_rows
from wrinklefree.distillation.token_scaling import document_numbers, surprise, token_weights
from wrinklefree.distillation.weighted_sum import CROSS_ENTROPY, TermValues, reciprocal, require_teacher
from wrinklefree.models.records import IGNORE, Batch, ModelOutput, Wants

LOGITS = "logits"
"""Name of the term."""


class LogitsDistillation:
    """KL(teacher || student) on next-token logits, and optionally cross-entropy from the same pass over the head."""

    student_wants: Wants = Wants()
    teacher_wants: Wants | None = Wants()
    smallest_value: float = 0.0

    def __init__(
        self,
        *,
        temperature: float,
        t_squared: bool,
        positions: Literal["response", "all"],
        with_cross_entropy: bool = False,
        token_scaling: float | None = None,
    ) -> None:
        """Settle the form; `with_cross_entropy` adds the value `cross_entropy` (saves a second pass over the head).

        `token_scaling` is the temperature of `token_weights`, for response positions; None counts tokens alike.
        """
        assert token_scaling is None or positions == "response", "only a target has a surprise"
        self.token_scaling = token_scaling
        self.temperature = temperature
        self.t_squared = t_squared
        self.positions = positions
        self.with_cross_entropy = with_cross_entropy
        self.names: tuple[str, ...] = (CROSS_ENTROPY, LOGITS) if with_cross_entropy else (LOGITS,)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Positions of the KL, and targets where cross-entropy is part of the term."""
        on_response = self.positions == "response"
        soft = float(batch.num_targets) if on_response else float((batch.document_ids != 0).sum())
        return {CROSS_ENTROPY: float(batch.num_targets), LOGITS: soft} if self.with_cross_entropy else {LOGITS: soft}

    def __call__(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        batch: Batch,
        counts: Mapping[str, float],
        weights: Mapping[str, float],
    ) -> TermValues:
        """KL (and cross-entropy) of the micro-batch, each over its global count."""
        teacher = require_teacher(teacher, LOGITS)
        labels_N, soft_N = batch.labels.flatten(), self._soft_positions(batch)
        hidden_ND, teacher_hidden_ND = student.hidden.flatten(0, 1), teacher.hidden.detach().flatten(0, 1)
        rows = select_rows(soft_N | (labels_N != IGNORE), batch.num_targets if self.positions == "response" else None)
        if rows is not None:
            labels_N, soft_N = labels_N[rows], soft_N[rows]
            hidden_ND, teacher_hidden_ND = hidden_ND.index_select(0, rows), teacher_hidden_ND.index_select(0, rows)
        if self.token_scaling is not None:
            documents_N = document_numbers(batch.document_ids)
            documents_N = documents_N if rows is None else documents_N[rows]
            surprise_N = surprise(teacher_hidden_ND, teacher.head_weight, labels_N.clamp(min=0))
            soft_N = token_weights(surprise_N, documents_N, soft_N, self.token_scaling)
        soft = SoftTargets(teacher_hidden_ND, teacher.head_weight, soft_N, self.temperature, self.t_squared)
        return self._values(student, hidden_ND, labels_N, soft, counts, weights)

    def _values(
        self,
        student: ModelOutput,
        hidden_ND: Tensor,
        labels_N: Tensor,
        soft: Targets,
        counts: Mapping[str, float],
        weights: Mapping[str, float],
    ) -> TermValues:
        """Losses of the chosen rows, each over its global count."""
        soft_share = reciprocal(counts[LOGITS])
        hard_share = reciprocal(counts[CROSS_ENTROPY]) if self.with_cross_entropy else 0.0
        losses = head_losses(
            hidden_ND,
            student.head_weight,
            labels_N if self.with_cross_entropy else None,
            soft=soft,
            cross_entropy_factor=weights[CROSS_ENTROPY] * hard_share if self.with_cross_entropy else 0.0,
            divergence_factor=weights[LOGITS] * soft_share,
        )
        values: dict[str, Tensor] = {LOGITS: losses.divergence * soft_share}
        if self.with_cross_entropy:
            values = {CROSS_ENTROPY: losses.cross_entropy * hard_share, **values}
        return TermValues(losses.total, values)

    def _soft_positions(self, batch: Batch) -> Tensor:
        if self.positions == "response":
            return (batch.labels != IGNORE).flatten()
        return (batch.document_ids != 0).flatten()


def logits_kl(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float) -> Tensor:
    """KL(teacher || student) of each row of dense logits, [N] float32: the readable form of the chunked loss."""
    log_student = torch.log_softmax(student_NV.float() / temperature, dim=-1)
    log_teacher = torch.log_softmax(teacher_NV.float() / temperature, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
