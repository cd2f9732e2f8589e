"""Next-token cross-entropy on the targets of a batch, chunked over the head."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from wrinklefree.distillation.head_losses import compute_dtype, head_losses, rows_a_chunk, select_rows
from wrinklefree.distillation.weighted_sum import CROSS_ENTROPY, TermValues, reciprocal
from wrinklefree.models.records import IGNORE, Batch, ModelOutput, Wants


class CrossEntropy:
    """Sum of -log p(target) over all targets, divided by their global count. Prompts and padding have no target."""

    names: tuple[str, ...] = (CROSS_ENTROPY,)
    student_wants: Wants = Wants()
    teacher_wants: Wants | None = None
    smallest_value: float = 0.0

    def counts(self, batch: Batch) -> dict[str, float]:
        """Targets of the batch."""
        return {CROSS_ENTROPY: float(batch.num_targets)}

    def __call__(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        batch: Batch,
        counts: Mapping[str, float],
        weights: Mapping[str, float],
    ) -> TermValues:
        """Cross-entropy of the micro-batch over the global count."""
        labels_N = batch.labels.flatten()
        hidden_ND = student.hidden.flatten(0, 1)
        rows = select_rows(labels_N != IGNORE, batch.num_targets)
        if rows is not None:
            labels_N, hidden_ND = labels_N[rows], hidden_ND.index_select(0, rows)
        share = reciprocal(counts[CROSS_ENTROPY])
        losses = head_losses(
            hidden_ND, student.head_weight, labels_N, cross_entropy_factor=weights[CROSS_ENTROPY] * share
        )
        return TermValues(losses.total, {CROSS_ENTROPY: losses.cross_entropy * share})


@torch.no_grad()
def target_nll(output: ModelOutput, labels_BT: Tensor) -> Tensor:
    """-log p(label) in nats for each position, [B, T] float32, 0 where the label is IGNORE.

    For evaluation (bits per byte, scores of label words): no gradients; logits exist in chunks and at targets only.
    """
    labels_N = labels_BT.flatten()
    rows_M = (labels_N != IGNORE).nonzero().squeeze(1)
    targets_M = labels_N[rows_M]
    hidden_MD = output.hidden.flatten(0, 1)[rows_M]
    dtype = compute_dtype(hidden_MD)
    head_VD = output.head_weight.to(dtype)
    result_N = torch.zeros(labels_N.shape, dtype=torch.float32, device=labels_N.device)
    chunk = rows_a_chunk(hidden_MD.device.type, head_VD.shape[0])
    for start in range(0, len(targets_M), chunk):
        part = slice(start, start + chunk)
        logits = (hidden_MD[part].to(dtype) @ head_VD.T).float()
        result_N[rows_M[part]] = functional.cross_entropy(logits, targets_M[part], reduction="none")
    return result_N.view(labels_BT.shape)
