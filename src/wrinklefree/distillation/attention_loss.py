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
G = (softmax_student - softmax_teacher) and scores L R^T, dL = G R and dR = G^T L. Normalised states have a faster way of
their own (`unit_relations`).

Shapes: B rows, T positions, n attention heads, d head dimension, R relation heads, d_r their width, H heads of either.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wrinklefree.distillation.relation_pieces import Piece, find_pieces, mask_blocks, same_document
from wrinklefree.distillation.scratch import Scratch
from wrinklefree.distillation.unit_relations import unit_relation_divergence
from wrinklefree.distillation.weighted_sum import TermValues, reciprocal, require_teacher
from wrinklefree.models.records import QKV, Batch, ModelOutput, Wants

ATTENTION = "attention"
"""Name of the term."""

Form = Literal["algorithm_1", "equation_12", "authors_code", "attention_map"]
Mask = Literal["documents", "none"]

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
            for divergence in self._divergences(student.qkv, teacher.qkv, documents):
                value = value + divergence
            value = value * share
        return TermValues(value * weights[ATTENTION], {ATTENTION: value.detach()})

    def _divergences(self, student: QKV, teacher: QKV, documents: Tensor | None) -> Iterator[Tensor]:
        """Sums over rows and heads, one for each relation of the form."""
        if self.form == "attention_map":
            yield relation_divergence(
                _attention_pair(student), _attention_pair(teacher), documents, causal=True, block_rows=self._block_rows
            )
            return
        for mine, theirs in zip(_states(student), _states(teacher), strict=True):
            sides = relation_heads(mine, self.relation_heads), relation_heads(theirs, self.relation_heads)
            if self.form == "equation_12":
                student_pair, teacher_pair = ((split / math.sqrt(split.shape[-1]), split) for split in sides)
                yield relation_divergence(student_pair, teacher_pair, documents, block_rows=self._block_rows)
            else:
                yield unit_relation_divergence(*sides, documents, block_rows=self._block_rows)


def _states(states: QKV) -> tuple[Tensor, Tensor, Tensor]:
    return states.query, states.key, states.value


def _attention_pair(states: QKV) -> tuple[Tensor, Tensor]:
    """Left and right [B, n, T, d] whose product are the scores of attention."""
    query, key = states.query.float(), states.key.float()
    return query / math.sqrt(query.shape[-1]), key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


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
    spec = _Spec(causal, block_rows, torch.is_grad_enabled())
    teacher_left, teacher_right = (state.detach() for state in teacher)
    result: Tensor = _RelationDivergence.apply(*student, teacher_left, teacher_right, documents_BT, spec)
    return result


@dataclass(frozen=True)
class _Spec:
    causal: bool
    block_rows: int | None
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
        wanted = spec.gradients and any(ctx.needs_input_grad[:2])
        gradients = (torch.zeros_like(left), torch.zeros_like(right)) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=left.device)
        scratch = Scratch(left.device)
        for piece in find_pieces(left, documents, spec.block_rows):
            here = left[piece.place]
            student = _Side("student", here, right[piece.place], scratch)
            teacher = _Side("teacher", teacher_left[piece.place], teacher_right[piece.place], scratch)
            grad_left = scratch.block("grad_left", *student.left.shape)
            grad_right = scratch.block("grad_right", *student.left.shape).zero_()
            for rows in piece.blocks():
                columns = slice(0, rows.stop if spec.causal else piece.length)
                allowed = _allowed(piece, rows, columns, causal=spec.causal, device=left.device)
                student_scores, student_shares, student_logs = student.relations(rows, columns, allowed)
                scores, shares, logs = teacher.relations(rows, columns, allowed)
                # KL = sum p_t (t - s) + log Z_s - log Z_t: one exponential for each model's score.
                divergence = scores.sub_(student_scores).mul_(shares).sum(-1) + (student_logs - logs)
                slopes = student_shares.sub_(shares)
                if piece.documents is not None:
                    counted = (piece.documents[:, rows] != 0).repeat_interleave(here.shape[1], dim=0)
                    divergence *= counted
                    slopes *= counted.unsqueeze(-1)
                total += divergence.sum()
                if gradients is not None:
                    torch.bmm(slopes, student.right[:, columns], out=grad_left[:, rows])
                    grad_right[:, columns].baddbmm_(slopes.mT, student.left[:, rows])
            if gradients is not None:
                gradients[0][piece.place] = grad_left.view(here.shape)
                gradients[1][piece.place] = grad_right.view(here.shape)
        ctx.gradients = gradients
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the parameter name
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        # Scaled in place and given away: nothing of the states' size is made here.
        (grad_left, grad_right), ctx.gradients = ctx.gradients, None
        return grad_left.mul_(grad_outputs[0]), grad_right.mul_(grad_outputs[0]), None, None, None, None


class _Side:
    """One model's states of a piece, [P, L, width] with P rows x heads and L positions."""

    def __init__(self, name: str, left: Tensor, right: Tensor, scratch: Scratch) -> None:
        self._name, self._scratch = name, scratch
        self.left, self.right = left.flatten(0, 1), right.flatten(0, 1)

    def relations(self, rows: slice, columns: slice, allowed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [P, rows, columns], their softmax, and the logarithm of each row's sum of exponentials [P, rows]."""
        left, right = self.left[:, rows], self.right[:, columns]
        shape = (left.shape[0], left.shape[1], right.shape[1])
        scores = torch.bmm(left, right.mT, out=self._scratch.block(f"{self._name}_scores", *shape))
        mask_blocks(scores, allowed, MASKED_SCORE)
        shares = torch.softmax(scores, -1, out=self._scratch.block(f"{self._name}_shares", *shape))
        return scores, shares, scores.amax(-1) - shares.amax(-1).log()


def _allowed(piece: Piece, rows: slice, columns: slice, *, causal: bool, device: torch.device) -> Tensor | None:
    """Pairs that count [B or 1, 1, rows, columns]; None: all."""
    allowed = None if piece.documents is None else same_document(piece.documents, rows, columns)
    if not causal:
        return allowed
    row = torch.arange(rows.start, rows.stop, device=device)
    earlier = (torch.arange(columns.stop, device=device) <= row[:, None])[None, None]
    return earlier if allowed is None else allowed & earlier
