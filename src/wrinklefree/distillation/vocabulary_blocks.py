"""Cross-entropy and logit KL over blocks of the vocabulary: for large vocabularies on a CPU.

A chunk of rows that fits a cache has only a few dozen rows where the vocabulary is large. Products of so few rows wait
for the head's weights, and the gradient of the head is added up once a chunk: [V, D] read and written for each 42 rows
of a 49k vocabulary. Here the blocks are small in both directions and the vocabulary is the outer loop, twice:

1. normalizers: for each row the running maximum and sum of exponentials of the student's logits, of them divided by the
   temperature, and of the teacher's;
2. gradients: the logits are multiplied again (on a CPU with bfloat16 tiles that costs less than keeping them), the
   probabilities follow from the normalizers, and each block's part of the head's gradient is finished at once: nothing
   of size [V, D] but the gradient itself is held, no copy of either head in another type included.

Values and gradients are those of `head_losses`' chunks of rows up to the order of float32 sums.

Shapes: N rows, D hidden size, V vocabulary, R rows and W words of a block.
"""

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
    """Running log of the sum of exponentials of `logits * inverse_temperature`, float32 [N, 1]."""

    def __init__(self, like: Tensor, inverse_temperature: float) -> None:
        self.inverse_temperature = inverse_temperature
        self._largest = like.new_full((len(like), 1), -torch.inf, dtype=torch.float32)
        self._sum = like.new_zeros((len(like), 1), dtype=torch.float32)

    def add(self, logits_RW: Tensor, largest_R1: Tensor, rows: slice, scratch_RW: Tensor) -> None:
        """Count a block whose rows' largest logits are known."""
        before = self._largest[rows]
        largest = torch.maximum(before, largest_R1 * self.inverse_temperature)
        terms = torch.add(-largest, logits_RW, alpha=self.inverse_temperature, out=scratch_RW).exp_()
        self._sum[rows] = self._sum[rows] * (before - largest).exp_() + terms.sum(1, keepdim=True)
        self._largest[rows] = largest

    def log(self) -> Tensor:
        """The logarithm [N, 1]."""
        return self._largest + self._sum.log()

    def probabilities(self, logits_RW: Tensor, log_R1: Tensor, out_RW: Tensor) -> Tensor:
        """softmax(logits * inverse_temperature), given the rows' logarithm."""
        return torch.add(-log_R1, logits_RW, alpha=self.inverse_temperature, out=out_RW).exp_()


@torch.no_grad()
def blocked_losses(
    student: Student, teacher: TeacherSide | None, dtype: torch.dtype, *, hidden_needs: bool, head_needs: bool
) -> BlockedLosses:
    """Sums and gradients; products use `dtype`, everything else float32. Call it without autocast."""
    return _Pass(student, teacher, dtype).run(hidden_needs=hidden_needs, head_needs=head_needs)


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

    def run(self, *, hidden_needs: bool, head_needs: bool) -> BlockedLosses:
        hidden, head = self.student.hidden, self.student.head
        self._normalize()
        cross_entropy = self._cross_entropy()
        divergence = torch.zeros((), dtype=torch.float32, device=hidden.device)
        if self.teacher is None and not (hidden_needs or head_needs):
            return BlockedLosses(cross_entropy, divergence, None, None)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if hidden_needs else None
        grad_head = torch.empty_like(head) if head_needs else None
        logs = tuple(None if sums is None else sums.log() for sums in (self.hard, self.soft, self.taught))
        for words, weight, teacher_weight in self._heads():
            grad_words: Tensor | None = None
            for rows in self._rows():
                value, gradient = self._block(rows, words, weight, teacher_weight, logs)
                if value is not None:
                    divergence += value
                if grad_hidden is not None:
                    grad_hidden[rows] += self._product("grad_rows", gradient, weight)
                if grad_head is not None:
                    product = self._product("grad_words", gradient.T, self.states[rows])
                    grad_words = (
                        product.to(torch.float32, copy=True) if grad_words is None else grad_words.add_(product)
                    )
            if grad_head is not None and grad_words is not None:
                grad_head[words] = grad_words
        if self.teacher is not None and logs[1] is not None and logs[2] is not None:
            counted = self.teacher.rows.unsqueeze(1)
            divergence = (divergence + ((logs[1] - logs[2]) * counted).sum()) * self.teacher.scale
        if grad_head is not None and not len(hidden):
            grad_head.zero_()
        return BlockedLosses(
            cross_entropy, divergence, None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_head
        )

    def _rows(self) -> Iterator[slice]:
        for start in range(0, len(self.student.hidden), BLOCK_ROWS):
            yield slice(start, start + BLOCK_ROWS)

    def _heads(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Blocks of both heads in the compute dtype."""
        for start in range(0, self.student.head.shape[0], BLOCK_WORDS):
            words = slice(start, start + BLOCK_WORDS)
            other = None if self.teacher is None else self.teacher.head[words].to(self.dtype)
            yield words, self.student.head[words].to(self.dtype), other

    def _product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        return torch.mm(left, right, out=self.scratch.block(name, left.shape[0], right.shape[1], dtype=self.dtype))

    def _logits(self, name: str, states: Tensor, weight: Tensor) -> Tensor:
        """States @ weight.T, multiplied in the compute dtype, as float32."""
        product = self._product(f"{name}_product", states, weight.T)
        return product if self.dtype == torch.float32 else self.scratch.block(name, *product.shape).copy_(product)

    def _temporary(self, like: Tensor, name: str = "temporary") -> Tensor:
        return self.scratch.block(name, *like.shape)

    def _normalize(self) -> None:
        """First pass: all normalizers, and the targets' logits."""
        for words, weight, teacher_weight in self._heads():
            for rows in self._rows():
                logits = self._logits("logits", self.states[rows], weight)
                largest = logits.amax(1, keepdim=True)
                if self.hard is not None and self.student.labels is not None:
                    self.hard.add(logits, largest, rows, self._temporary(logits))
                    index, inside = _labels_inside(self.student.labels[rows], words, logits.shape[1])
                    self.target_logits[rows] += logits.gather(1, index) * inside
                if self.soft is not None and self.taught is not None and self.teacher_states is not None:
                    assert teacher_weight is not None
                    self.soft.add(logits, largest, rows, self._temporary(logits))
                    taught = self._logits("taught", self.teacher_states[rows], teacher_weight)
                    self.taught.add(taught, taught.amax(1, keepdim=True), rows, self._temporary(logits))

    def _cross_entropy(self) -> Tensor:
        if self.hard is None or self.student.labels is None:
            return torch.zeros((), dtype=torch.float32, device=self.student.hidden.device)
        is_target = (self.student.labels != IGNORE).unsqueeze(1)
        return ((self.hard.log() - self.target_logits) * is_target).sum()

    def _block(
        self,
        rows: slice,
        words: slice,
        weight: Tensor,
        teacher_weight: Tensor | None,
        logs: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, Tensor]:
        """Second pass, one block: its part of the KL, and the gradient of the total in the compute dtype."""
        hard_log, soft_log, taught_log = logs
        logits = self._logits("logits", self.states[rows], weight)
        value: Tensor | None = None
        gradient: Tensor | None = None
        if self.hard is not None and hard_log is not None:
            probabilities = self.hard.probabilities(logits, hard_log[rows], self._temporary(logits, "hard"))
            gradient = self._cross_entropy_gradient(probabilities, rows, words)
        if self.teacher_states is not None and soft_log is not None and taught_log is not None:
            assert teacher_weight is not None
            taught = self._logits("taught", self.teacher_states[rows], teacher_weight)
            value, soft_gradient = self._divergence(logits, taught, soft_log[rows], taught_log[rows], rows)
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

    def _divergence(
        self, logits: Tensor, taught: Tensor, soft_log: Tensor, taught_log: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """A block's share of sum p_t (t - s) / T, and the gradient of the KL times its factor. Consumes the logits.

        KL = sum p_t (t - s) / T + log Z_s - log Z_t; the caller adds the normalizers.
        """
        assert self.teacher is not None
        assert self.soft is not None
        assert self.taught is not None
        student = self.soft.probabilities(logits, soft_log, self._temporary(logits, "soft"))
        teacher = self.taught.probabilities(taught, taught_log, self._temporary(logits))
        counted = self.teacher.rows[rows]
        inverse_temperature = self.soft.inverse_temperature
        value = (taught.sub_(logits).mul_(teacher).sum(1) * counted).sum() * inverse_temperature
        factor = counted * (self.teacher.divergence_factor * self.teacher.scale * inverse_temperature)
        return value, student.sub_(teacher).mul_(factor.unsqueeze(1))


def _labels_inside(labels_R: Tensor, words: slice, width: int) -> tuple[Tensor, Tensor]:
    """Column of each row's label in a block [R, 1], clamped to it, and whether it is inside [R, 1]."""
    index = (labels_R - words.start).unsqueeze(1)
    return index.clamp(0, width - 1), (index >= 0) & (index < width)
