"""L_AD: KL between the Q, K and V relations of teacher and student at one layer (arXiv:2510.13998, eq. 10-12).

For each A of Q, K, V the heads of a token are concatenated and split into R relation heads of width d_r; the relation
of a token to the others is softmax_j(a_i . a_j / c), and the loss is KL(teacher || student) summed over Q, K and V and
averaged over rows (tokens) and relation heads. Teacher and student may differ in width and heads, not in R.

    form          states           c           averaged over
    algorithm_1   L2-normalised    1           rows x R
    authors_code  L2-normalised    1           rows x R, then divided by R again: gamma(code) = R * gamma(algorithm 1)
    equation_12   raw              sqrt(d_r)   rows x R
    attention_map softmax(Q K^T / sqrt(d)), causal, per attention head: no relation of the paper's; for comparison

The paper's rows span the whole sequence in both directions. With `mask="documents"` a row spans its own document and
padding does not count; with "none" (the authors' code) padding and packed neighbours are part of every row.

A T x T relation for every head, of three states and two models, would be the largest tensors of the step. Here a block
of rows is compared at a time, in float32, and its closed-form gradient folded into that of the states: with
G = (softmax_student - softmax_teacher) and scores L R^T, dL = G R and dR = G^T L.

Shapes: B rows, T positions, n attention heads, d head dimension, R relation heads, d_r their width, H heads of either.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from wrinklefree.distillation.weighted_sum import TermValues, reciprocal, require_teacher
from wrinklefree.models.records import QKV, Batch, ModelOutput, Wants

ATTENTION = "attention"
"""Name of the term."""

Form = Literal["algorithm_1", "equation_12", "authors_code", "attention_map"]
Mask = Literal["documents", "none"]

BLOCK_BYTES = {"cpu": 8 * 2**20}
"""Bytes of one float32 block of scores by device type; small blocks skip more of other documents' columns."""
DEFAULT_BLOCK_BYTES = 256 * 2**20
"""For every other device."""
MASKED_SCORE = -1e30
"""Score of a forbidden pair: finite, so that 0 * (masked - masked) is 0 and not NaN."""


@dataclass(frozen=True)
class Magnitude:
    """Size of a form's loss between a quantized student and its teacher: bounds of what was seen on random states."""

    low: float
    high: float


def typical_magnitude(form: Form, relation_heads: int) -> Magnitude:
    """Values of L_AD to expect (32 heads of width 32, student = teacher + 0.3 to 1 standard deviations of noise)."""
    match form:
        case "algorithm_1":
            return Magnitude(5e-3, 3.4e-2)
        case "authors_code":
            return Magnitude(5e-3 / relation_heads, 3.4e-2 / relation_heads)
        case "equation_12":
            return Magnitude(0.2, 8.0)
        case "attention_map":
            return Magnitude(2e-5, 2e-5)


class AttentionRelations:
    """Relation loss of one layer of the student against one layer of the teacher."""

    names: tuple[str, ...] = (ATTENTION,)

    def __init__(
        self,
        *,
        form: Form,
        relation_heads: int,
        mask: Mask,
        student_layer: int,
        teacher_layer: int,
        attention_heads: int,
        block_rows: int | None = None,
    ) -> None:
        """Settle the form; `attention_heads` counts the rows of `attention_map`; `block_rows` None: the byte budget."""
        self.form: Form = form
        self.relation_heads = relation_heads
        self.mask: Mask = mask
        self.student_wants: Wants = Wants(qkv_layer=student_layer)
        self.teacher_wants: Wants | None = Wants(qkv_layer=teacher_layer)
        self.smallest_value: float = typical_magnitude(form, relation_heads).low / 50
        self._heads = attention_heads if form == "attention_map" else relation_heads
        self._block_rows = block_rows

    def counts(self, batch: Batch) -> dict[str, float]:
        """Rows x heads: all positions without a mask, else those that are not padding."""
        rows = batch.document_ids.numel() if self.mask == "none" else int((batch.document_ids != 0).sum())
        return {ATTENTION: float(rows * self._heads)}

    def __call__(
        self,
        student: ModelOutput,
        teacher: ModelOutput | None,
        batch: Batch,
        counts: Mapping[str, float],
        weights: Mapping[str, float],
    ) -> TermValues:
        """Relation loss of the micro-batch over the global count."""
        teacher = require_teacher(teacher, ATTENTION)
        if student.qkv is None or teacher.qkv is None:
            raise TypeError("the term attention needs the Q, K, V states of student and teacher, as its wants say")
        share = reciprocal(counts[ATTENTION])
        if self.form == "authors_code":
            share /= self.relation_heads
        documents = batch.document_ids if self.mask == "documents" else None
        # The products and softmaxes are float32: autocast would round scores of equation 12 by up to 0.1.
        with torch.autocast(student.hidden.device.type, enabled=False):
            value = torch.zeros((), dtype=torch.float32, device=student.hidden.device)
            for student_pair, teacher_pair in zip(self._pairs(student.qkv), self._pairs(teacher.qkv), strict=True):
                value = value + relation_divergence(
                    student_pair,
                    teacher_pair,
                    documents,
                    causal=self.form == "attention_map",
                    block_rows=self._block_rows,
                )
            value = value * share
        return TermValues(value * weights[ATTENTION], {ATTENTION: value.detach()})

    def _pairs(self, states: QKV) -> list[tuple[Tensor, Tensor]]:
        """(left, right) [B, H, T, width] with scores left @ right.T, for each relation of the form."""
        if self.form == "attention_map":
            query, key = states.query.float(), states.key.float()
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            return [(query / math.sqrt(query.shape[-1]), key)]
        pairs: list[tuple[Tensor, Tensor]] = []
        for state in (states.query, states.key, states.value):
            split = relation_heads(state, self.relation_heads)
            if self.form == "equation_12":
                pairs.append((split / math.sqrt(split.shape[-1]), split))
            else:
                split = functional.normalize(split, dim=-1)
                pairs.append((split, split))
        return pairs


def relation_heads(state_BnTd: Tensor, heads: int) -> Tensor:
    """[B, n, T, d] -> [B, R, T, n * d / R] in float32: heads concatenated a token, then split anew."""
    rows, _, length, _ = state_BnTd.shape
    return state_BnTd.float().transpose(1, 2).reshape(rows, length, heads, -1).transpose(1, 2)


def relation_divergence(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    documents_BT: Tensor | None,
    *,
    causal: bool = False,
    block_rows: int | None = None,
) -> Tensor:
    """Sum over rows and heads of KL(softmax(teacher scores) || softmax(student scores)), scores = left @ right.T.

    Args:
        student: left and right, each [B, H, T, width], float32; gradients reach both.
        teacher: the same of the teacher; the width may differ, no gradient.
        documents_BT: Document of each position, 0 for padding; None: all positions see each other and count.
        causal: A row sees its own and earlier positions only.
        block_rows: Positions compared at a time; None takes the device's byte budget.
    """
    left, right = student
    rows, heads, length, _ = left.shape
    if block_rows is None:
        budget = BLOCK_BYTES.get(left.device.type, DEFAULT_BLOCK_BYTES)
        block_rows = min(length, max(16, budget // (4 * rows * heads * length)))
    spec = _Spec(causal, block_rows, torch.is_grad_enabled())
    teacher_left, teacher_right = (state.detach() for state in teacher)
    result: Tensor = _RelationDivergence.apply(left, right, teacher_left, teacher_right, documents_BT, spec)
    return result


@dataclass(frozen=True)
class _Spec:
    causal: bool
    block_rows: int
    gradients: bool


class _RelationDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        teacher_left: Tensor,
        teacher_right: Tensor,
        documents: Tensor | None,
        spec: _Spec,
    ) -> Tensor:
        length = left.shape[2]
        wanted = spec.gradients and any(ctx.needs_input_grad[:2])
        grad_left = torch.zeros_like(left) if wanted else None
        grad_right = torch.zeros_like(right) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=left.device)
        for rows, columns in _blocks(length, documents, spec.block_rows):
            forbidden, counted = _block_mask(rows, columns, documents, causal=spec.causal, device=left.device)
            log_student = _log_softmax(left[:, :, rows], right[:, :, columns], forbidden)
            log_teacher = _log_softmax(teacher_left[:, :, rows], teacher_right[:, :, columns], forbidden)
            probabilities = log_teacher.exp()
            divergence = log_teacher.sub_(log_student).mul_(probabilities).sum(-1)
            total += (divergence if counted is None else divergence * counted).sum()
            if grad_left is None or grad_right is None:
                continue
            gradient = log_student.exp_().sub_(probabilities)
            if counted is not None:
                gradient.mul_(counted.unsqueeze(-1))
            grad_left[:, :, rows] = gradient @ right[:, :, columns]
            grad_right[:, :, columns] += gradient.mT @ left[:, :, rows]
        ctx.gradients = (grad_left, grad_right)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the parameter name
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_left, grad_right = ctx.gradients
        return grad_left * grad_outputs[0], grad_right * grad_outputs[0], None, None, None, None


def _log_softmax(left: Tensor, right: Tensor, forbidden: Tensor | None) -> Tensor:
    scores = left @ right.mT
    if forbidden is not None:
        scores.masked_fill_(forbidden, MASKED_SCORE)
    return functional.log_softmax(scores, dim=-1)


def _blocks(length: int, documents: Tensor | None, block_rows: int) -> list[tuple[slice, slice]]:
    """Row blocks with the columns that they can see.

    On the CPU the columns are cut to the block's documents: packed short examples then cost what they cost alone. On
    other devices reading the borders would stall, so every column is computed and masked.
    """
    starts = range(0, length, block_rows)
    blocks = [slice(start, min(start + block_rows, length)) for start in starts]
    if documents is None or documents.device.type != "cpu":
        return [(block, slice(0, length)) for block in blocks]
    index = torch.arange(length).expand_as(documents)
    border = documents[:, 1:] != documents[:, :-1]
    edge = torch.ones_like(documents[:, :1], dtype=torch.bool)
    is_padding = documents == 0
    first = torch.where(torch.cat([edge, border], 1), index, 0).cummax(1).values
    last = torch.where(torch.cat([border, edge], 1), index, length - 1).flip(1).cummin(1).values.flip(1)
    # Padding counts nowhere, so its run must not widen a block: each padded position sees itself.
    first, last = torch.where(is_padding, index, first), torch.where(is_padding, index, last)
    return [(block, slice(int(first[:, block].min()), int(last[:, block].max()) + 1)) for block in blocks]


def _block_mask(
    rows: slice, columns: slice, documents: Tensor | None, *, causal: bool, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Forbidden pairs [B or 1, 1, rows, columns] and counted rows [B, 1, rows]; None where there are no limits."""
    forbidden: Tensor | None = None
    if causal:
        row = torch.arange(rows.start, rows.stop, device=device)
        column = torch.arange(columns.start, columns.stop, device=device)
        forbidden = (column[None, :] > row[:, None])[None, None]
    if documents is None:
        return forbidden, None
    own = documents[:, rows]
    foreign = (own[:, :, None] != documents[:, None, columns]).unsqueeze(1)
    return foreign if forbidden is None else forbidden | foreign, (own != 0).unsqueeze(1)
