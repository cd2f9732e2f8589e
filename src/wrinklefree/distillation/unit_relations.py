"""KL between relations of states of unit length: the forms algorithm_1 and authors_code of `attention_loss`.

Scores s_ij = x_i . x_j of normalised states are symmetric and at most 1. So exponentials need no maximum, one half of the
pairs tells about both rows, and once the row sums Z of exp(s) are known the gradient is a single symmetric product. With
t the teacher's scores and Z' its sums,

    KL_i = sum_j exp(t_ij) / Z'_i (t_ij - s_ij) + log Z_i - log Z'_i
    M_ij = exp(s_ij) (1/Z_i + 1/Z_j) - exp(t_ij) (1/Z'_i + 1/Z'_j)            dx_i = sum_j M_ij x_j

Positions [a, b) against [0, b) are a strip. A first pass over the strips adds up the sums, a second one, which begins with
the strip that the first has just made, the value and the gradient. That multiplies scores twice, but half of them: three
quarters of the products of rows over all columns, and half of the exponentials of a log-softmax and its gradient. What is
held is four strips, and of all heads nothing but the gradient.

States are scaled by the root of log2(e), so that powers of two are taken: half the time of exp on a CPU.

Shapes: B rows, H heads, T positions; P = rows x heads and L positions of a piece, R positions of a strip, which has b
columns.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wrinklefree.distillation.relation_pieces import Piece, find_pieces, mask_blocks, same_document
from wrinklefree.distillation.scratch import Scratch

LOG2_E = math.log2(math.e)
SMALLEST_NORM = 1e-12
"""Of a state: that of `functional.normalize`."""
SMALLEST_SUM = 0.25
"""No row of a document has a smaller sum: its scores are -1 or more, and exp(-1) = 0.37. Padding has, which is masked."""


def unit_relation_divergence(
    student: Tensor, teacher: Tensor, documents_BT: Tensor | None, *, block_rows: int | None = None
) -> Tensor:
    """Sum over rows and heads of KL(softmax(y y^T) || softmax(x x^T)), x and y the normalised states, in float32.

    Args:
        student: States [B, H, T, width], float32, of any length; gradients reach them.
        teacher: The same of the teacher; the width may differ, no gradient.
        documents_BT: Document of each position, 0 for padding; None: all positions see each other and count.
        block_rows: Positions compared at a time; None: by the device's byte budget.
    """
    spec = _Spec(block_rows, torch.is_grad_enabled())
    result: Tensor = _UnitRelations.apply(student, teacher.detach(), documents_BT, spec)
    return result


@dataclass(frozen=True)
class _Spec:
    block_rows: int | None
    gradients: bool


class _UnitRelations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, documents: Tensor | None, spec: _Spec) -> Tensor:
        wanted = spec.gradients and ctx.needs_input_grad[0]
        gradient = torch.zeros_like(student) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        scratch = Scratch(student.device)
        for piece in find_pieces(student, documents, spec.block_rows):
            here = student[piece.place]
            strips = _Strips(here, teacher[piece.place], piece, scratch)
            total += strips.normalizers()
            value, slope = strips.pairs(gradient=wanted)
            total += value
            if gradient is not None and slope is not None:
                gradient[piece.place] = slope.view(here.shape)
        ctx.gradient = gradient
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the parameter name
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        # Scaled in place and given away: nothing of the states' size is made here.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_outputs[0]), None, None, None


class _Side:
    """One model's states of a piece, its strips, and the sums over its rows."""

    def __init__(self, name: str, states: Tensor, scratch: Scratch) -> None:
        flat = states.flatten(0, 1)
        self._name, self._scratch = name, scratch
        self.norms = flat.square().sum(-1, keepdim=True).sqrt_().clamp_(min=SMALLEST_NORM)
        self.scaled = scratch.block(f"{name}_states", *flat.shape)
        torch.mul(flat, math.sqrt(LOG2_E) / self.norms, out=self.scaled)
        self.sums = flat.new_zeros(flat.shape[:2])

    def make(self, strip: slice, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores times log2(e), and their exponentials, 0 where a pair does not count; each [P, R, b]."""
        left, right = self.scaled[:, strip], self.scaled[:, : strip.stop]
        shape = (left.shape[0], left.shape[1], right.shape[1])
        scores = torch.bmm(left, right.mT, out=self._scratch.block(f"{self._name}_scores", *shape))
        exponentials = torch.exp2(scores, out=self._scratch.block(f"{self._name}_exponentials", *shape))
        return scores, mask_blocks(exponentials, allowed, 0.0)

    def count(self, exponentials: Tensor, strip: slice) -> None:
        """Add a strip to the sums of its rows and, by symmetry, to those of the earlier ones."""
        self.sums[:, strip] += exponentials.sum(2)
        if strip.start:
            self.sums[:, : strip.start] += exponentials[:, :, : strip.start].sum(1)

    def weigh(self, exponentials: Tensor, strip: slice, temporary: Tensor) -> Tensor:
        """Exponentials times (1/Z_i + 1/Z_j), in place; the sums are inverse by now."""
        weights = torch.add(self.sums[:, strip, None], self.sums[:, None, : strip.stop], out=temporary)
        return exponentials.mul_(weights)


_Strip = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Scores and exponentials, of the student and of the teacher."""


class _Strips:
    """The two passes over a piece, to be called one after the other."""

    def __init__(self, student: Tensor, teacher: Tensor, piece: Piece, scratch: Scratch) -> None:
        self._piece, self._scratch = piece, scratch
        self._student, self._teacher = _Side("student", student, scratch), _Side("teacher", teacher, scratch)
        self._last: _Strip | None = None

    def _make(self, strip: slice) -> _Strip:
        documents = self._piece.documents
        allowed = None if documents is None else same_document(documents, strip, slice(0, strip.stop))
        return self._student.make(strip, allowed), self._teacher.make(strip, allowed)

    def normalizers(self) -> Tensor:
        """First pass: the sums of both models; returns the sum over rows of log Z - log Z'."""
        student, teacher = self._student, self._teacher
        for strip in self._piece.blocks():
            self._last = (_, mine), (_, theirs) = self._make(strip)
            student.count(mine, strip)
            teacher.count(theirs, strip)
        difference = student.sums.clamp_(min=SMALLEST_SUM).log() - teacher.sums.clamp_(min=SMALLEST_SUM).log()
        student.sums.reciprocal_()
        teacher.sums.reciprocal_()
        return difference.sum()

    def pairs(self, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Second pass: sum of p_ij (t_ij - s_ij), and dx [P, L, width] of the whole divergence."""
        states = self._student.scaled
        value = states.new_zeros(())
        from_rows = self._scratch.block("from_rows", *states.shape)
        from_columns = self._scratch.block("from_columns", *states.mT.shape).zero_()
        for strip in reversed(self._piece.blocks()):
            (scores, mine), (taught, theirs) = self._last or self._make(strip)
            self._last = None
            before = slice(0, strip.start)
            taught.sub_(scores)
            theirs = self._teacher.weigh(theirs, strip, temporary=scores)
            taught.mul_(theirs)
            # Within the strip both (i, j) and (j, i) are there, each with the weights of both.
            value += taught.sum() - taught[:, :, strip].sum() / 2
            if not gradient:
                continue
            slopes = self._student.weigh(mine, strip, temporary=scores).sub_(theirs)
            torch.bmm(slopes, states[:, : strip.stop], out=from_rows[:, strip])
            if strip.start:
                # The transposed product is the faster one by a third.
                from_columns[:, :, before].baddbmm_(states[:, strip].mT, slopes[:, :, before])
        slope = self._through_norms(from_rows.add_(from_columns.mT)) if gradient else None
        return value * math.log(2), slope

    def _through_norms(self, slope: Tensor) -> Tensor:
        """From the gradient of scaled states (times log2 e) to that of the states: the part along a state is lost."""
        states = self._student.scaled
        along = (slope * states).sum(-1, keepdim=True)
        return slope.addcmul_(states, along, value=-1 / LOG2_E).div_(self._student.norms * math.sqrt(LOG2_E))
