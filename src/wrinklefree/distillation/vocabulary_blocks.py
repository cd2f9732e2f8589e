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

from wrinklefree.distillation.scratch import Scratch
from wrinklefree.models.records import IGNORE

BLOCK_ROWS = 512
BLOCK_WORDS = 512
"""A float32 block is 1 MiB: a handful of them fit a core's second-level cache, where element-wise operations run two to
four times as fast as from the third (measured); products of such blocks reach 0.7 to 0.9 of their peak."""

KEPT_SHARE = 0.4
"""Bytes of kept logits, as a share of those of the head's gradient."""
LOG2_E = math.log2(math.e)


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


class _Normalizer:
    """Running log of the sum of exponentials of `logits * inverse_temperature`, float32 [N, 1].

    Inside, logarithms are to base 2: a power of two takes half the time of an exponential (measured).
    """

    def __init__(self, like: Tensor, inverse_temperature: float) -> None:
        self.inverse_temperature = inverse_temperature
        self._factor = inverse_temperature * LOG2_E
        self._largest = like.new_full((len(like), 1), -torch.inf, dtype=torch.float32)
        self._sum = like.new_zeros((len(like), 1), dtype=torch.float32)

    def add(self, logits_RW: Tensor, largest_R1: Tensor, rows: slice, scratch_RW: Tensor) -> None:
        """Count a block whose rows' largest logits are known."""
        before = self._largest[rows]
        largest = torch.maximum(before, largest_R1 * self._factor)
        terms = torch.add(-largest, logits_RW, alpha=self._factor, out=scratch_RW).exp2_()
        self._sum[rows] = self._sum[rows] * (before - largest).exp2_() + terms.sum(1, keepdim=True)
        self._largest[rows] = largest

    def log(self) -> Tensor:
        """The logarithm [N, 1]."""
        return self._log2(slice(None)) / LOG2_E

    def probabilities(self, logits_RW: Tensor, rows: slice, out_RW: Tensor) -> Tensor:
        """softmax(logits * inverse_temperature) of a block, once all of its rows' blocks are counted."""
        return torch.add(-self._log2(rows), logits_RW, alpha=self._factor, out=out_RW).exp2_()

    def _log2(self, rows: slice) -> Tensor:
        return self._largest[rows] + self._sum[rows].log2()


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
    return math.ceil(count / math.ceil(count / most)) if count else 0


class _Pass:
    def __init__(self, student: Student, teacher: TeacherSide | None, dtype: torch.dtype) -> None:
        self.student, self.teacher, self.dtype = student, teacher, dtype
        hidden = student.hidden
        self.states = hidden.to(dtype)
        self.scratch = Scratch(hidden.device)
        self.hard = None if student.labels is None else _Normalizer(hidden, 1.0)
        self.soft: _Normalizer | None = None
        self.taught: _Normalizer | None = None
        self.teacher_states: Tensor | None = None
        if teacher is not None:
            self.teacher_states = teacher.hidden.to(dtype)
            self.soft = _Normalizer(hidden, 1 / teacher.temperature)
            self.taught = _Normalizer(hidden, 1 / teacher.temperature)
        self.target_logits = hidden.new_zeros((len(hidden), 1), dtype=torch.float32)
        self.kept_rows = rows_to_keep(student, teacher, dtype)

    def run(self, *, hidden_needs: bool, head_needs: bool) -> BlockedLosses:
        hidden, head = self.student.hidden, self.student.head
        divergence = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if hidden_needs else None
        grad_head = torch.empty_like(head) if head_needs else None
        has_second_pass = self.teacher is not None or hidden_needs or head_needs
        for group in self._groups():
            self._normalize(group)
            if has_second_pass:
                divergence += self._gradients(group, grad_hidden, grad_head)
        cross_entropy = self._cross_entropy()
        if self.teacher is not None and self.soft is not None and self.taught is not None:
            counted = self.teacher.rows.unsqueeze(1)
            divergence += ((self.soft.log() - self.taught.log()) * counted).sum()
            divergence *= self.teacher.scale
        if grad_head is not None and not len(hidden):
            grad_head.zero_()
        return BlockedLosses(
            cross_entropy, divergence, None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_head
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
        """States @ weight.T, multiplied in the compute dtype, as float32; `made` and kept by the first pass, or anew."""
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
        return product if self.dtype == torch.float32 else self.scratch.block(name, *shape).copy_(product)

    def _temporary(self, like: Tensor, name: str = "temporary") -> Tensor:
        return self.scratch.block(name, *like.shape)

    def _normalize(self, group: slice) -> None:
        """First pass: all normalizers, and the targets' logits."""
        for words, weight, teacher_weight in self._heads(with_teacher=True):
            for rows in self._rows(group):
                logits = self._logits("logits", self.states[rows], weight, words, made=False)
                largest = logits.amax(1, keepdim=True)
                if self.hard is not None and self.student.labels is not None:
                    self.hard.add(logits, largest, rows, self._temporary(logits))
                    index, inside = _labels_inside(self.student.labels[rows], words, logits.shape[1])
                    self.target_logits[rows] += logits.gather(1, index) * inside
                if self.soft is not None and self.taught is not None and self.teacher_states is not None:
                    self.soft.add(logits, largest, rows, self._temporary(logits))
                    taught = self._logits("taught", self.teacher_states[rows], teacher_weight, words, made=False)
                    self.taught.add(taught, taught.amax(1, keepdim=True), rows, self._temporary(logits))

    def _gradients(self, group: slice, grad_hidden: Tensor | None, grad_head: Tensor | None) -> Tensor:
        """Second pass: a group's sum p_t (t - s) / T; writes its rows' gradients, adds to the head's."""
        divergence = torch.zeros((), dtype=torch.float32, device=self.student.hidden.device)
        for words, weight, teacher_weight in self._heads(with_teacher=not self.kept_rows):
            sums: Tensor | None = None
            if grad_head is not None:
                sums = grad_head[words]
                if sums.dtype != torch.float32:
                    sums = self.scratch.block("grad_words", *sums.shape)
            for rows in self._rows(group):
                value, gradient = self._block(rows, words, weight, teacher_weight)
                if value is not None:
                    divergence += value
                if grad_hidden is not None:
                    self._fold("grad_rows", grad_hidden[rows], gradient, weight, first=not words.start)
                if sums is not None:
                    self._fold("grad_words_product", sums, gradient.T, self.states[rows], first=not rows.start)
            if grad_head is not None and sums is not None and sums.dtype != grad_head.dtype:
                grad_head[words] = sums
        return divergence

    def _cross_entropy(self) -> Tensor:
        if self.hard is None or self.student.labels is None:
            return torch.zeros((), dtype=torch.float32, device=self.student.hidden.device)
        is_target = (self.student.labels != IGNORE).unsqueeze(1)
        return ((self.hard.log() - self.target_logits) * is_target).sum()

    def _block(
        self, rows: slice, words: slice, weight: Tensor, teacher_weight: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Second pass, one block: its part of the KL, and the gradient of the total in the compute dtype."""
        logits = self._logits("logits", self.states[rows], weight, words, made=True)
        value: Tensor | None = None
        gradient: Tensor | None = None
        if self.hard is not None:
            probabilities = self.hard.probabilities(logits, rows, self._temporary(logits, "hard"))
            gradient = self._cross_entropy_gradient(probabilities, rows, words)
        if self.teacher_states is not None:
            taught = self._logits("taught", self.teacher_states[rows], teacher_weight, words, made=True)
            value, soft_gradient = self._divergence(logits, taught, rows)
            gradient = soft_gradient if gradient is None else gradient.add_(soft_gradient)
        assert gradient is not None
        if self.dtype == torch.float32:
            return value, gradient
        return value, self.scratch.block("gradient", *gradient.shape, dtype=self.dtype).copy_(gradient)

    def _cross_entropy_gradient(self, probabilities_RW: Tensor, rows: slice, words: slice) -> Tensor:
        """Factor * (softmax - onehot) of the rows with a target. Consumes the probabilities."""
        assert self.student.labels is not None
        labels = self.student.labels[rows]
        index, inside = _labels_inside(labels, words, probabilities_RW.shape[1])
        probabilities_RW.scatter_add_(1, index, -inside.to(probabilities_RW.dtype))
        return probabilities_RW.mul_((labels != IGNORE).unsqueeze(1) * self.student.cross_entropy_factor)

    def _divergence(self, logits: Tensor, taught: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """A block's share of sum p_t (t - s) / T, and the gradient of the KL times its factor. Consumes the logits.

        KL = sum p_t (t - s) / T + log Z_s - log Z_t; the caller adds the normalizers.
        """
        assert self.teacher is not None
        assert self.soft is not None
        assert self.taught is not None
        student = self.soft.probabilities(logits, rows, self._temporary(logits, "soft"))
        teacher = self.taught.probabilities(taught, rows, self._temporary(logits))
        counted = self.teacher.rows[rows]
        inverse_temperature = self.soft.inverse_temperature
        value = (taught.sub_(logits).mul_(teacher).sum(1) * counted).sum() * inverse_temperature
        factor = counted * (self.teacher.divergence_factor * self.teacher.scale * inverse_temperature)
        return value, student.sub_(teacher).mul_(factor.unsqueeze(1))


def _labels_inside(labels_R: Tensor, words: slice, width: int) -> tuple[Tensor, Tensor]:
    """Column of each row's label in a block [R, 1], clamped to it, and whether it is inside [R, 1]."""
    index = (labels_R - words.start).unsqueeze(1)
    return index.clamp(0, width - 1), (index >= 0) & (index < width)
