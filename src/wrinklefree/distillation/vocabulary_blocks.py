"""Cross-entropy and logit KL over blocks of the vocabulary: for large vocabularies on a CPU.

A chunk of rows that fits a cache has only a few dozen rows where the vocabulary is large. Products of so few rows wait
for the head's weights, and the gradient of the head is added up once a chunk: [V, D] read and written for each 42 rows
of a 49k vocabulary. Here the blocks are small in both directions, and there are two passes over them:

1. normalizers: for each row the running maximum and sum of exponentials of the student's logits, of them divided by the
   temperature, and of the teacher's;
2. gradients: the probabilities follow from the normalizers, and each block's part of the head's gradient is added to it in
   place: no second [V, D] is held, no copy of either head in another type included.

The second pass needs the logits again. Where products are slow (float32, or bfloat16 without tiles) those of a group of
rows are kept for it, in memory that is a share of the head's gradient, and both passes are made group by group: with four
products instead of six a third of the time is saved. With bfloat16 tiles a product costs less than writing its result to
memory and reading it back, and than adding to the head's gradient once a group: there all rows are one group, the
vocabulary is the outer loop, and logits are multiplied twice.

Values and gradients are those of `head_losses`' chunks of rows up to the order of float32 sums.

Shapes: N rows, D hidden size, V vocabulary, R rows and W words of a block.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wrinklefree.distillation.logit_rows import Hard, Soft, logit_rows
from wrinklefree.distillation.scratch import Scratch

BLOCK_ROWS = 512
BLOCK_WORDS = 512
"""A float32 block is 1 MiB: a handful of them fit a core's second-level cache, where element-wise operations run two to
four times as fast as from the third (measured); products of such blocks reach 0.7 to 0.9 of their peak."""

KEPT_SHARE = 0.42
"""Bytes of kept logits, as a share of those of the head's gradient."""
EVEN_ROWS = 8
"""Products of 114 rows take 7% longer a row than those of 112 or 120 (measured)."""


@dataclass(frozen=True)
class Student:
    """Student's side: hidden states [N, D], head [V, D], labels [N] or None without cross-entropy."""

    hidden: Tensor
    head: Tensor
    labels: Tensor | None
    cross_entropy_factor: float


@dataclass(frozen=True)
class TeacherSide:
    """Teacher's side of the KL: hidden states [N, D'], head [V, D'], and which rows count."""

    hidden: Tensor
    head: Tensor
    rows: Tensor
    temperature: float
    scale: float
    """Of the value: temperature squared, or 1."""
    divergence_factor: float


@dataclass(frozen=True)
class BlockedLosses:
    """Both sums over rows, and the gradients of their weighted total; a gradient that was not asked for is None."""

    cross_entropy: Tensor
    divergence: Tensor
    grad_hidden: Tensor | None
    grad_head: Tensor | None


@torch.no_grad()
def blocked_losses(
    student: Student, teacher: TeacherSide | None, dtype: torch.dtype, *, hidden_needs: bool, head_needs: bool
) -> BlockedLosses:
    """Sums and gradients; products use `dtype`, everything else float32. Call it without autocast."""
    return _Pass(student, teacher, dtype).run(hidden_needs=hidden_needs, head_needs=head_needs)


def rows_to_keep(student: Student, teacher: TeacherSide | None, dtype: torch.dtype) -> int:
    """Rows whose logits are kept from the first pass to the second; 0: all logits are made twice."""
    has_fast_products = dtype == torch.bfloat16 and torch.cpu.get_capabilities().get("amx_bf16", False)
    # The head's gradient is added up in place once a group, so it must be float32.
    if has_fast_products or student.head.dtype != torch.float32:
        return 0
    models = 1 if teacher is None else 2
    most = min(BLOCK_ROWS, max(16, int(KEPT_SHARE * student.head.shape[1] * 4 / (models * dtype.itemsize))))
    count = len(student.hidden)
    if not count:
        return 0
    even = math.ceil(count / math.ceil(count / (most - most % EVEN_ROWS)))
    return min(count, even + -even % EVEN_ROWS)


class _Pass:
    def __init__(self, student: Student, teacher: TeacherSide | None, dtype: torch.dtype) -> None:
        self.student, self.teacher, self.dtype = student, teacher, dtype
        hidden = student.hidden
        self.states = hidden.to(dtype)
        self.teacher_states = None if teacher is None else teacher.hidden.to(dtype)
        self.scratch = Scratch(hidden.device)
        hard = None if student.labels is None else Hard(student.labels, student.cross_entropy_factor)
        soft = None
        if teacher is not None:
            soft = Soft(teacher.rows, teacher.temperature, teacher.divergence_factor * teacher.scale)
        self.logit_rows = logit_rows(len(hidden), hidden.device, hard, soft, dtype)
        self.kept_rows = rows_to_keep(student, teacher, dtype)

    def run(self, *, hidden_needs: bool, head_needs: bool) -> BlockedLosses:
        hidden, head = self.student.hidden, self.student.head
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if hidden_needs else None
        grad_head = torch.empty_like(head) if head_needs else None
        has_second_pass = self.teacher is not None or hidden_needs or head_needs
        for group in self._groups():
            self._normalize(group)
            if has_second_pass:
                self._gradients(group, grad_hidden, grad_head)
        divergence = self.logit_rows.divergence()
        if self.teacher is not None:
            divergence *= self.teacher.scale
        if grad_head is not None and not len(hidden):
            grad_head.zero_()
        return BlockedLosses(
            self.logit_rows.cross_entropy(),
            divergence,
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            grad_head,
        )

    def _groups(self) -> Iterator[slice]:
        """Rows whose logits are kept between the passes; all rows where they are made twice."""
        count = len(self.student.hidden)
        height = self.kept_rows or max(1, count)
        for start in range(0, count, height):
            yield slice(start, min(start + height, count))

    def _rows(self, group: slice) -> Iterator[slice]:
        for start in range(group.start, group.stop, BLOCK_ROWS):
            yield slice(start, min(start + BLOCK_ROWS, group.stop))

    def _heads(self, *, with_teacher: bool) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Blocks of both heads in the compute dtype."""
        vocabulary = self.student.head.shape[0]
        # Fewer rows, more words: blocks of one size.
        width = BLOCK_WORDS * max(1, BLOCK_ROWS // self.kept_rows) if self.kept_rows else BLOCK_WORDS
        for start in range(0, vocabulary, width):
            words = slice(start, min(start + width, vocabulary))
            other = self.teacher.head[words].to(self.dtype) if self.teacher is not None and with_teacher else None
            yield words, self.student.head[words].to(self.dtype), other

    def _fold(self, name: str, target: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
        """Add left @ right, multiplied in the compute dtype, to a float32 target; `first` overwrites it."""
        if self.dtype == target.dtype:
            torch.addmm(target, left, right, beta=0 if first else 1, out=target)
            return
        product = torch.mm(left, right, out=self.scratch.block(name, *target.shape, dtype=self.dtype))
        target.copy_(product) if first else target.add_(product)

    def _logits(self, name: str, states: Tensor, weight: Tensor | None, words: slice, *, made: bool) -> Tensor:
        """States @ weight.T in the compute dtype; `made` and kept by the first pass, or anew."""
        shape = (len(states), words.stop - words.start)
        if self.kept_rows:
            # The words of a group lie one after the other, so each block is contiguous.
            kept = self.scratch.block(f"{name}_kept", len(states), self.student.head.shape[0], dtype=self.dtype)
            product = kept.view(-1)[len(states) * words.start : len(states) * words.stop].view(shape)
        else:
            product = self.scratch.block(f"{name}_product", *shape, dtype=self.dtype)
        if not (made and self.kept_rows):
            assert weight is not None
            torch.mm(states, weight.T, out=product)
        return product

    def _both_logits(
        self, rows: slice, words: slice, weight: Tensor, teacher_weight: Tensor | None, *, made: bool
    ) -> tuple[Tensor, Tensor | None]:
        """A block of the student's logits and of the teacher's."""
        logits = self._logits("logits", self.states[rows], weight, words, made=made)
        if self.teacher_states is None:
            return logits, None
        return logits, self._logits("taught", self.teacher_states[rows], teacher_weight, words, made=made)

    def _normalize(self, group: slice) -> None:
        """First pass: the sums of each row's normalizers."""
        for words, weight, teacher_weight in self._heads(with_teacher=True):
            for rows in self._rows(group):
                logits, taught = self._both_logits(rows, words, weight, teacher_weight, made=False)
                self.logit_rows.add(logits, taught, rows, words)

    def _gradients(self, group: slice, grad_hidden: Tensor | None, grad_head: Tensor | None) -> None:
        """Second pass: the KL's sums; writes a group's gradients, adds to the head's."""
        for words, weight, teacher_weight in self._heads(with_teacher=not self.kept_rows):
            sums: Tensor | None = None
            if grad_head is not None:
                sums = grad_head[words]
                if sums.dtype != torch.float32:
                    sums = self.scratch.block("grad_words", *sums.shape)
            for rows in self._rows(group):
                logits, taught = self._both_logits(rows, words, weight, teacher_weight, made=True)
                gradient = self.logit_rows.gradient(logits, taught, rows, words)
                if grad_hidden is not None:
                    self._fold("grad_rows", grad_hidden[rows], gradient, weight, first=not words.start)
                if sums is not None:
                    self._fold("grad_words_product", sums, gradient.T, self.states[rows], first=not rows.start)
            if grad_head is not None and sums is not None and sums.dtype != grad_head.dtype:
                grad_head[words] = sums
