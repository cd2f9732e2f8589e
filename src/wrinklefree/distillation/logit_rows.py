"""What blocks of the vocabulary add up to for each row of logits, and a block's gradient once all of them are counted.

`vocabulary_blocks` makes products; what happens to their results is here. `LogitRows` is made of tensor operations, each of
which goes through a block once. `NativeLogitRows` goes through it once a pass, in C (csrc/vocabulary.c).

Powers are of two: one takes less time than a power of e (measured).

Shapes: N rows, V vocabulary, R rows and W words of a block.
"""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wrinklefree.distillation.scratch import Scratch
from wrinklefree.models.records import IGNORE
from wrinklefree.native.library import LogitsBlockRecord
from wrinklefree.native.runner import run_kernel
from wrinklefree.quantization.cpu_kernels import TYPES, has_kernels

LOG2_E = math.log2(math.e)
LARGEST, TARGET, SUMS = 0, 1, 2
"""Columns of `PowerSums.table`."""


@dataclass(frozen=True)
class Hard:
    """Cross-entropy's side: labels [N], IGNORE where there is none, and the factor of the gradient."""

    labels: Tensor
    factor: float


@dataclass(frozen=True)
class Soft:
    """The KL's side: how much each row counts [N], the temperature, and the factor of the gradient."""

    counted: Tensor
    temperature: float
    factor: float


class PowerSums:
    """For each of N rows the largest logit, the label's, and sums of 2^(factor * (logit - largest)).

    `table` is float32 [N, 4], WfRowSums of csrc/engine.h: room for two factors.
    """

    def __init__(self, count: int, device: torch.device, factors: list[float]) -> None:
        self.factors = factors
        self.table = torch.zeros(count, 4, device=device)
        self.table[:, LARGEST] = -torch.inf

    def add(self, logits_RW: Tensor, rows: slice, scratch_RW: Tensor) -> None:
        """Count a float32 block."""
        before = self.table[rows, LARGEST].unsqueeze(1)
        largest = torch.maximum(before, logits_RW.amax(1, keepdim=True))
        for place, factor in enumerate(self.factors, SUMS):
            terms = torch.add(largest * -factor, logits_RW, alpha=factor, out=scratch_RW).exp2_()
            scaled = self.table[rows, place].unsqueeze(1) * ((before - largest) * factor).exp2_()
            self.table[rows, place] = (scaled + terms.sum(1, keepdim=True)).squeeze(1)
        self.table[rows, LARGEST] = largest.squeeze(1)

    def log(self, index: int) -> Tensor:
        """Logarithm of the sum of exponentials [N] that belongs to a factor."""
        return self._log2(slice(None), index) / LOG2_E

    def probabilities(self, logits_RW: Tensor, rows: slice, index: int, out_RW: Tensor) -> Tensor:
        """Softmax of a block by a factor, once all of its rows' blocks are counted."""
        logs = self._log2(rows, index).unsqueeze(1)
        return torch.add(-logs, logits_RW, alpha=self.factors[index], out=out_RW).exp2_()

    def _log2(self, rows: slice, index: int) -> Tensor:
        return self.table[rows, LARGEST] * self.factors[index] + self.table[rows, SUMS + index].log2()


class LogitRows:
    """Cross-entropy, KL, and their gradient with respect to N rows of logits that come in blocks.

    `add` takes all blocks of a row, then `gradient` takes them again. A NaN or an infinity reaches the loss and the gradient.
    """

    def __init__(self, count: int, device: torch.device, hard: Hard | None, soft: Soft | None) -> None:
        self.hard, self.soft = hard, soft
        self.scratch = Scratch(device)
        factors = [] if hard is None else [LOG2_E]
        if soft is not None and (hard is None or soft.temperature != 1.0):
            factors.append(LOG2_E / soft.temperature)
        self.last = len(factors) - 1
        """Index of the KL's factor; cross-entropy's is the first."""
        self.student = PowerSums(count, device, factors)
        self.teacher = PowerSums(count if soft is not None else 0, device, factors[-1:])
        self.values = torch.zeros(count, device=device)
        """Sums of the teacher's probability * (teacher - student)."""
        if hard is not None:
            self.has_target = hard.labels != IGNORE
            self.hard_weights = self.has_target * hard.factor
        if soft is not None:
            self.soft_weights = soft.counted.float() * (soft.factor / soft.temperature)

    def add(self, logits_RW: Tensor, taught_RW: Tensor | None, rows: slice, words: slice) -> None:
        """Count a block of the student's logits, and of the teacher's where there is a KL."""
        logits = self._float("student", logits_RW)
        self.student.add(logits, rows, self._temporary("first", logits))
        if self.hard is not None:
            index, inside = _labels_inside(self.hard.labels[rows], words)
            self.student.table[rows, TARGET] += (logits.gather(1, index) * inside).squeeze(1)
        if taught_RW is not None:
            taught = self._float("teacher", taught_RW)
            self.teacher.add(taught, rows, self._temporary("first", taught))

    def gradient(self, logits_RW: Tensor, taught_RW: Tensor | None, rows: slice, words: slice) -> Tensor:
        """Gradient of both losses, of the logits' dtype; counts the block in the KL. Consumes the logits.

        factor * (softmax(s) - onehot) + factor / T * (softmax(s / T) - softmax(t / T)). The next call overwrites it.
        """
        logits = self._float("student", logits_RW)
        gradient: Tensor | None = None
        if self.hard is not None:
            gradient = self.student.probabilities(logits, rows, 0, self._temporary("first", logits))
            index, inside = _labels_inside(self.hard.labels[rows], words)
            gradient.scatter_add_(1, index, -inside.float()).mul_(self.hard_weights[rows].unsqueeze(1))
        if taught_RW is not None:
            taught = self._float("teacher", taught_RW)
            student = self.student.probabilities(logits, rows, self.last, self._temporary("second", logits))
            teacher = self.teacher.probabilities(taught, rows, 0, self._temporary("third", logits))
            self.values[rows] += taught.sub_(logits).mul_(teacher).sum(1)
            difference = student.sub_(teacher).mul_(self.soft_weights[rows].unsqueeze(1))
            gradient = difference if gradient is None else gradient.add_(difference)
        assert gradient is not None
        if logits_RW.dtype == torch.float32:
            return gradient
        return self.scratch.block("gradient", *logits_RW.shape, dtype=logits_RW.dtype).copy_(gradient)

    def cross_entropy(self) -> Tensor:
        """The sum over rows with a target; 0 without labels."""
        if self.hard is None:
            return self.values.new_zeros(())
        return ((self.student.log(0) - self.student.table[:, TARGET]) * self.has_target).sum()

    def divergence(self) -> Tensor:
        """KL(teacher || student), a sum over rows as they count; 0 without a teacher.

        A row's is sum p_t (t - s) / T + log Z_s - log Z_t.
        """
        if self.soft is None:
            return self.values.new_zeros(())
        logs = self.student.log(self.last) - self.teacher.log(0)
        return ((self.values / self.soft.temperature + logs) * self.soft.counted).sum()

    def _float(self, name: str, logits: Tensor) -> Tensor:
        return logits if logits.dtype == torch.float32 else self.scratch.block(name, *logits.shape).copy_(logits)

    def _temporary(self, name: str, like: Tensor) -> Tensor:
        return self.scratch.block(name, *like.shape)


class NativeLogitRows(LogitRows):
    """The same with one pass of C in place of each chain of operations; blocks are contiguous, float32 or bfloat16."""

    def __init__(self, count: int, device: torch.device, hard: Hard | None, soft: Soft | None) -> None:
        super().__init__(count, device, hard, soft)
        factors = self.student.factors
        self._record = LogitsBlockRecord(powers=len(factors), factors=(ctypes.c_float * 2)(*factors))
        self._by_row = {"sums": self.student.table, "values": self.values}
        if hard is not None:
            self._by_row |= {"labels": hard.labels.long().contiguous(), "hard": self.hard_weights}
        if soft is not None:
            self._by_row |= {"teacher_sums": self.teacher.table, "soft": self.soft_weights}

    def add(self, logits_RW: Tensor, taught_RW: Tensor | None, rows: slice, words: slice) -> None:
        """See `LogitRows`."""
        self._run("wf_sum_logits", logits_RW, taught_RW, None, rows, words)

    def gradient(self, logits_RW: Tensor, taught_RW: Tensor | None, rows: slice, words: slice) -> Tensor:
        """See `LogitRows`."""
        gradient = self.scratch.block("gradient", *logits_RW.shape, dtype=logits_RW.dtype)
        self._run("wf_differentiate_logits", logits_RW, taught_RW, gradient, rows, words)
        return gradient

    def _run(
        self, name: str, logits: Tensor, taught: Tensor | None, gradient: Tensor | None, rows: slice, words: slice
    ) -> None:
        record = self._record
        record.rows, record.width = logits.shape
        record.first, record.type = words.start, TYPES[logits.dtype]
        record.student = logits.data_ptr()
        record.teacher = None if taught is None else taught.data_ptr()
        record.gradient = None if gradient is None else gradient.data_ptr()
        for field, tensor in self._by_row.items():
            setattr(record, field, tensor.data_ptr() + rows.start * tensor.stride(0) * tensor.element_size())
        run_kernel(name, ctypes.byref(record))


def logit_rows(count: int, device: torch.device, hard: Hard | None, soft: Soft | None, dtype: torch.dtype) -> LogitRows:
    """In C where its library is there and takes the logits' dtype."""
    native = device.type == "cpu" and dtype in TYPES and has_kernels()
    return (NativeLogitRows if native else LogitRows)(count, device, hard, soft)


def _labels_inside(labels_R: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Column of each row's label in a block [R, 1], clamped to it, and whether it is inside [R, 1]."""
    width = words.stop - words.start
    index = (labels_R - words.start).unsqueeze(1)
    return index.clamp(0, width - 1), (index >= 0) & (index < width)
